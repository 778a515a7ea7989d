"""Rows of a benchmark as processes that may take only so long.

A row that does not fit the memory, takes longer than its share or ends with an
error is a result like any other: the next one is run.
"""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Steps before those that count.
WARM_UP = 3
# No row does anything of use in fewer seconds.
LEAST = 20.0
# What jax and torch say when a device's memory is full, in upper case.
_FULL = ("RESOURCE_EXHAUSTED", "OUTOFMEMORYERROR", "OUT OF MEMORY")


class Budget:
  """Seconds to spend, from now on."""

  def __init__(
    self, seconds: float, clock: Callable[[], float] = time.monotonic
  ):
    self._clock, self._end = clock, clock() + seconds

  def left(self) -> float:
    """Returns the seconds that are left, 0 if none are."""
    return max(0.0, self._end - self._clock())

  def share(self, wanted: float) -> float | None:
    """Returns the seconds a row may take, None if it is not to be begun."""
    left = self.left()
    return min(wanted, left) if left >= LEAST else None


@dataclasses.dataclass(frozen=True)
class Job:
  """What a row's process is given, and where it leaves what it finds.

  `save` is called as soon as something is known, so that a row whose time runs
  out has said what it knew.
  """

  workload: str
  steps: int
  tiny: bool
  folder: pathlib.Path
  result: pathlib.Path
  found: dict[str, Any] = dataclasses.field(default_factory=dict)

  def save(self, **found: Any) -> None:
    """Adds to what the row has found and writes all of it."""
    self.found.update(found)
    written = self.result.with_suffix(".part")
    written.write_text(json.dumps(self.found))
    written.replace(self.result)


class Clock:
  """Seconds of steps; `wait` returns when the device has nothing left to do."""

  def __init__(self, job: Job, wait: Callable[[], None]):
    self._job, self._wait, self._walls = job, wait, []

  def begin(self) -> None:
    self._wait()
    self._start = time.perf_counter()

  def end(self) -> None:
    self._wait()
    self._walls.append(time.perf_counter() - self._start)
    self._job.save(first_step=self._walls[0], walls=self._walls[WARM_UP:])


def run(
  command: Sequence[str],
  *,
  environment: Mapping[str, str],
  seconds: float,
  log: pathlib.Path,
) -> int | None:
  """Runs a process and returns its exit code, None if its time ran out."""
  with log.open("w", encoding="utf-8") as out:
    process = subprocess.Popen(
      command,
      env={**os.environ, **environment},
      stdout=out,
      stderr=subprocess.STDOUT,
      # What it starts itself (compilers) is to end with it.
      start_new_session=True,
    )
    try:
      return process.wait(seconds)
    except subprocess.TimeoutExpired:
      return None
    finally:
      _end(process)


def _end(process: subprocess.Popen) -> None:
  """Ends a process's group, if there is any of it left."""
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass
  process.wait()


def outcome(code: int | None, text: str, seconds: float) -> str:
  """Returns in words what became of a process: "" if all went well."""
  if code == 0:
    return ""
  if code is None:
    return f"took longer than its {seconds:.0f} s"
  if any(word in text.upper() for word in _FULL):
    return "does not fit"
  said = [line.strip() for line in text.splitlines() if line.strip()]
  # Behind the error jax may have said how it shortened its traceback.
  errors = [
    line for line in said if re.match(r"[\w.]+(Error|Exception)\b", line)
  ]
  last = (errors or said or [f"code {code}"])[-1]
  return f"ended with an error: {last[:200]}"
