"""A thread that ends this process with the others, or all that stand still.

One that fails says so, and the others end by its line and exit code. One that
does not move for too long has all of them write their stacks, and the first say
who is behind.
"""

import contextlib
import faulthandler
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax

from pivot_jax import coordination, output

# A peer was lost, or all wait for one that is stuck: the launcher restarts.
EXIT_LOST = 70
# Seconds between looks at what the others say, and for all to leave.
LOOK, _LEAVE = 0.5, 5
# What is done before the process ends at once.
RELEASES: list[Callable[[], None]] = []


def release() -> None:
  """Do what is done before the process ends at once, unless a disk stalls."""
  _in_time(_release)


def _release() -> None:
  for one in RELEASES:
    one()
  for stream in (sys.stdout, sys.stderr):
    stream.flush()


def _in_time(action: Callable[[], None]) -> None:
  """Do what a stalled disk may keep for ever; go on after some seconds."""
  thread = threading.Thread(target=action, daemon=True)
  thread.start()
  thread.join(_LEAVE)


class Watch(threading.Thread):
  """Looks at what the others say, and whether this process still moves."""

  def __init__(self, index: int, count: int, host: str, *, patience: float):
    """Begin to look.

    Args:
      index: of this process, of `count`, on `host`.
      patience: seconds without an answer after which the first is lost.
    """
    super().__init__(name="watch", daemon=True)
    self._index, self._count, self._host = index, count, host
    # What threads of this process wait for that others have to bring.
    self._exchanges: list[str] = []
    self._closed = threading.Event()
    self._beat = ("starting", -1, time.monotonic(), 0.0)
    self._seconds, self._folder = 0.0, pathlib.Path()
    self._fails = False
    # Since when the store does not answer, and for how long it may not.
    self._silent: float | None = None
    self._patience = patience
    self.start()

  def begin(self, seconds: float, folder: pathlib.Path) -> None:
    """End all after `seconds` without a beat; write stacks into a folder."""
    self._folder, self._seconds = folder, seconds

  def beat(self, phase: str, step: int, allow: float) -> None:
    """Take what begins, and the seconds more that it may take."""
    self._beat = (phase, step, time.monotonic(), allow)

  @contextlib.contextmanager
  def waiting(self, phase: str, allow: float) -> Iterator[None]:
    """Be in a phase; the one before begins anew behind it."""
    before = self._beat
    self.beat(phase, -1, allow)
    yield
    self.beat(before[0], before[1], before[3])

  @contextlib.contextmanager
  def exchanging(self, name: str) -> Iterator[None]:
    """Wait, in any thread, for what other processes have to bring."""
    self._exchanges.append(name)
    try:
      yield
    finally:
      self._exchanges.remove(name)

  def close(self) -> None:
    """Look no more."""
    self._closed.set()
    self.join()

  def run(self) -> None:
    """Look until the run ends."""
    while not self._closed.wait(LOOK):
      try:
        failed, stuck = (
          coordination.peek("pivot/failed"),
          coordination.peek("pivot/stuck"),
        )
        self._silent = None
      except jax.errors.JaxRuntimeError:
        self._lost()
        continue
      if self._fails:
        # The main thread is on its way out.
        continue
      if failed is not None:
        self._follow(json.loads(failed))
      elif stuck is not None or self._is_stuck():
        self._stuck()

  def fail(self, message: str, code: int) -> NoReturn:
    """Say that this process ends, and end it when the others know."""
    self._fails = True
    said = dict(index=self._index, host=self._host, message=message, code=code)
    try:
      coordination.put("pivot/failed", json.dumps(said))
    except jax.errors.JaxRuntimeError:
      # Another one was before, or nobody listens any more.
      pass
    self._leave(code)

  def _follow(self, said: Mapping[str, Any]) -> None:
    """End as another process did, with its line."""
    who = f"process {said['index']} ({said['host']}): "
    output.complain(f"{'' if said.get('all') else who}{said['message']}")
    self._leave(said["code"])

  def _leave(self, code: int) -> NoReturn:
    """End the process; the first one after the others, who hear through it."""
    release()
    try:
      coordination.put(f"pivot/left/{self._index}", "")
      until = time.monotonic() + _LEAVE
      if self._index == 0:
        for one in range(1, self._count):
          coordination.get(f"pivot/left/{one}", until - time.monotonic())
        time.sleep(0.2)
    except jax.errors.JaxRuntimeError:
      pass
    os._exit(code)

  def _lost(self) -> None:
    """End when the first process has not answered for a while."""
    now = time.monotonic()
    self._silent = self._silent or now
    if now - self._silent > self._patience:
      output.complain("error: process 0 was lost: start all of them again")
      release()
      os._exit(EXIT_LOST)

  def _is_stuck(self) -> bool:
    _, _, since, allow = self._beat
    over = time.monotonic() - since > self._seconds + allow
    return self._seconds > 0 and over

  def _stuck(self) -> NoReturn:
    """Write the stacks, tell who waits for whom, and end all."""
    phase, step, since, _ = self._beat
    waited = round(time.monotonic() - since)
    try:
      coordination.put("pivot/stuck", "")
    except jax.errors.JaxRuntimeError:
      pass
    said = dict(phase=phase, step=step, waited=waited, host=self._host)
    said["waits"] = bool(self._exchanges) or phase.startswith("waiting")
    try:
      coordination.put(f"pivot/state/{self._index}", json.dumps(said))
      if self._index == 0:
        line = "error: " + _behind(self._states(), self._count)
        told = dict(index=0, host="", message=line, code=EXIT_LOST, all=True)
        coordination.put("pivot/failed", json.dumps(told))
      text = coordination.get("pivot/failed", 2 * _LEAVE)
    except jax.errors.JaxRuntimeError:
      text = None
    own = f"error: process {self._index} is stuck: {_doing(said)}"
    _in_time(self._write_stacks)
    output.complain(json.loads(text)["message"] if text else own)
    self._leave(EXIT_LOST)

  def _states(self) -> dict[int, dict[str, Any]]:
    until = time.monotonic() + _LEAVE
    texts = {
      one: coordination.get(f"pivot/state/{one}", until - time.monotonic())
      for one in range(self._count)
    }
    return {one: json.loads(text) for one, text in texts.items() if text}

  def _write_stacks(self) -> None:
    """Write where all threads of this process are.

    Every process does, whoever is the first: it is what a person asks for.
    """
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      with open(
        self._folder / f"{self._index}.txt", "w", encoding="utf-8"
      ) as file:
        faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
      output.complain(f"{self._folder}: no stacks ({error.strerror})")


def _behind(states: Mapping[int, Mapping[str, Any]], count: int) -> str:
  """Return which process is behind, in what, and where the others wait."""
  silent = [one for one in range(count) if one not in states]
  if silent:
    return f"process {numbers(silent)} does not answer"

  def place(item):
    _, state = item
    # Who waits for another is not behind it.
    return state["waits"], state["step"], item[0]

  ordered = sorted(states.items(), key=place)
  # Of those who are as far, the one that reads keeps the others waiting.
  far = place(ordered[0])[:2]
  reading = [
    x for x in ordered if place(x)[:2] == far and "read" in x[1]["phase"]
  ]
  number, state = (reading or ordered)[0]
  others = [one for one in states if one != number]
  wait = f"; the others wait in {_at(states[others[0]])}" if others else ""
  return f"process {number} ({state['host']}): {_doing(state)}{wait}"


def _at(state: Mapping[str, Any]) -> str:
  step = f" {state['step']}" if state["step"] >= 0 else ""
  return f"{state['phase']}{step}"


def _doing(state: Mapping[str, Any]) -> str:
  return f"{_at(state)} since {state['waited']} s"


def numbers(who: Sequence[int]) -> str:
  """Return the numbers of processes, of many the first."""
  listed = ", ".join(map(str, who[:8]))
  return f"{listed} and {len(who) - 8} more" if len(who) > 8 else listed
