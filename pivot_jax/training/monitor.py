"""The speed of a run: rates, waiting, compilations, traces.

Numbers on their way to the status line and `speed.jsonl`. They are no results:
they differ from run to run, so that nothing compares them. How much arithmetic
an update takes is `training/cost.py`'s business.
"""

import dataclasses
import functools
import logging
import pathlib
import re
import resource
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent import futures
from typing import Any, TypeVar

import jax
from jaxtyping import PyTree

from pivot_jax import files, processes
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

_COMPILED = "/jax/core/compile/backend_compile_duration"
# Updates that may compile: the first, and those whose state comes from it.
_SETTLED = 3

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Window:
  """Rates over some updates.

  tokens: useful ones, a second: padding skipped and prompts counted once.
  flops: the least operations that the updates need, a second.
  mfu: the share of the devices' peak that this is; None where the peak is not
    known.
  input_wait: the share of the time in which the loop waited for a batch; the
    devices may still have had work, so that they idled for this long at most.
  memory: bytes, the most that one device held; on a CPU the process.
  """

  updates: int
  seconds: float
  tokens: float
  examples: float
  flops: float
  mfu: float | None
  input_wait: float
  memory: int

  def metrics(self) -> dict[str, float]:
    """Return the numbers that are known, named for a log."""
    fields = dataclasses.asdict(self).items()
    return {f"speed/{k}": v for k, v in fields if v is not None}

  def __str__(self) -> str:
    busy = f"{self.flops / 1e9:.3g} GFLOP/s"
    if self.mfu is not None:
      busy = f"{100 * self.mfu:.1f}% MFU"
    return (
      f"{self.tokens:,.0f} tokens/s {self.examples:,.1f} examples/s {busy} "
      f"input {100 * self.input_wait:.1f}% {self.memory / 2**30:.2f} GiB"
    )


class Meter:
  """Adds updates up and gives the rates since it was last asked."""

  def __init__(
    self, *, peak: float | None, clock: Callable[[], float] = time.monotonic
  ):
    self._peak, self._clock = peak, clock
    self._restart()

  def add(self, *, tokens: int, examples: int, flops: float, wait: float):
    """Add an update that is done, and the seconds its batch was waited for."""
    self._sums = [
      a + b for a, b in zip(self._sums, (1, tokens, examples, flops, wait))
    ]

  def skip(self) -> None:
    """Forget what was added: a window that compiled says nothing of speed."""
    self._restart()

  def window(self) -> Window | None:
    """Return the rates since the last call, None if there was no update."""
    seconds = self._clock() - self._since
    updates, tokens, examples, flops, wait = self._sums
    self._restart()
    if not updates or seconds <= 0:
      return None
    rate = flops / seconds
    return Window(
      updates=int(updates),
      seconds=seconds,
      tokens=tokens / seconds,
      examples=examples / seconds,
      flops=rate,
      mfu=rate / self._peak if self._peak else None,
      input_wait=min(1.0, wait / seconds),
      memory=peak_memory(),
    )

  def _restart(self):
    self._since = self._clock()
    self._sums = [0.0] * 5


def peak_memory() -> int:
  """Return the most bytes held so far: by the first device, else the process."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"]
  # Linux counts in KiB, macOS in bytes.
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def ahead(
  items: Iterator[Item], *, depth: int = 2
) -> Generator[Item, None, None]:
  """Yield the items of an iterator, the next `depth` being made meanwhile.

  They are made one after the other in one thread, so that their order and what
  they raise stay as they are.
  """
  with futures.ThreadPoolExecutor(1, "input") as pool:
    try:
      waiting = [pool.submit(next, items) for _ in range(depth)]
      while True:
        item = waiting.pop(0).result()
        waiting.append(pool.submit(next, items))
        yield item
    except StopIteration:
      return
    finally:
      # What processes exchange while they read, all of them have to come to.
      alone = processes.count() == 1
      pool.shutdown(wait=True, cancel_futures=alone)


@functools.cache
def _compilations() -> list[float]:
  """Return a list that grows by one for everything that jax compiles."""
  seen: list[float] = []

  def listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED:
      seen.append(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  return seen


class CompileWatch:
  """Warns of an update that compiles once compiling should be over."""

  def __init__(self):
    self._updates, self._last = 0, {}

  def call(self, step_fn: Callable, state: PyTree, batch: PyTree) -> Any:
    """Return step_fn(state, batch)."""
    before = len(_compilations())
    shapes = _shapes(batch)
    result = step_fn(state, batch)
    self._updates += 1
    if len(_compilations()) > before and self._updates > _SETTLED:
      LOG.warning(
        "update %d of this run compiled again (%.1f s): %s",
        self._updates,
        sum(_compilations()[before:]),
        _difference(self._last, shapes),
      )
    self._last = shapes
    return result


def _shapes(batch) -> dict[str, str]:
  leaves = jax.tree_util.tree_leaves_with_path(batch)
  return {
    jax.tree_util.keystr(path).strip("."): f"{x.dtype}{list(x.shape)}"
    for path, x in leaves
  }


def _difference(old: dict[str, str], new: dict[str, str]) -> str:
  changed = [
    f"{name or 'batch'} was {old.get(name)} and is {shape}"
    for name, shape in new.items()
    if old.get(name) != shape
  ]
  return "; ".join(changed) or "the batch has the shapes it had"


class Trace:
  """Writes a profile of some updates, for TensorBoard or Perfetto.

  `steps` is "10:13" for the updates 11, 12 and 13, those after the tenth; ""
  writes none.
  """

  def __init__(self, steps: str, folder: pathlib.Path):
    self._first, self._last = window_of(steps)
    self._folder, self._on = folder, False

  def before(self, step: int) -> None:
    """Begin the trace if update step + 1 is its first."""
    if self._first <= step < self._last and not self._on:
      files.make_folder(self._folder)
      jax.profiler.start_trace(self._folder)
      self._on = True

  def after(self, step: int, result: PyTree) -> None:
    """End the trace if update `step` was its last."""
    if self._on and step >= self._last:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    """End a trace that is still written."""
    if self._on:
      jax.profiler.stop_trace()
      LOG.info("profile in %s", self._folder)
    elif self._last:
      LOG.warning(
        "no profile: no update of this run is between %d and %d",
        self._first,
        self._last,
      )
    self._on, self._last = False, 0


def window_of(steps: str) -> tuple[int, int]:
  """Return (first, last) of "first:last", (0, 0) of ""."""
  if not steps:
    return 0, 0
  found = re.fullmatch(r"(\d+):(\d+)", steps)
  if not found or int(found[1]) >= int(found[2]):
    raise InputError(
      f"profile={steps!r}: give the updates between two numbers, as 10:13"
    )
  return int(found[1]), int(found[2])
