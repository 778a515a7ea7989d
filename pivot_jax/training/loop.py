"""The loop around one update: batches in, hooks told, ended by SIGTERM.

The loop knows no objective, no data and no file: a step, an iterator of placed
batches and hooks are given to it.
"""

import pathlib
import signal
import threading
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax

from pivot_jax import goodput, processes
from pivot_jax.data import feed
from pivot_jax.training import losses, monitor
from pivot_jax.training.train_state import TrainState

Host = Mapping[str, float]


@runtime_checkable
class Hook(Protocol):
  """Watches a run."""

  def metrics(
    self, step: int, values: Host, update: feed.Update, wait: float
  ) -> None:
    """See the metrics of update `step`, up to one update late; may raise.

    `wait` is the seconds that the loop waited for the update's batch.
    """
    ...

  def due(self, step: int) -> bool:
    """Return whether `state` is to be called after update `step`."""
    ...

  def state(self, state: TrainState, step: int) -> None:
    """See the state after update `step`, its metrics having been seen."""
    ...


class Stopped(Exception):
  """A run was asked to stop; its state is saved and the command continues it."""


class NonFiniteError(Exception):
  """A loss or gradient was not finite; names the step and the rows."""


_STOP = threading.Event()


def stop_on_sigterm() -> None:
  """Make SIGTERM (preemption) end training after the running update.

  A second SIGTERM ends the process at once.
  """

  def handle(signum: int, frame: types.FrameType | None) -> None:
    del frame
    if _STOP.is_set():
      signal.signal(signum, signal.SIG_DFL)
      signal.raise_signal(signum)
    _STOP.set()

  signal.signal(signal.SIGTERM, handle)


def stop_requested() -> bool:
  """Return whether SIGTERM has come, to this process or to any of several.

  Those stop at the same call: all of them ask equally often.
  """
  return _STOP.is_set() or processes.stop_at()


def stop_if_requested(name: str) -> None:
  """Raise Stopped if SIGTERM has come; for loops that keep no checkpoint."""
  if stop_requested():
    raise Stopped(f"{name} stopped; the same command runs it again")


def fit(
  state: TrainState,
  step_fn: Callable,
  batches: Iterable[feed.Update],
  *,
  num_steps: int,
  hooks: Sequence[Hook],
  should_stop: Callable[[], bool] = lambda: False,
  trace: monitor.Trace | None = None,
) -> TrainState:
  """Run updates until `num_steps` and return the last state.

  Metrics are read one update late, so that the host prepares the next batch
  while the devices work; before a hook is shown the state they are caught up
  with, so that no hook sees the state of an update that went wrong.
  `should_stop` is asked after each update; the last state is shown to hooks.
  `trace` profiles some updates.
  """
  trace = trace or monitor.Trace("", pathlib.Path())
  try:
    return _loop(state, step_fn, batches, num_steps, hooks, should_stop, trace)
  finally:
    trace.close()


def _loop(state, step_fn, batches, num_steps, hooks, should_stop, trace):
  step = int(jax.device_get(state.step))
  pending = None

  def flush():
    if pending is not None:
      at, metrics, update, wait = pending
      host = means(jax.device_get(metrics))
      for hook in hooks:
        hook.metrics(at, host, update, wait)

  iterator, watch = iter(batches), monitor.CompileWatch()
  while step < num_steps:
    asked = time.monotonic()
    processes.beat("reading rows for update", step + 1)
    update = next(iterator)
    wait = time.monotonic() - asked
    goodput.spent("input", wait)
    trace.before(step)
    # The first compiles.
    slow = processes.SLOW if pending is None else 0.0
    processes.beat("update", step + 1, allow=slow)
    state, metrics = watch.call(step_fn, state, update.batch)
    flush()
    step += 1
    trace.after(step, state)
    pending = (step, metrics, update, wait)
    last = step == num_steps or should_stop()
    due = [hook for hook in hooks if last or hook.due(step)]
    if due:
      flush()
      pending = None
      for hook in due:
        hook.state(state, step)
    if last:
      break
  return state


def means(metrics: losses.Metrics) -> dict[str, float]:
  """Return sum / count of every metric that counted anything."""
  return {
    name: float(total) / float(count)
    for name, (total, count) in metrics.items()
    if float(count) > 0
  }
