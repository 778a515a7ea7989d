"""The built wheel runs its recipes from a folder that has configs of its own."""

import os
import subprocess
import sys

import pytest

from tests.fixtures import programs

pytestmark = pytest.mark.nightly
OWN = """
from pivot_jax.configs import pivot


def get_config():
  c = pivot.get_config("debug")
  c.order = ("stage1_proj",)
  return c
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """Return the folder that only the wheel is installed in."""
  folder = tmp_path_factory.mktemp("wheel")
  pip = [sys.executable, "-m", "pip", "--quiet"]
  build = ["--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
  source = folder / "source"
  # A build leaves files beside the sources.
  kept = ["setup.py", "pyproject.toml", "README.md", "pivot_jax", "configs"]
  source.mkdir()
  for name in kept:
    subprocess.run(["cp", "-r", programs.ROOT / name, source], check=True)
  subprocess.run([*pip, "wheel", *build, source], check=True)
  (wheel,) = folder.glob("*.whl")
  site = folder / "site"
  target = ["--no-deps", f"--target={site}", wheel]
  subprocess.run([*pip, "install", *target], check=True)
  return site


@pytest.fixture
def elsewhere(tmp_path):
  """Return an empty folder with a foreign `configs` and a config."""
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "__init__.py").write_text("raise ImportError('no')")
  (tmp_path / "mine.py").write_text(OWN)
  return tmp_path


def run(installed, folder, *command):
  environment = programs.one_device() | {"PYTHONPATH": str(installed)}
  done = subprocess.run(
    command,
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def commands(installed, recipe):
  """Return the ways to start a recipe."""
  script = installed / "bin" / "pivot-jax"
  return (
    [script, "run", recipe, "--workdir=w"],
    [
      *(sys.executable, "-m", "pivot_jax.main"),
      *(f"--config={recipe}", "--workdir=w"),
    ],
  )


@pytest.mark.parametrize("way", [0, 1])
def test_the_wheel_finds_its_recipes_from_any_folder(installed, elsewhere, way):
  command = commands(installed, "pivot:debug")[way]
  said = run(installed, elsewhere, *command, "--dry_run")
  assert said.startswith("37 stages") and "stage2_dpo" in said
  where = "import pivot_jax.configs as c; print(c.__file__)"
  place = run(installed, elsewhere, sys.executable, "-c", where)
  assert place.startswith(str(installed))


def test_the_wheel_has_the_lists_of_the_paper_s_data(installed, elsewhere):
  foreign = elsewhere / "configs" / "data" / "onevision.yaml"
  foreign.parent.mkdir()
  foreign.write_text("datasets:\n- json_path: foreign.json\n")
  script = (
    "from pivot_jax.configs import paper_data as p;"
    "from pivot_jax.data.sources import mixtures as m;"
    "print(*(len(m.read(p.mixture(x, root='')['path'])) for x in p.MIXTURES))"
  )
  said = run(installed, elsewhere, sys.executable, "-c", script)
  assert said.split() == ["1", "87", "4"]


def test_a_config_of_the_user_builds_on_the_package_s(installed, elsewhere):
  (_, command) = commands(installed, "mine.py")
  run(installed, elsewhere, *command)
  assert (elsewhere / "w" / "stage1_proj" / "done.json").exists()


def test_the_command_has_a_version_and_names_its_words(installed, elsewhere):
  script = installed / "bin" / "pivot-jax"
  assert run(installed, elsewhere, script, "--version").strip() == "0.1.0"
  assert "pivot-jax data check" in run(installed, elsewhere, script, "--help")
  wrong = subprocess.run(
    [script, "trian"],
    cwd=elsewhere,
    env=os.environ | {"PYTHONPATH": str(installed)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert wrong.returncode == 2
  assert "'trian'" in wrong.stderr and "run, data, export" in wrong.stderr


@pytest.mark.parametrize("way", [0, 1])
def test_the_wheel_runs_a_recipe_to_its_report(installed, elsewhere, way):
  run(installed, elsewhere, *commands(installed, "pivot:debug")[way])
  assert (elsewhere / "w" / "report.html").exists()


def test_a_clone_runs_a_recipe_by_its_file(tmp_path):
  command = [sys.executable, "-m", "pivot_jax.main"]
  flags = ["--config=configs/pivot.py:debug", f"--workdir={tmp_path / 'w'}"]
  run(programs.ROOT, programs.ROOT, *command, *flags)
  assert (tmp_path / "w" / "report.html").exists()
