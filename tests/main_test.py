"""The command as a user runs it: mistakes in a line, kills, preemption."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from pivot_jax.weights import artifacts
from tests.fixtures import programs

# One stage is enough: the projector alone, from the shipped weights.
CONFIG = """
from pivot_jax.configs import pivot

def get_config(steps):
  c = pivot.get_config("debug")
  c.order = ("stage1_proj",)
  c.stage1_proj.update(dict(steps=int(steps), save_every=2))
  return c
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "one_stage.py"
  path.write_text(CONFIG)
  return path


def start(config, workdir, *flags):
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "pivot_jax.main",
      f"--config={config}",
      f"--workdir={workdir}",
      *flags,
    ],
    cwd=programs.ROOT,
    env=programs.one_device(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process):
  out, err = process.communicate(timeout=240)
  return process.returncode, out, err


def losses(workdir):
  text = (workdir / "stage1_proj" / "metrics.jsonl").read_text()
  return [json.loads(line)["losses/total"] for line in text.splitlines()]


def wait_for(path, process):
  while not path.exists():
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)


@pytest.mark.parametrize(
  ("flag", "says"),
  [
    ("--config.stage1_proj.btach=3", "did you mean 'batch'"),
    ("--config.vision.init=hf:nowhere", "nowhere: no such folder"),
    (
      "--config.llm.hidden_size=64",
      "sizes come from the weights (--config.llm.init",
    ),
    ("--config=configs/pivott.py", "configs/pivott.py"),
    ("--config.mesh.data=3", "needs 3 devices, there are 1"),
    ("--config.stage1_proj.trainable=('projektor/.*',)", "did you mean"),
  ],
)
def test_a_mistake_is_answered_in_one_line(config, tmp_path, flag, says):
  code, _, err = finish(start(f"{config}:2", tmp_path / "w", flag))
  last = err.strip().splitlines()[-1]
  assert code == 2 and says in last, err
  assert "Traceback" not in err


def test_a_dry_run_prints_the_plan_and_writes_nothing(config, tmp_path):
  code, out, err = finish(start(f"{config}:2", tmp_path / "w", "--dry_run"))
  assert code == 0, err
  assert re.search(r"stage1_proj +train", out)
  assert (
    "features [8, 36, 96], hidden [rows, tokens, 96], head [96, 512]" in out
  )
  assert "parameters" in out and "caption: 20000 rows" in out
  assert not (tmp_path / "w").exists()


@pytest.mark.nightly
def test_a_killed_run_continues_at_its_checkpoint_and_ends_the_same(
  config, tmp_path
):
  straight, killed = tmp_path / "straight", tmp_path / "killed"
  assert finish(start(f"{config}:8", straight))[0] == 0
  process = start(f"{config}:8", killed)
  wait_for(killed / "stage1_proj" / "checkpoints" / "2", process)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  code, _, err = finish(start(f"{config}:8", killed))
  assert code == 0, err
  resumed = re.search(r"resumes at step (\d+)", err)
  assert resumed and int(resumed[1]) >= 2
  assert losses(killed) == losses(straight)
  prints = [w / "stage1_proj" / "fingerprint.json" for w in (straight, killed)]
  assert artifacts.leaf_prints(prints[0]) == artifacts.leaf_prints(prints[1])


def test_sigterm_saves_and_exits_with_75(config, tmp_path):
  process = start(f"{config}:10000", tmp_path / "w")
  wait_for(tmp_path / "w" / "stage1_proj" / "checkpoints" / "2", process)
  process.terminate()
  code, _, err = finish(process)
  step = re.search(r"saved at step (\d+) of 10000", err)
  assert code == 75 and step, err
  folder = tmp_path / "w" / "stage1_proj" / "checkpoints" / step[1]
  assert folder.is_dir()


def test_a_loss_that_is_not_finite_stops_and_names_step_and_rows(
  config, tmp_path
):
  flags = ("--config.stage1_proj.lr=(('.*', 1e38),)",)
  code, _, err = finish(start(f"{config}:10", tmp_path / "w", *flags))
  last = err.strip().splitlines()[-1]
  assert code == 1 and "not finite at step" in last, err
  assert "scenes/caption/train/0/" in last and "is untouched" in last
