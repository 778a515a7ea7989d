"""The whole loop by the command: every stage, a kill in the middle, a rerun.

The recipe is `debug` with fewer rows and one of its arms, at night with all of
them; what each stage measures is tested beside the stage. Here: that one
stage's result is what the next one reads, and that a killed run ends with the
numbers of one that was not.
"""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.fixtures import programs

CONFIG = """
from pivot_jax.configs import pivot

def get_config(arms=""):
  c = pivot.get_config("debug")
  if arms == "one":
    others = ("_original", "_stage1", "_sft")
    c.order = [x for x in c.order if not x.endswith(others)]
  for name, size in dict(
    preference=16, eval=24, blind=100, classify_train=100, classify_test=50,
    segment_train=32, segment_test=16, gradcam=16,
  ).items():
    c.sources[name].size = size
  for arm in pivot.ARMS:
    name = arm["name"]
    c[f"gradcam_{name}"].batch = 8
    c[f"segment_probe_{name}"].epochs = 2
    c[f"linear_probe_{name}"].lambdas = (1e-2, 1e2, 3)
  return c
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """Return fn(workdir, recipe) -> the started command."""
  config = tmp_path_factory.mktemp("config") / "small.py"
  config.write_text(CONFIG)

  def start(workdir, recipe=":one"):
    flags = (f"--config={config}{recipe}", f"--workdir={workdir}")
    return subprocess.Popen(
      [sys.executable, "-m", "pivot_jax.main", *flags],
      cwd=programs.ROOT,
      env=programs.one_device(),
      stderr=subprocess.PIPE,
      text=True,
    )

  return start


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
  """Return the folder of a finished run."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  finish(command(workdir))
  return workdir


def finish(process) -> str:
  _, said = process.communicate(timeout=900)
  assert process.returncode == 0, said
  return said


def results(workdir):
  return json.loads((workdir / "report.json").read_text("utf-8"))["results"]


def check_report(workdir, *arms):
  found = results(workdir)
  assert set(found["arms"]) == set(arms)
  for arm, values in found["arms"].items():
    measured = {name.split("/")[0] for name in values}
    assert measured == {"vqa", "linear", "segment", "gradient"}, arm
  assert set(found["mllms"]) == set(arms) - {"original"}
  page = (workdir / "report.html").read_text("utf-8")
  assert "<table" in page and "://" not in page
  done = {path.parent.name for path in workdir.rglob("done.json")}
  assert {"stage2_dpo", "detach_dpo", "pivot_full_dpo", "report"} <= done


def test_a_run_ends_in_a_report_of_its_arm(whole):
  check_report(whole, "dpo")


@pytest.mark.nightly
def test_a_run_ends_in_a_report_of_every_arm(command, tmp_path):
  finish(command(tmp_path / "all", ""))
  check_report(tmp_path / "all", "original", "stage1", "sft", "dpo")


def test_the_same_command_again_runs_nothing(command, whole):
  before = {p: p.stat().st_mtime_ns for p in whole.rglob("done.json")}
  said = finish(command(whole))
  assert len(re.findall(r"is done$", said, re.MULTILINE)) == len(before)
  assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("done.json")}


@pytest.mark.nightly
def test_a_run_killed_in_stage_1_ends_with_the_same_results(
  command, whole, tmp_path
):
  workdir = tmp_path / "killed"
  process = command(workdir)
  kept = workdir / "stage1_full" / "checkpoints" / "2"
  while not kept.exists():
    assert process.poll() is None, process.communicate()
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert not (workdir / "stage1_full" / "done.json").exists()
  said = finish(command(workdir))
  resumed = re.search(r"stage1_full resumes at step (\d+)", said)
  assert resumed and int(resumed[1]) >= 2, said
  assert results(workdir) == results(whole)
