"""launch/run.sh: which exit codes start the program again, and which signals."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launch import scripts


@pytest.fixture
def place(tmp_path):
  """Return a folder where `python` ends with the codes that a test gives."""
  found = scripts.Place(tmp_path)
  found.program("python", scripts.PYTHON.partition("\n")[2], sys.executable)
  return found


def starts(place):
  return place.lines("starts-here")


def waiting(place, **env):
  """Start a program that waits for SIGTERM."""
  place.write("codes-here", ["wait", 0])
  process = place.start("run.sh", *place.flags(), **env)
  while not starts(place):
    time.sleep(0.02)
  return process


def test_it_starts_again_until_the_program_is_done(place):
  place.write("codes-here", [75, 70, 134, 0])
  code, said = place.run("run.sh", *place.flags())
  assert (code, len(starts(place))) == (0, 4), said


@pytest.mark.parametrize("code", [1, 2, 137])
def test_it_starts_once_if_that_does_not_help(place, code):
  place.write("codes-here", [code, 0])
  assert place.run("run.sh", *place.flags())[0] == code
  assert len(starts(place)) == 1


def test_it_gives_up_after_ten_restarts(place):
  place.write("codes-here", [70] * 11 + [0])
  code, said = place.run("run.sh", *place.flags())
  assert (code, len(starts(place))) == (70, 11)
  assert "gives up: 10 restarts" in said


def test_it_gives_up_if_the_program_ends_too_soon(place):
  place.write("codes-here", [70, 0])
  code, said = place.run("run.sh", *place.flags(), PROGRESS="60")
  assert (code, len(starts(place))) == (70, 1)
  assert "gives up: it ran less than 60 seconds" in said


def test_sigterm_reaches_the_program_and_ends_the_loop(place):
  process = waiting(place)
  process.terminate()
  code, said = scripts.end(process)
  assert (code, said.count("run.sh: start")) == (75, 1), said
  assert "signals 1\n" in said


def test_the_program_gets_one_signal_of_many(place):
  process = waiting(place)
  # To the group, as from a terminal; a second one as from an impatient cloud.
  os.killpg(process.pid, signal.SIGTERM)
  time.sleep(0.2)
  os.killpg(process.pid, signal.SIGINT)
  code, said = scripts.end(process)
  assert code == 75 and "signals 1\n" in said, said
  # The log has what came after the signal, too.
  (log,) = (place.workdir / "logs").iterdir()
  assert "signals 1\n" in log.read_text("utf-8")


def test_a_program_that_cannot_handle_the_signal_yet_is_stopped(place):
  place.program("python", "touch up; exec sleep 30")
  process = place.start("run.sh", *place.flags())
  while not (place.folder / "up").exists():
    time.sleep(0.02)
  process.terminate()
  assert scripts.end(process)[0] == 75


def test_the_program_gets_the_flags_as_they_are(place):
  place.run("run.sh", *place.flags())
  words = ["-m", "pivot_jax.main", *place.flags()]
  assert starts(place) == [str(words)]


@pytest.mark.parametrize("env, name", [
  ({}, "here-0"), ({"JAX_PROCESS_ID": "3"}, "here-3"),
  ({"SLURM_PROCID": "4", "TPU_WORKER_ID": "0"}, "here-4"),
  ({"JOB_COMPLETION_INDEX": "5"}, "here-5"), ({"TPU_WORKER_ID": "6"}, "here-6"),
])  # fmt: skip
def test_a_log_is_of_a_host_and_a_process(place, env, name):
  _, said = place.run("run.sh", *place.flags(), **env)
  (log,) = (place.workdir / "logs").iterdir()
  assert log.name == f"{name}.log"
  assert log.read_text("utf-8") == said
  assert "running\n" in said


def test_the_program_is_not_buffered_and_shares_a_cache(place):
  place.program("python", 'echo "$PYTHONUNBUFFERED:$JAX_COMPILATION_CACHE_DIR"')
  _, said = place.run("run.sh", *place.flags())
  assert f"\n1:{place.workdir.parent}/.xla\n" in said
  _, said = place.run("run.sh", *place.flags(), JAX_COMPILATION_CACHE_DIR="/c")
  assert "\n1:/c\n" in said


def test_the_terminal_may_go(place):
  process = waiting(place)
  assert process.stdout is not None
  process.stdout.close()
  process.terminate()
  assert process.wait(timeout=30) == 75
  (log,) = (place.workdir / "logs").iterdir()
  assert "exit code 75" in log.read_text("utf-8")


def test_it_does_not_wait_for_what_the_program_leaves_behind(place):
  place.program("python", "sleep 20 & echo $! >left")
  process = place.start("run.sh", *place.flags())
  try:
    assert process.wait(timeout=15) == 0
  finally:
    os.kill(int(place.lines("left")[0]), signal.SIGKILL)
    scripts.end(process)


def test_a_lock_that_nobody_needs_goes(place):
  lock = place.folder / "lock"
  lock.touch()
  _, said = place.run("run.sh", *place.flags())
  assert not lock.exists() and f"removed {lock}" in said


def test_a_lock_stays_while_a_process_holds_the_device(place):
  lock, device = place.folder / "lock", place.folder / "accel0"
  lock.touch()
  with device.open("w"):
    _, said = place.run("run.sh", *place.flags(), TPU_DEVICES=str(device))
  assert lock.exists() and f"{lock} stays" in said


@pytest.mark.parametrize("words, env, says", [
  (["--workdir=W"], {}, "--config=RECIPE is missing"),
  (["--config=c"], {}, "--workdir=FOLDER is missing"),
  (["--config=c", "--workdir=gs://b/w"], {}, "gs://b/w: mount the bucket"),
  (["--config=c", "--workdir=W"], {"RESTARTS": "x"}, "RESTARTS or PROGRESS"),
  (["--config=c", "--workdir=W"], {"PYTHON": "none"}, "none: no such PYTHON"),
  (["--config=c", "--workdir=bin/python"], {}, "bin/python/logs"),
])  # fmt: skip
def test_a_mistake_is_one_line(place, words, env, says):
  code, said = place.run("run.sh", *words, **env)
  assert code == 2 and says in said.splitlines()[-1], said
  assert starts(place) == []


def test_it_runs_the_program_itself(place):
  env = {"PYTHON": sys.executable, "PYTHONPATH": str(scripts.programs.ROOT)}
  words = ["--config=pivot:debug", f"--workdir={place.workdir}", "--stray"]
  code, said = place.run("run.sh", *words, **env)
  assert code == 2 and "flag 'stray'" in said, said


def test_print_runs_nothing(place):
  code, said = place.run("run.sh", *place.flags(), "--print")
  assert code == 0 and starts(place) == [] and not place.workdir.exists()
  assert place.shown(said) == scripts.golden("run.txt")
  # What is printed is a command.
  shell = ["bash", "-c", said]
  subprocess.run(shell, cwd=place.folder, env=place.env, check=True)
  words = ["-m", "pivot_jax.main", *place.flags()]
  assert starts(place) == [str(words)]
