"""TrainState, one jitted update and the loop around it.

The loop knows no objective, no data and no file: a loss function, an iterator
of placed batches and hooks are given to it. Frozen parameters are in the state
as they came and are never differentiated.
"""

import pathlib
import signal
import threading
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, no_type_check, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from pivot_jax import sharding, trees
from pivot_jax.data import feed, packing
from pivot_jax.training import losses, monitor

Host = Mapping[str, float]


# Not checked: jax rebuilds it around whatever a tree function gives.
@no_type_check
class TrainState(flax.struct.PyTreeNode):
  """What a run is: the update count, examples seen, parameters, optimizer."""

  step: jax.Array
  examples: jax.Array
  trainable: Any
  frozen: Any
  opt_state: Any
  rng: jax.Array


@runtime_checkable
class Hook(Protocol):
  """What watches a run."""

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
  """Return whether SIGTERM has come."""
  return _STOP.is_set()


def stop_if_requested(name: str) -> None:
  """Raise Stopped if SIGTERM has come; for loops that keep no checkpoint."""
  if stop_requested():
    raise Stopped(f"{name} stopped; the same command runs it again")


def make_state(
  params: trees.Params,
  *,
  trainable: Sequence[str],
  tx: Callable[[Any], optax.GradientTransformation],
  mesh: jax.sharding.Mesh,
  seed: int,
  dtype: str = "float32",
) -> tuple[TrainState, optax.GradientTransformation]:
  """Return the first state, placed on the mesh, and its optimizer.

  `tx` makes the optimizer from the trainable parameters: there is no state for
  what is frozen, whose kernels are held in `dtype`, that of the products. The
  given tree is copied and stays valid.
  """
  inside, outside = trees.split(params, trainable)
  optimizer = tx(inside)
  placed = sharding.place(inside, mesh)
  shapes = jax.eval_shape(optimizer.init, placed)
  opt_shardings = sharding.like_params(shapes, placed, mesh)
  opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(placed)
  zero = sharding.replicated(mesh)
  state = TrainState(
    step=jax.device_put(jnp.zeros((), jnp.int32), zero),
    examples=jax.device_put(jnp.zeros((), jnp.int32), zero),
    trainable=placed,
    frozen=sharding.place(outside, mesh, dtypes=kernel_dtypes(outside, dtype)),
    opt_state=opt_state,
    rng=jax.device_put(jax.random.PRNGKey(seed), zero),
  )
  return state, optimizer


def make_train_step(
  loss_fn: Callable,
  tx: optax.GradientTransformation,
  *,
  accum: int,
  examples: int,
  shardings: PyTree = None,
  dtype: str = "float32",
) -> Callable[[TrainState, packing.Batch], tuple[TrainState, losses.Metrics]]:
  """Return the jitted update; the state is donated.

  Kernels are cast to `dtype`, that of the products, once an update. The rows are split into `accum` parts that run one after the other; since a
  loss is a sum whose weights cover the whole update, gradients add. Metrics are
  (sum, count) pairs over the update, with `losses/total`, `grad_norm` over all
  that trains, `grad_norm/PART` of each part of it (vision, projector, llm) and
  `finite`. A non-finite loss or gradient leaves the state as it was.
  """

  gradients = _gradients(loss_fn, accum, dtype)

  def step_fn(state: TrainState, batch: PyTree):
    rng = jax.random.fold_in(state.rng, state.step)
    (loss, metrics), grads = gradients(state, batch, rng)
    norm = optax.global_norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new, old = (trainable, opt_state), (state.trainable, state.opt_state)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    metrics = metrics | {
      "losses/total": (loss, jnp.ones(())),
      "grad_norm": (norm, jnp.ones(())),
      **_part_norms(grads),
      "finite": (finite.astype(jnp.float32), jnp.ones(())),
    }
    state = state.replace(
      step=state.step + finite,
      examples=state.examples + finite * examples,
      trainable=kept[0],
      opt_state=kept[1],
    )
    return state, metrics

  if shardings is None:
    return jax.jit(step_fn, donate_argnums=0)
  return jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, None))


def _part_norms(grads: Mapping[str, Any]) -> losses.Metrics:
  """Return the norm of each part's gradient, of what trains in it alone."""
  return {
    f"grad_norm/{part}": (optax.global_norm(own), jnp.ones(()))
    for part, own in grads.items()
  }


def _gradients(loss_fn: Callable, accum: int, dtype: str) -> Callable:
  """Return f(state, batch, rng) -> ((loss, metrics), float32 gradients)."""

  def value(trainable, frozen, batch, rng):
    return loss_fn(trees.merge(trainable, frozen), batch, rng)

  grad_fn = jax.value_and_grad(value, has_aux=True)

  def part_fn(trainable, frozen, batch, rng):
    result, grads = grad_fn(trainable, frozen, batch, rng)
    # Of a kernel in bfloat16 the gradient is, too; sums of it are not.
    return result, jax.tree.map(lambda x: x.astype(jnp.float32), grads)

  def whole(state, batch, rng):
    # Outside the loops over parts and layers: there it would be done each time.
    trainable = cast_kernels(state.trainable, dtype)
    if accum == 1:
      return part_fn(trainable, state.frozen, batch, rng)
    parts = _parts(batch, accum)
    shapes = jax.eval_shape(
      part_fn, trainable, state.frozen, _first(parts), rng
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(total, part):
      new = part_fn(trainable, state.frozen, part, rng)
      return jax.tree.map(jnp.add, total, new), None

    return jax.lax.scan(body, zeros, parts)[0]

  return whole


def cast_kernels(params: trees.Params, dtype: str) -> Any:
  """Return the tree with kernels in the dtype of the products they enter.

  The embedding table stays in float32: it is looked up, and its gradient is a
  sum over tokens.
  """
  dtypes = kernel_dtypes(params, dtype)
  return trees.unflatten(
    {p: x.astype(dtypes[p]) for p, x in trees.flatten(params).items()}
  )


def kernel_dtypes(params: trees.Params, dtype: str) -> dict[str, Any]:
  """Return the dtype of each leaf by path: `dtype` for float32 kernels."""

  def of(path: str, held: np.dtype) -> np.dtype:
    cast = path.endswith("/kernel") and held == jnp.float32
    return jnp.dtype(dtype) if cast else held

  flat = trees.flatten(params)
  return {path: of(path, leaf.dtype) for path, leaf in flat.items()}


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
  """Run updates until `num_steps` and returns the last state.

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
    update = next(iterator)
    wait = time.monotonic() - asked
    trace.before(step)
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


def params_of(state: TrainState) -> Any:
  """Return all parameters of a state, trainable and frozen, as one tree."""
  return trees.merge(state.trainable, state.frozen)


def _parts(batch: packing.Batch, accum: int) -> packing.Batch:
  """Return the batch with rows [accum, R/accum], rows staying on their shard.

  Splitting the row axis the other way round and transposing keeps the sharded
  axis major, so that no row moves between devices.
  """

  def part(x):
    if x.shape[0] % accum:
      raise ValueError(f"{x.shape[0]} rows do not divide into {accum} parts")
    # No -1: a text-only batch has no images and a supervised one no pairs.
    shape = (x.shape[0] // accum, accum, *x.shape[1:])
    return jnp.swapaxes(x.reshape(shape), 0, 1)

  return jax.tree.map(part, batch)


def _first(parts):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts
  )
