"""The state of a training: made, placed on the mesh, and read as parameters.

Frozen parameters are in the state as they came and are never differentiated.
"""

from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pivot_jax import sharding, trees


# Not checked: jax rebuilds it around whatever a tree function gives.
@no_type_check
class TrainState(flax.struct.PyTreeNode):
  """The state of a run: update count, examples seen, parameters, optimizer."""

  step: jax.Array
  examples: jax.Array
  trainable: Any
  frozen: Any
  opt_state: Any
  rng: jax.Array


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
  tree that comes in is copied and stays valid.
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


def params_of(state: TrainState) -> Any:
  """Return all parameters of a state, trainable and frozen, as one tree."""
  return trees.merge(state.trainable, state.frozen)


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
