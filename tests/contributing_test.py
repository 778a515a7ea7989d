"""The examples of CONTRIBUTING.md, run from outside the package as they stand."""

import json
import re
import subprocess
import sys

import pytest

from tests.fixtures import programs

_FILE = re.compile(r"```python\n# (mine/\w+\.py)\n(.+?)```", re.DOTALL)
_COMMAND = re.compile(r"```bash\npython (-m pivot_jax\.main .+mine.+)\n```")
_LONGEST = 60


@pytest.fixture(scope="module")
def text():
  return (programs.ROOT / "CONTRIBUTING.md").read_text("utf-8")


@pytest.fixture(scope="module")
def ran(text, tmp_path_factory):
  """Return the folder of the run that the text's files and command make."""
  folder = tmp_path_factory.mktemp("elsewhere")
  (folder / "mine").mkdir()
  for name, content in _FILE.findall(text):
    (folder / name).write_text(content, encoding="utf-8")
  (command,) = _COMMAND.findall(text)
  done = subprocess.run(
    [sys.executable, *command.split()],
    cwd=folder,
    env=programs.one_device(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return folder / "runs" / "mine"


def test_each_example_is_short(text):
  files = dict(_FILE.findall(text))
  names = {"hinge", "norms", "csv_writer", "brightness", "config"}
  assert set(files) == {f"mine/{name}.py" for name in names}
  assert all(x.count("\n") < _LONGEST for x in files.values())


@pytest.mark.nightly
def test_the_examples_run_to_numbers_in_a_report(ran):
  found = json.loads((ran / "report.json").read_text("utf-8"))["results"]
  assert found["arms"]["hinge"]["linear/encoder/top1"]["n"] == 100
  norm = found["other"]["norms"]["norm"]
  assert norm["value"] > 0 and norm["n"] == 20 and norm["se"] > 0
  page = (ran / "report.html").read_text("utf-8")
  assert "Other measurements" in page and f"{norm['value']:.4g}" in page
  # The margin of a model and itself is zero: the hinge is at 1.
  lines = (ran / "stage2_hinge" / "metrics.jsonl").read_text("utf-8")
  assert json.loads(lines.splitlines()[0])["losses/hinge"] == 1.0
  csv = ran / "stage2_hinge" / "writers" / "losses.csv"
  assert [x.split(",")[0] for x in csv.read_text().split()] == list("1234")
  rows = json.loads((ran / "reference" / "done.json").read_text("utf-8"))
  assert rows["fields"]["sources"]["preference"]["size"] == 64
