"""Gradients of the losses on the vision features, as maps and as one number.

For the gradient of the SFT and the DPO loss at the encoder's output (the paper's
text) and the projector's (its code): paper.md 5.3. No activation weighting. Not
for reading scenes or writing results: that is stages/gradcam.py.

A map's scale cancels in the number: beta and the reference model do not matter,
and none is read (the margin is that of a model which is its own reference, 0).
On one model "dpo_chosen" is "sft" up to scale where both have the same target
tokens: what differs between arms is their weights. "dpo_total" is the map of
the difference of the two answers' gradients.

Legend: B scenes, R = 3 B rows, P patches, D width at a tap, M loss positions.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from pivot_jax import metrics, trees
from pivot_jax.data import packing
from pivot_jax.errors import InputError
from pivot_jax.models import mllm
from pivot_jax.training import objectives


class Gradients(NamedTuple):
  """Per row the summed log-probability and its gradient at the taps."""

  logps: Float[Array, "R"]
  targets: Float[Array, "R"]
  encoder: Float[Array, "R P D"]
  projector: Float[Array, "R P E"]


def row_gradients(
  model: mllm.MLLM, params: trees.Params, batch: packing.Batch, *, chunk: int
) -> Gradients:
  """Return d(summed log-probability of a row's targets) / d(its features).

  Each row holds one example with one image, so one backward pass gives every
  row its own gradient.
  """
  used = batch.loss_answer >= 0

  def read(projected: Float[Array, "R P E"]):
    values = objectives.logps_from_visual(
      model, params, projected, batch, chunk=chunk
    )
    sums = jnp.where(used, values, 0.0).sum(axis=1)
    return sums.sum(), sums

  features = objectives.features(model, params, batch)
  projected, pull = jax.vjp(
    lambda x: objectives.project(model, params, x, batch), features
  )
  at_projector, logps = jax.grad(read, has_aux=True)(projected)
  (at_encoder,) = pull(at_projector)
  return Gradients(logps, used.sum(axis=1), at_encoder, at_projector)


def loss_maps(
  gradients: Gradients, margin: Float[Array, "B"], *, beta: float
) -> dict[str, Float[Array, "B P"]]:
  """Return the maps sum_d |dL/dA_d| by "TAP/LOSS" of the per-scene losses.

  Rows come in three blocks of B: chosen with the supervised targets, chosen
  and rejected with those of DPO. With s the summed log-probabilities, the SFT
  loss has the gradient -ds/targets and DPO's has
  beta * sigmoid(-margin) * (ds_rejected - ds_chosen), the margin being the
  chosen minus the rejected reward.
  """
  pull = beta * jax.nn.sigmoid(-margin)[:, None, None]
  count = jnp.split(gradients.targets, 3)[0][:, None, None]
  found = {}
  for tap, values in (
    ("encoder", gradients.encoder),
    ("projector", gradients.projector),
  ):
    supervised, chosen, rejected = jnp.split(values.astype(jnp.float32), 3)
    found[f"{tap}/sft"] = magnitude(-supervised / count)
    found[f"{tap}/dpo_chosen"] = magnitude(-pull * chosen)
    found[f"{tap}/dpo_total"] = magnitude(pull * (rejected - chosen))
  return found


# Model and numbers are arguments, so that the arms share an executable.
@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("beta", "chunk", "shards")
)
def scene_maps(
  model: mllm.MLLM,
  params: trees.Params,
  batch: packing.Batch,
  *,
  beta: float,
  chunk: int,
  shards: int = 1,
) -> dict[str, Float[Array, "B P"]]:
  """Return `loss_maps` of a batch for a model that is its own reference.

  The three blocks of rows come once for each of the `shards` that rows are
  spread over, and the scenes shard by shard.
  """
  gradients = row_gradients(model, params, batch, chunk=chunk)
  if shards > 1:
    gradients = Gradients(*(_blocks(x, shards) for x in gradients))
  margin = jnp.zeros(len(gradients.logps) // 3)
  return loss_maps(gradients, margin, beta=beta)


def _blocks(
  rows: Shaped[Array, "R ..."], shards: int
) -> Shaped[Array, "R ..."]:
  """Return rows of shards x 3 blocks as three blocks of all shards."""
  apart = rows.reshape(shards, 3, -1, *rows.shape[1:])
  return jnp.swapaxes(apart, 0, 1).reshape(rows.shape)


def magnitude(gradient: Float[Array, "B P D"]) -> Float[Array, "B P"]:
  """Return the L1 norm over the width, patch by patch."""
  return jnp.abs(gradient).sum(axis=-1)


def patch_share(
  mask: np.ndarray, *, patch: int, grid: int
) -> Float[np.ndarray, "P"]:
  """Return the share of each patch's pixels that a mask [H, W] covers."""
  cut = mask[: grid * patch, : grid * patch].astype(np.float64)
  return cut.reshape(grid, patch, grid, patch).mean(axis=(1, 3)).reshape(-1)


def localisation(
  maps: Float[np.ndarray, "B P"], share: Float[np.ndarray, "B P"]
) -> Float[np.ndarray, "B"]:
  """Return the gradient's share inside the mask over the mask's own share.

  1 is a map that does not look for the object, NaN a map that is zero.
  """
  maps = maps.astype(np.float64)
  everything = maps.sum(axis=1)
  inside = np.divide(
    (maps * share).sum(axis=1),
    everything,
    out=np.full(len(maps), np.nan),
    where=everything > 0,
  )
  return inside / share.mean(axis=1)


def mean_and_error(values: Float[np.ndarray, "B"]) -> metrics.Measured:
  """Return the mean over the finite values with its standard error."""
  kept = values[np.isfinite(values)]
  if not len(kept):
    raise InputError("every gradient map is zero: the weights are not finite")
  error = float(kept.std(ddof=1) / len(kept) ** 0.5) if len(kept) > 1 else None
  return metrics.measured(kept.mean(), len(kept), error)


def picture(
  values: Float[np.ndarray, "P"], *, rng: np.random.Generator
) -> Float[np.ndarray, "g g"]:
  """Return a map as the paper draws it, in 0..1 (paper.md 5.3).

  The border, where transformers keep artefacts, is replaced from one or two
  rows or columns further in, at random for each of its cells; then min-max
  and a power of 1.1.
  """
  raw = values.reshape(grid_size(len(values)), -1)
  last = len(raw) - 1
  cells = np.arange(len(raw))
  found = raw.copy()
  # Every replacement reads the original map, and columns come after rows.
  found[0] = raw[rng.integers(1, 3, len(raw)), cells]
  found[last] = raw[last - rng.integers(1, 3, len(raw)), cells]
  found[:, 0] = raw[cells, rng.integers(1, 3, len(raw))]
  found[:, last] = raw[cells, last - rng.integers(1, 3, len(raw))]
  low, high = found.min(), found.max()
  return ((found - low) / max(high - low, 1e-12)) ** 1.1


def grid_size(patches: int) -> int:
  """Return the side of a square grid of patches, of at least 3."""
  side = round(patches**0.5)
  if side * side != patches or side < 3:
    raise ValueError(f"{patches} patches are not a square grid of 3 or more")
  return side
