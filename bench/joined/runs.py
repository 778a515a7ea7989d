"""Starts the processes of a run on this machine, and sees how they end."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bench import harness

_RECIPE = pathlib.Path(__file__).with_name("recipe.py")
_LOOK = 0.02
# What heads a page of --quick.
TOY = (
  "**Toy sizes**, a model of under 50,000 parameters: that this ran is all the"
  " page says."
)

Mark = Mapping[str, Any]


class Hung(Exception):
  """A wait that was in vain; with the end of each log."""


@dataclasses.dataclass(frozen=True)
class Ended:
  """The end of a process: its exit code, when, and what it had said."""

  code: int
  time: float
  said: str


def words(workdir: pathlib.Path, name: str, *more: str) -> list[str]:
  """Return the words of a training of the recipe of a name."""
  return [
    *("-m", "bench.joined.driven", f"--config={_RECIPE}:{name}"),
    *(f"--workdir={workdir}", *more),
  ]


def free_port() -> int:
  """Return a port that nobody listens on."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


class Together:
  """Processes of one run; those that are left are killed when it is closed.

  Args:
    folder: of logs, marks and the cache of compiled code; anew for each run.
    count: of processes.
    said: words after the interpreter, by the number of the process.
    asked: of `driven`, beside its marks.
    given: variables of all.
    caches: the folder of compiled code.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    count: int,
    said: Callable[[int], Sequence[str]],
    *,
    asked: Mapping[str, Any] | None = None,
    given: Mapping[str, str] | None = None,
    caches: pathlib.Path | None = None,
  ):
    folder.mkdir(parents=True)
    self._folder, self.count = folder, count
    told = json.dumps({"marks": str(folder / "marks."), **(asked or {})})
    environment = harness.cpu_only(folder) | {"BENCH_ASKED": told}
    if caches is not None:
      environment["JAX_COMPILATION_CACHE_DIR"] = str(caches)
    address = f"127.0.0.1:{free_port()}"
    self.began = time.time()
    self.running: list[subprocess.Popen[bytes]] = []
    for index in range(count):
      spec = f"{address},{count},{index}" if count > 1 else "none"
      with open(self._log(index), "wb") as log:
        self.running.append(
          subprocess.Popen(
            [sys.executable, *said(index), f"--processes={spec}"],
            env={**os.environ, **environment, **(given or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
          )
        )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for one in self.running:
      if one.poll() is None:
        one.kill()
      one.wait()

  def _log(self, index: int) -> pathlib.Path:
    return self._folder / f"log.{index}"

  def marks(self, index: int) -> list[Mark]:
    """Return what a process has marked so far."""
    path = self._folder / f"marks.{index}"
    if not path.exists():
      return []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]

  def wait_for(
    self,
    what: str,
    *,
    step: int = -1,
    index: int = 0,
    seconds: float = 300,
    also: Callable[[], bool] = lambda: True,
  ) -> Mark:
    """Return the first mark of a name and of at least `step`, when it is there."""
    until = time.monotonic() + seconds
    while True:
      for one in self.marks(index):
        if one["what"] == what and one["step"] >= step and also():
          return one
      self._check(until, f"{what!r} of process {index}", index)
      time.sleep(_LOOK)

  def _check(self, until: float, what: str, index: int) -> None:
    ended = self.running[index].poll() is not None
    if ended or time.monotonic() > until:
      raise Hung(f"{what} never came:\n{self.logs()}")

  def logs(self) -> str:
    """Return the end of what each process has said."""
    said = [self.said(index)[-2000:] for index in range(self.count)]
    return "\n--\n".join(said)

  def said(self, index: int) -> str:
    """Return what a process has said."""
    return self._log(index).read_text("utf-8", errors="replace")

  def signal(self, number: int, *indices: int) -> float:
    """Send a signal to some processes, or all; return when."""
    for index in indices or range(self.count):
      self.running[index].send_signal(number)
    return time.time()

  def kill(self, *indices: int) -> float:
    """Kill some processes, or all; return when."""
    return self.signal(signal.SIGKILL, *indices)

  def end(self, seconds: float = 300) -> list[Ended]:
    """Return the end of each process, when all have ended."""
    until = time.monotonic() + seconds
    found: dict[int, float] = {}
    while len(found) < self.count:
      for index, one in enumerate(self.running):
        if index not in found and one.poll() is not None:
          found[index] = time.time()
      if time.monotonic() > until:
        raise Hung(f"a process did not end in {seconds} s:\n{self.logs()}")
      time.sleep(_LOOK)
    return [
      Ended(one.returncode, found[index], self.said(index))
      for index, one in enumerate(self.running)
    ]


def last_line(said: str) -> str:
  """Return the last line that the project wrote: not gloo's, jax's or Python's."""
  lines = re.findall(
    r"^(?![EWFI]\d|\[).*(?:error: | saved at step ).*$", said, re.M
  )
  return lines[-1] if lines else ""


def steps_kept(workdir: pathlib.Path) -> list[int]:
  """Return the steps of checkpoints that are on disk."""
  folder = workdir / "trained" / "checkpoints"
  if not folder.exists():
    return []
  return sorted(int(x.name) for x in folder.iterdir() if x.name.isdecimal())


class Others:
  """The cores that did other work than this command and what it started."""

  cores = 0.0

  def __enter__(self):
    self._began = self._clocks()
    return self

  def __exit__(self, *_):
    wall, own, busy = np.subtract(self._clocks(), self._began)
    self.cores = max(0.0, float((busy - own) / max(wall, 1e-9)))

  @staticmethod
  def _clocks() -> tuple[float, float, float]:
    used = os.times()
    own = used.user + used.system + used.children_user + used.children_system
    return time.monotonic(), own, harness.busy_seconds()


def warned(others: float, allowed: float = 0.1) -> list[str]:
  """Return a line if the machine did other work, or none."""
  if others <= allowed:
    return []
  return [
    f"**Seconds here are those of a busy machine**: other work ran on"
    f" {others:.1f} cores meanwhile. Codes, steps, rows and bytes do not depend"
    " on it."
  ]


def described(values: Sequence[float], digits: int = 1) -> str:
  """Return a median, with the least and the most where there are several."""
  middle, low, high = np.median(values), min(values), max(values)
  if len(values) == 1:
    return f"{middle:.{digits}f}"
  return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
