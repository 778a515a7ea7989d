"""Every benchmark imports, and every command that documents name has flags."""

import importlib
import pathlib
import re
import runpy
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# What `.[bench]` installs beyond `.[test]`.
PEERS = {"trl", "datasets"}
MODULES = sorted(
  ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
    ".__init__"
  )
  for path in ROOT.glob("bench/**/*.py")
)
_COMMAND = re.compile(r"python (?:-m (bench(?:\.\w+)+)|(bench/\w+\.py))")


def _named() -> set[str]:
  """Return the commands of the documents and those of the modules."""
  pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
  pages += ROOT.glob("bench/**/*.py")
  found = set()
  for page in pages:
    for module, script in _COMMAND.findall(page.read_text("utf-8")):
      found.add(module or script)
  return found - {"bench.NAME"}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
  try:
    importlib.import_module(name)
  except ModuleNotFoundError as error:
    assert error.name in PEERS and name.endswith("trl_peer"), error


# An earlier test has imported the module that is run.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", sorted(_named()))
def test_every_command_tells_its_flags(command, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", [command, "--help"])
  with pytest.raises(SystemExit) as ended:
    if command.endswith(".py"):
      runpy.run_path(str(ROOT / command), run_name="__main__")
    else:
      runpy.run_module(command, run_name="__main__", alter_sys=True)
  assert ended.value.code == 0
  assert "usage:" in capsys.readouterr().out


def test_the_commands_are_the_ones_that_were_promised():
  names = "data dpo_cpu generate_cpu gpu growth images load padding probe_cpu"
  names += " processes restart sft_cpu"
  promised = {f"bench.{name}" for name in names.split()}
  promised |= {"bench/report_table.py", "bench/sweep_table.py"}
  assert promised <= _named()
