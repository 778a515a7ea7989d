"""The benchmarks of several processes: their runs, their tables, their pages."""

import json
import signal
import sys

import pytest

from bench import faults, processes, restart
from bench.joined import runs, stall

# Marks a line, and waits for its end unless it is told to end.
SCRIPT = """
import json, os, sys, time
asked = json.loads(os.environ["BENCH_ASKED"])
index = sys.argv[-1].rpartition(",")[2].replace("--processes=none", "0")
with open(asked["marks"] + index, "w") as file:
  for step in range(3):
    print(json.dumps({"what": "update", "step": step, "time": step}), file=file)
print("error: of process", index, flush=True)
sys.exit(int(index)) if asked.get("end") else time.sleep(60)
"""


def together(folder, count, **asked):
  return runs.Together(
    folder / "run", count, lambda _: ["-c", SCRIPT], asked=asked
  )


def test_marks_are_waited_for_and_all_that_is_left_is_killed(tmp_path):
  with together(tmp_path, 2) as run:
    assert run.wait_for("update", step=2, index=1)["time"] == 2
    killed = run.kill(1)
    assert run.running[1].wait() == -signal.SIGKILL
    assert run.running[0].poll() is None and killed > run.began
  assert run.running[0].returncode == -signal.SIGKILL


def test_each_end_has_its_code_and_its_line(tmp_path):
  with together(tmp_path, 2, end=True) as run:
    found = run.end()
  assert [one.code for one in found] == [0, 1]
  assert runs.last_line(found[1].said) == "error: of process 1"


def test_a_mark_that_never_comes_is_told_with_the_logs(tmp_path):
  with together(tmp_path, 1, end=True) as run, pytest.raises(runs.Hung) as hung:
    run.wait_for("restored")
  assert "error: of process 0" in str(hung.value)


def test_what_gloo_and_jax_say_is_no_last_line():
  said = "process 1 (h): error: lost\n[Gloo] error: x\nE1201 jax error: y\n"
  assert runs.last_line(said) == "process 1 (h): error: lost"


class Free:
  free = 1e9


def test_a_state_that_does_not_fit_is_refused_with_what_it_needs(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(stall, "available_memory", lambda: 24e9)
  assert not stall.refused(0.5e9, "asynchronous", tmp_path)
  why = stall.refused(1.5e9, "asynchronous", tmp_path)
  assert why == "needs 40 GB of memory, 24 are free"
  monkeypatch.setattr(stall.shutil, "disk_usage", lambda _: Free)
  assert "GB of disk, 1 are" in stall.refused(1e9, "leaf by leaf", tmp_path)


def start(seconds, *, warm):
  phases = {name: float(seconds) for name, _ in restart.PHASES}
  return restart.Start(2, warm, phases, 0.5, 5)


def test_starts_are_told_by_cache_with_their_spread():
  starts = [start(2, warm=False), start(1, warm=True), start(3, warm=True)]
  lines = restart.starts_table(starts).splitlines()
  assert lines[2].startswith("| 2 | empty | 12.0 | 2.0 |")
  assert lines[3].startswith("| 2 | full | 12.0 (6.0–18.0) | 2.0 (1.0–3.0) |")


def test_ends_are_told_by_fault():
  name = faults.FAULTS[-1].name
  outcomes = [
    faults.Outcome(name, x, (2, 2), "no", right=True) for x in (1.0, 3.0)
  ]
  outcomes += [faults.Outcome(name, 99, (0, 0), "", right=False)]
  last = faults.table(outcomes).splitlines()[-1]
  told = "2.0 (1.0–3.0) | joining | 70 | 2, 2 or 0, 0 | 2 of 3 | no |"
  assert last == f"| {name} | {told}"


def test_a_save_that_was_not_run_says_why():
  plain = dict(totals=[2.0], above=[1e9], restore=1.0, restore_above=1, plain=1)
  found = [
    dict(billions=0.5, way=way, stalls=[x], default_waits=False) | plain
    for way, x in zip(restart.WAYS, (0.5, 4.0), strict=True)
  ]
  found.append({"billions": 1.5, "way": "asynchronous", "why": "too large"})
  text = restart.saves_table(found)
  assert "| 1.5 | 18 | asynchronous | not run: too large |" in text
  assert text.count("(the default)") == 1
  assert restart.ratios(found)[0].endswith("waits 8 times as long")


def test_a_rate_is_beside_that_of_one_process():
  reads = [
    processes.Read(1, (2.0,), 10, 1000),
    processes.Read(2, (1.0, 0.5), 10, 1000),
  ]
  lines = processes.reading_table(reads).splitlines()
  assert lines[2:] == ["| 1 | 500 | 5 | 1.00 |", "| 2 | 1000 | 10 | 2.00 |"]


@pytest.mark.nightly
@pytest.mark.parametrize("module", [restart, processes])
def test_a_quick_run_writes_a_page_without_a_path(
  module, tmp_path, monkeypatch
):
  monkeypatch.setattr(sys, "argv", ["bench", "--quick", f"--out={tmp_path}"])
  module.main()
  name = module.__name__.rpartition(".")[2]
  page = (tmp_path / f"{name}.md").read_text("utf-8")
  found = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
  assert found["command"] == f"python -m bench.{name} --quick"
  assert "| 2 |" in page and "/tmp" not in page
