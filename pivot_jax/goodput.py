"""The share of a run's time that was of use: WORKDIR/goodput.jsonl.

A line is written at each start, save, end of a stage and stop, by the first
process: the time, what was reached, and the seconds since the start that went
into compiling, waiting for input, saving and restoring. What a killed run did
after its last line was lost, as the time until it was started again.
"""

import collections
import functools
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from pivot_jax import files
from pivot_jax.errors import InputError

_FILE = "goodput.jsonl"
_COMPILED = "/jax/core/compile/backend_compile_duration"
# Seconds that are no use, by what they went into.
SPENT = ("compile", "input", "save", "restore")
_LARGEST = 2**28


class _Session:
  """The process since its run began to work."""

  def __init__(self):
    self.place: pathlib.Path | None = None
    self.spent: collections.Counter[str] = collections.Counter()
    self.again = 0


_session = _Session()


def begin(workdir: pathlib.Path) -> None:
  """Note the start of a run that has something to do."""
  _listen()
  _session.place, _session.again = workdir / _FILE, 0
  _session.spent.clear()
  note("start")


def is_begun() -> bool:
  """Return whether the start was noted."""
  return _session.place is not None


@functools.cache
def _listen() -> None:
  jax.monitoring.register_event_duration_secs_listener(_compiled)


def _compiled(event: str, duration_secs: float, **_: str | int) -> None:
  if event == _COMPILED:
    spent("compile", duration_secs)


def spent(what: str, seconds: float) -> None:
  """Add seconds that went into one of `SPENT`."""
  _session.spent[what] += seconds


def repeated(updates: int) -> None:
  """Add updates that are done a second time, as a run goes on before them."""
  _session.again += updates


def note(event: str, *, stage: str = "", step: int = -1) -> None:
  """Append a line; nothing where no run began or this process writes nothing.

  Args:
    event: "start", "save", "stage" (finished), "stop" or "end" of the run.
    stage: the stage.
    step: its last update.
  """
  if _session.place is None or not files.writes:
    return
  seconds = {name: round(_session.spent[name], 2) for name in SPENT}
  line = {
    "event": event,
    "time": round(time.time(), 2),
    "stage": stage,
    "step": step,
    "again": _session.again,
  }
  text = json.dumps(line | {"seconds": seconds})
  files.append_text(_session.place, text + "\n")
  if event in ("stop", "end"):
    _session.place = None


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Return the lines of a run, oldest first; half a last one is dropped."""
  path = workdir / _FILE
  if not path.exists():
    return []
  text = files.read_bytes(path, largest=_LARGEST).decode("utf-8", "replace")
  found = []
  for place, line in enumerate(text.splitlines(), 1):
    if line.endswith("}"):
      found.append(files.parse_line(line, f"{path}, line {place}"))
  return found


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Return what of a run's time was of use, in seconds.

  `wall` is the time from each start to the next, or to the last line, without
  that after a run that ended; `useful` what is left of it without `lost` (after
  the last line of a killed run, until the next start) and `SPENT`.

  Raises:
    InputError: a line lacks a field.
  """
  found = dict.fromkeys(("wall", "lost", *SPENT), 0.0)
  found |= {"starts": 0, "again": 0}
  try:
    for line, after in zip(lines, [*lines[1:], None]):
      found["starts"] += line["event"] == "start"
      last = after is None or after["event"] == "start"
      if after is not None and line["event"] != "end":
        gap = max(0.0, after["time"] - line["time"])
        found["wall"] += gap
        found["lost"] += gap if last else 0.0
      if last:
        found["again"] += line["again"]
        for name in SPENT:
          found[name] += line["seconds"][name]
  except (KeyError, TypeError) as error:
    raise InputError(f"{_FILE}: a line lacks {error}: delete it") from error
  bad = found["lost"] + sum(found[name] for name in SPENT)
  found["useful"] = max(0.0, found["wall"] - bad)
  return found
