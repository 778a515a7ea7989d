"""The hook of a training: metrics, rates, checkpoints, and a stop on NaN."""

import logging
import time
import zlib
from typing import Any

import jax

from pivot_jax import cluster, goodput, metrics, processes, trees
from pivot_jax.data import feed, packing
from pivot_jax.models import mllm
from pivot_jax.training import cost, loop, monitor
from pivot_jax.training.train_state import TrainState
from pivot_jax.weights import resumable

LOG = logging.getLogger("pivot_jax")
# Seconds that a rate is measured over.
SPEED_EVERY = 10.0
# Seconds from the notice that a machine is taken away to its end.
_GRACE = 30


class Recorder:
  """Writes metrics, shows progress, commits checkpoints, stops on non-finite.

  Args:
    name: of the stage, for messages.
    saved: the checkpoints; each notes the digest of the rows seen.
    writer: of the metrics.
    state: the state that the run begins with.
    rows: the digest of the rows seen so far, `self.rows` later.
    model: with the sizes that rates are computed from.
    steps: updates of the whole run.
    batch: examples of an update.
    save_every: updates from one checkpoint to the next.
  """

  def __init__(
    self,
    name: str,
    saved: resumable.Resumable,
    writer: metrics.Writer,
    state: TrainState,
    rows: int,
    model: mllm.MLLM,
    *,
    steps: int,
    batch: int,
    save_every: int,
  ):
    self.rows, self._seen = rows, list[feed.Seen]()
    self._name, self._saved, self._writer = name, saved, writer
    self._steps, self._batch, self._save_every = steps, batch, save_every
    self._kept = self._begin = begin = int(state.step)
    self._model, self._trainable = model, list(trees.flatten(state.trainable))
    devices = jax.devices()
    self._meter = monitor.Meter(
      peak=cost.peak_flops(devices[0].device_kind, len(devices))
    )
    self._measured, self._speed = time.monotonic(), ""
    self._status = metrics.Status(name, steps, start=begin)
    # The parts that train, until an update has a gradient of theirs.
    self._unreached = set(state.trainable)
    # When the training went on after a save, and whether its time was judged.
    self._resumed: float | None = None
    self._told = False

  def metrics(
    self, step: int, values: loop.Host, update: feed.Update, wait: float
  ) -> None:
    """Write the metrics of an update; raise NonFiniteError, naming its rows."""
    if values["finite"] < 1:
      self._saved.wait()
      ids = sum(processes.exchange("rows", list(update.ids)), [])
      raise loop.NonFiniteError(
        f"{self._name}: the loss is not finite at step {step} (loss "
        f"{values['losses/total']}, rows {', '.join(ids[:8])}"
        f"{', ...' if len(ids) > 8 else ''}); the checkpoint of step "
        f"{self._kept} is untouched: look at the rows, or start in a new "
        "workdir with a lower learning rate"
      )
    self._seen.append(update.seen)
    self._unreached -= {
      part for part in self._unreached if values[f"grad_norm/{part}"]
    }
    kept = {name: value for name, value in values.items() if name != "finite"}
    self._writer.write(step, kept)
    self._show(step, values["losses/total"], update.work, wait)

  def due(self, step: int) -> bool:
    """Return whether update `step` is followed by a checkpoint."""
    return step % self._save_every == 0

  def state(self, state: TrainState, step: int) -> None:
    """Commit a checkpoint; warn at the first of parts without a gradient."""
    if self._kept == self._begin and self._unreached:
      # No error yet: rows that reach them may be rare, and still to come.
      LOG.warning(
        "%s: the gradient of %s was 0 in every update up to %d: no row has "
        "reached it; if none does to the end, the stage ends in an error",
        self._name,
        " and ".join(sorted(self._unreached)),
        step,
      )
    self._digest_rows()
    began = time.monotonic()
    processes.beat("saving", step, allow=processes.SLOW)
    self._saved.wait()
    self._check_grace(step, began)
    self._saved.save(step, _resumable(state), {"rows": self.rows})
    self._kept, self._resumed = step, time.monotonic()
    goodput.spent("save", self._resumed - began)
    goodput.note("save", stage=self._name, step=step)
    processes.beat("update", step)

  def _check_grace(self, step: int, now: float) -> None:
    """Warn once if a stop would not leave the time for an update and a save."""
    took = self._saved.took()
    if took is None or self._resumed is None or self._told:
      return
    self._told = True
    update = (now - self._resumed) / max(1, step - self._kept)
    grace = cluster.seconds(cluster.environment(), "PIVOT_GRACE", _GRACE)
    if update + took > grace:
      LOG.warning(
        "%s: an update takes %.1f s and a save %.1f s, but a machine that is "
        "taken away leaves %.0f s (PIVOT_GRACE): give save_every=%d or less, so "
        "that little is lost",
        *(self._name, update, took, grace, max(1, self._save_every // 2)),
      )

  def _digest_rows(self) -> None:
    """Add the rows seen since the last time, of all processes, to the digest."""
    everyone = processes.exchange("digests", self._seen)
    for shares in zip(*everyone, strict=True):
      code = feed.digest(feed.Seen(*one) for one in shares)
      self.rows = zlib.crc32(f"{code:08x}".encode(), self.rows)
    self._seen.clear()

  def _show(
    self, step: int, loss: float, seen: packing.Work, wait: float
  ) -> None:
    if step == self._begin + 1:
      # It compiled.
      self._meter.skip()
    else:
      parts = cost.flops_of_update(self._model, self._trainable, seen)
      self._meter.add(
        tokens=seen.tokens,
        examples=self._batch,
        flops=sum(parts.values()),
        wait=wait,
      )
    now = time.monotonic()
    if now - self._measured >= SPEED_EVERY or step == self._steps:
      self._measured, window = now, self._meter.window()
      if window is not None:
        self._writer.write_speed(step, window.metrics())
        self._speed = f" {window}"
    self._status.show(step, f"loss {loss:.3f}{self._speed}")


def resume(
  name: str, saved: resumable.Resumable, state: TrainState
) -> tuple[TrainState, int]:
  """Return the state to go on with, and the digest of the rows it has seen."""
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    _resumable(state),
  )
  began = time.monotonic()
  processes.beat("restoring", allow=processes.SLOW)
  found = saved.restore(target)
  goodput.spent("restore", time.monotonic() - began)
  processes.beat("restored", allow=processes.SLOW)
  if found is None:
    return state, 0
  step, values, note = found
  LOG.info(
    "%s resumes at step %d, example %d", name, step, int(values["examples"])
  )
  return state.replace(**values), note["rows"]


def _resumable(state: TrainState) -> dict[str, Any]:
  return {
    "step": state.step,
    "examples": state.examples,
    "trainable": state.trainable,
    "opt_state": state.opt_state,
    "rng": state.rng,
  }
