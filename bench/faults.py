"""Faults of one of two processes: what they are, and how they end the others.

A training of two processes on this machine is disturbed; measured are the
seconds until all that are left have ended.
"""

import dataclasses
import itertools
import pathlib
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench import verdict
from bench.joined import runs

PROCESSES = 2
# The update at which a fault comes, and the example that is read for about it.
_UPDATE, _EXAMPLE = 7, 120
_PAUSE = 0.2
_WATCHDOG = 20


@dataclasses.dataclass(frozen=True)
class Fault:
  """A fault of one of two processes.

  `strike` does it and returns when. `codes` are those that the others may end
  with, and it, too, unless it was killed. `most` are the seconds that were
  promised, 0 where none were. `quick` ones are part of --quick.
  """

  name: str
  strike: Callable[[runs.Together], float]
  codes: Sequence[int]
  most: float
  heartbeat: int = 5
  asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  more: Sequence[str] = ()
  apart: bool = False
  killed: int = -1
  since: str = "the signal"
  quick: bool = False


def _signal(number: int, index: int) -> Callable[[runs.Together], float]:
  def strike(run: runs.Together) -> float:
    run.wait_for("update", step=_UPDATE, index=index)
    return run.signal(number, index)

  return strike


def _marked(run: runs.Together) -> float:
  return run.wait_for("fault", index=1)["time"]


def _started(run: runs.Together) -> float:
  return run.began


def _joined(run: runs.Together) -> float:
  return run.wait_for("joined", index=1)["time"]


def _killed(index: int, heartbeat: int, most: float, **fields: Any) -> Fault:
  return Fault(
    f"SIGKILL of process {index}, heartbeat {heartbeat} s",
    _signal(signal.SIGKILL, index),
    # jax ends a process that lost another by SIGABRT.
    (70, -signal.SIGABRT),
    most,
    heartbeat=heartbeat,
    killed=index,
    **fields,
  )


FAULTS = (
  _killed(1, 100, 110),
  _killed(0, 100, 110),
  _killed(1, 5, 15),
  _killed(0, 5, 15),
  Fault(
    "SIGTERM to process 1",
    _signal(signal.SIGTERM, 1),
    (75,),
    15,
    quick=True,
  ),
  Fault(
    f"the reader of process 1 hangs, watchdog {_WATCHDOG} s",
    _marked,
    (70,),
    60,
    asked={"hang": {"1": _EXAMPLE}},
    more=(f"--config.watchdog={_WATCHDOG}",),
    since="the read that hangs",
  ),
  Fault(
    "process 1 reads a bad row",
    _marked,
    (2,),
    10,
    asked={"fail": {"1": _EXAMPLE}},
    since="that read",
  ),
  Fault(
    "process 1 has another source file",
    _joined,
    (2,),
    10,
    asked={"source": {"1": "other"}},
    since="joining",
  ),
  Fault(
    "process 1 does not see the work folder",
    _joined,
    (2,),
    70,
    apart=True,
    since="joining",
  ),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The end of a run: seconds until all had ended, their codes, a line.

  `right` says whether all that were left ended with a code that was promised.
  Where they did not end, there are no codes.
  """

  name: str
  seconds: float
  codes: tuple[int, ...]
  said: str
  right: bool


def run(fault: Fault, folder: pathlib.Path, caches: pathlib.Path) -> Outcome:
  """Return the end of one run that is disturbed."""
  place = folder / str(time.monotonic_ns())
  with runs.Together(
    place / "run",
    PROCESSES,
    lambda index: runs.words(
      place / (f"work{index}" if fault.apart else "work"), "quick", *fault.more
    ),
    asked={"pause": _PAUSE} | dict(fault.asked),
    given={"PIVOT_HEARTBEAT": str(fault.heartbeat)},
    caches=caches,
  ) as running:
    began = fault.strike(running)
    limit = 2 * fault.heartbeat + 100
    try:
      ended = running.end(limit)
    except runs.Hung as error:
      print(error, file=sys.stderr)
      return Outcome(fault.name, limit, (), "", right=False)
  left = [one for n, one in enumerate(ended) if n != fault.killed]
  # The longest: who follows another one repeats its line after its number.
  said = max((runs.last_line(one.said) for one in left), key=len)
  said = re.sub(rf"{place}/work\d?", "WORKDIR", said)
  return Outcome(
    fault.name,
    max(one.time for one in left) - began,
    tuple(one.code for one in ended),
    re.sub(r"process (\d) \([^)]*\)", r"process \1", said),
    all(one.code in fault.codes for one in left),
  )


def table(outcomes: Sequence[Outcome]) -> str:
  """Return the ends, by fault, as a Markdown table."""
  faults = {fault.name: fault for fault in FAULTS}
  head = ["fault", "seconds to the end of all others", "since", "promised"]
  lines = [[*head, "exit codes", "as promised", "said"]]
  for name, group in itertools.groupby(outcomes, lambda x: x.name):
    found, fault = list(group), faults[name]
    # A run that went on to its end says nothing of seconds.
    right = [x for x in found if x.right]
    codes = [", ".join(map(str, x.codes)) or "did not end" for x in found]
    lines.append([
      name,
      runs.described([x.seconds for x in right]) if right else "",
      fault.since,
      f"{fault.most:g}",
      " or ".join(dict.fromkeys(codes)),
      f"{len(right)} of {len(found)}",
      (right or found)[0].said or "nothing of ours",
    ])  # fmt: skip
  return verdict.markdown(lines)
