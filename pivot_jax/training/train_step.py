"""One jitted update: a loss function and an optimizer become a step.

It knows no objective and no data, only a loss that is a sum over rows.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from pivot_jax import trees
from pivot_jax.data import packing
from pivot_jax.training import losses, train_state
from pivot_jax.training.train_state import TrainState


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

  Kernels are cast to `dtype`, that of the products, once an update. The rows
  are split into `accum` parts that run one after the other; since a loss is a
  sum whose weights cover the whole update, gradients add. Metrics are
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
    trainable = train_state.cast_kernels(state.trainable, dtype)
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
