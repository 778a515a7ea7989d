"""The installed package works away from its checkout."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def _run(script, folder):
  done = subprocess.run(
    [sys.executable, "-c", script],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def test_load_and_save_are_there_from_any_folder(tmp_path):
  script = (
    "import pivot_jax; "
    "encoder, params = pivot_jax.load('package:toy:vision'); "
    "pivot_jax.save('out', encoder, params); "
    "print(sorted(pivot_jax.load('out')[1]))"
  )
  assert _run(script, tmp_path).endswith("['vision']")


def test_the_wheel_holds_the_lists_of_the_papers_data():
  # Nothing is built: the names are those that a build would copy.
  script = (
    "from distutils import core\n"
    "made = core.run_setup('setup.py', stop_after='init')\n"
    "command = made.get_command_obj('build_py')\n"
    "command.ensure_finalized()\n"
    "for package, _, _, files in command.data_files:\n"
    "  print(*(f'{package}/{file}' for file in files), sep='\\n')"
  )
  found = _run("import setuptools\n" + script, ROOT).splitlines()
  lists = {path.name for path in (ROOT / "configs" / "data").iterdir()}
  assert lists and {f"pivot_jax.configs/data/{name}" for name in lists} == {
    name for name in found if name.startswith("pivot_jax.configs/")
  }


def test_importing_the_package_imports_no_jax(tmp_path):
  # jax alone takes most of a second.
  script = "import sys, pivot_jax; print('jax' in sys.modules)"
  assert _run(script, tmp_path) == "False"
