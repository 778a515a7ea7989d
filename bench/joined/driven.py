"""`pivot_jax.main` with marks of time, and faults, that a variable asks for.

BENCH_ASKED is a JSON object:

  marks    a file; PROCESS is appended to its name. A mark is a line of JSON:
           what happened, when, the step, seconds compiled so far, bytes read
           so far (rchar of /proc/self/io), rows read so far
  pause    seconds that each update waits, in all processes
  fail     {process: n}: the n-th example that it reads raises InputError
  hang     {process: n}: the n-th example that it reads never comes
  source   {process: text}: taken to be the hash of a source file
"""

import collections
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from pivot_jax import main, processes
from pivot_jax.data import streams
from pivot_jax.errors import InputError
from pivot_jax.recipe import agreement
from pivot_jax.training import monitor, recorder

ASKED = "BENCH_ASKED"
_COMPILED = "/jax/core/compile/backend_compile_duration"


class _Marks:
  """Counts, and writes lines when something happens."""

  def __init__(self, asked: Mapping[str, Any]):
    self.asked = asked
    self.rows = collections.Counter()
    self.compiled = 0.0
    jax.monitoring.register_event_duration_secs_listener(self._see)

  def _see(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED:
      self.compiled += duration_secs

  def of_process(self, name: str) -> Any:
    """Return what is asked of this process, None if nothing is."""
    return self.asked.get(name, {}).get(str(processes.index()))

  def mark(self, what: str, step: int = -1, *, at: float = 0.0) -> None:
    """Append a line, of now where no time is given."""
    line = {
      "what": what,
      "time": at or time.time(),
      "step": step,
      "compiled": self.compiled,
      "read": read_so_far(),
      "rows": dict(self.rows),
    }
    place = f"{self.asked['marks']}{processes.index()}"
    with open(place, "a", encoding="utf-8") as file:
      file.write(json.dumps(line) + "\n")


def read_so_far() -> int:
  """Return the bytes that this process has asked of files, or of pipes."""
  text = pathlib.Path("/proc/self/io").read_text("ascii")
  return int(dict(line.split(": ") for line in text.splitlines())["rchar"])


def _wrap(marks: _Marks) -> None:
  """Put marks and faults where a run passes."""
  join, resume = processes.start, recorder.resume
  metrics, call = recorder.Recorder.metrics, monitor.CompileWatch.call
  updates: list[int] = []

  def start(spec: str = "auto"):
    imported = time.time()
    found = join(spec)
    # Lines go by the number of the process, which is known now.
    marks.mark("imported", at=imported)
    marks.mark("joined")
    return found

  def restore(*given):
    marks.mark("restoring")
    found = resume(*given)
    jax.block_until_ready(found[0].trainable)
    marks.mark("restored")
    return found

  def first(self, step_fn, state, batch):
    if not updates:
      marks.mark("updating")
    found = call(self, step_fn, state, batch)
    if not updates:
      jax.block_until_ready(found)
      marks.mark("updated")
    updates.append(1)
    return found

  def see(self, step, values, update, wait):
    marks.mark("update", step)
    time.sleep(marks.asked.get("pause", 0.0))
    return metrics(self, step, values, update, wait)

  processes.start, recorder.resume = start, restore
  monitor.CompileWatch.call, recorder.Recorder.metrics = first, see


def _disturb(marks: _Marks) -> None:
  read, hashes = streams.Stream.read, agreement._source_files

  def read_or_fail(self, place, *, pixels=True):
    marks.rows["pixels" if pixels else "texts"] += 1
    number = marks.rows["pixels"] if pixels else 0
    if number and marks.of_process("fail") == number:
      marks.mark("fault")
      raise InputError("rows.jsonl:3: 'image': no such file")
    if number and marks.of_process("hang") == number:
      marks.mark("fault")
      time.sleep(1000)
    return read(self, place, pixels=pixels)

  def other_hashes(steps):
    told = marks.of_process("source")
    return hashes(steps) | ({"training/losses.py": told} if told else {})

  streams.Stream.read = read_or_fail
  agreement._source_files = other_hashes


def drive() -> None:
  """Run pivot_jax.main with what BENCH_ASKED asks for."""
  marks = _Marks(json.loads(os.environ[ASKED]))
  _wrap(marks)
  _disturb(marks)
  sys.argv[0] = "pivot_jax.main"
  main.run()


if __name__ == "__main__":
  drive()
