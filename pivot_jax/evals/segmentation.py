"""The segmentation probe on arrays: labels, head training, counts, scores.

What a patch is labelled, how a head learns it from frozen features, what is
counted of its predictions and what the counts say (paper.md 5.2). No encoder,
no data source, no file: those are stages/segment_probe.py's. The arrays of all
images stay in host memory. Legend: N images, H W pixels, P patches, D feature
width, C classes.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Integer

from pivot_jax import sharding, trees
from pivot_jax.models import heads


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The training of the head: AdamW, cosine after a linear warmup.

  `warmup` counts updates. Of the last, incomplete batch of an epoch nothing is
  used, as in the paper.
  """

  batch: int
  epochs: int
  lr: float
  lr_min: float
  warmup: int
  weight_decay: float


class Counts(NamedTuple):
  """Counts per image; every score is a ratio of their sums.

  The first three count patches at threshold 0.5, the last three pixels under
  the patches' best class. `right` counts (patch, class) decisions.
  """

  hits: Int[np.ndarray, "N C"]
  misses: Int[np.ndarray, "N C"]
  false_alarms: Int[np.ndarray, "N C"]
  right: Int[np.ndarray, "N"]
  decisions: Int[np.ndarray, "N"]
  shared: Int[np.ndarray, "N C"]
  predicted: Int[np.ndarray, "N C"]
  true: Int[np.ndarray, "N C"]


def patch_histogram(
  labels: Integer[np.ndarray, "N H W"],
  *,
  patch: int,
  num_classes: int,
  ignore: int | None,
) -> Integer[np.ndarray, "N P C"]:
  """Return how many pixels of each class a patch holds.

  Pixels of the class `ignore`, and those that the patches do not cover (the
  last 6 of 384 at patch 14), count nowhere.
  """
  rows, columns = (size // patch for size in labels.shape[1:])
  patches = np.arange(rows * columns).reshape(rows, columns)
  place = patches.repeat(patch, 0).repeat(patch, 1) * num_classes
  cut = labels[:, : rows * patch, : columns * patch]
  counted = np.ones_like(cut, bool) if ignore is None else cut != ignore
  length = rows * columns * num_classes
  # A patch has fewer than 2**16 pixels; 150 classes make this array large.
  found = np.empty((len(labels), length), np.uint16)
  for index, (one, keep) in enumerate(zip(cut, counted)):
    found[index] = np.bincount((place + one)[keep], minlength=length)
  return found.reshape(len(labels), rows * columns, num_classes)


def patch_targets(
  histogram: Integer[np.ndarray, "N P C"], *, background: int | None
) -> Bool[np.ndarray, "N P C"]:
  """Return the "union" labels of paper.md 5.2.

  A class is set if it occurs in the patch; where more than one occurs, the
  background is not.
  """
  found = histogram > 0
  if background is not None:
    found[..., background] &= found.sum(axis=-1) == 1
  return found


def learning_rate(
  step: Int[Array, ""] | int, recipe: Recipe, total: int
) -> Float[Array, ""]:
  """Return the rate of update `step` (from 0), as timm's cosine schedule.

  Linear from 0 over the warmup; then the cosine, whose clock has been running
  since update 0, down to `lr_min`.
  """
  ramp = recipe.lr * step / max(recipe.warmup, 1)
  wave = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / total, 1.0)))
  cosine = recipe.lr_min + (recipe.lr - recipe.lr_min) * wave
  return jnp.where(step < recipe.warmup, ramp, cosine)


def loss(
  logits: Float[Array, "N P C"],
  targets: Bool[Array, "N P C"],
  valid: Bool[Array, "N P"],
) -> Float[Array, ""]:
  """Return the cross-entropy per class and valid patch, paper.md 5.2."""
  terms = optax.sigmoid_binary_cross_entropy(
    logits.astype(jnp.float32), targets.astype(jnp.float32)
  )
  return (terms.mean(axis=-1) * valid).sum() / jnp.maximum(valid.sum(), 1)


def train_head(
  head: heads.SegmentationHead,
  features: Float[np.ndarray, "N P D"],
  targets: Bool[np.ndarray, "N P C"],
  valid: Bool[np.ndarray, "N P"],
  *,
  recipe: Recipe,
  seed: int,
) -> Iterator[Any]:
  """Yield the head's parameters after each epoch."""
  updates = len(features) // recipe.batch
  optimizer = _optimizer(recipe, updates * recipe.epochs)
  params = head.init(jax.random.key(seed), features[:1])["params"]
  state = optimizer.init(params)
  rng = np.random.default_rng(seed)
  for _ in range(recipe.epochs):
    order = rng.permutation(len(features))
    for update in range(updates):
      rows = order[update * recipe.batch : (update + 1) * recipe.batch]
      batch = features[rows], targets[rows], valid[rows]
      params, state = _step(
        head, recipe, updates * recipe.epochs, params, state, batch
      )
    yield params


def evaluate(
  head: heads.SegmentationHead,
  params: trees.Params,
  features: Float[np.ndarray, "N P D"],
  histogram: Integer[np.ndarray, "N P C"],
  *,
  background: int | None,
  batch: int,
) -> Counts:
  """Return the counts of each image."""
  pieces = []
  for start in range(0, len(features), batch):
    span = slice(start, start + batch)
    logits = predict(head, params, features[span], batch=batch)
    pieces.append(count(logits, histogram[span], background=background))
  return Counts(*map(np.concatenate, zip(*pieces)))


def predict(
  head: heads.SegmentationHead,
  params: trees.Params,
  features: Float[np.ndarray, "N P D"],
  *,
  batch: int,
) -> Float[np.ndarray, "N P C"]:
  """Return the head's float32 logits for at most `batch` images."""
  logits = _apply(head, params, sharding.filled(features, batch))
  return jax.device_get(logits)[: len(features)]


def count(
  logits: Float[np.ndarray, "N P C"],
  histogram: Integer[np.ndarray, "N P C"],
  *,
  background: int | None,
) -> Counts:
  """Return the counts of each image; patches of ignored pixels are skipped."""
  valid = histogram.any(axis=-1)
  truth = patch_targets(histogram, background=background)
  said = (logits > 0) & valid[..., None]
  pixels = histogram.astype(np.int64)
  chosen = logits.argmax(axis=-1)[..., None] == np.arange(logits.shape[-1])
  return Counts(
    hits=(said & truth).sum(axis=1),
    misses=(~said & truth).sum(axis=1),
    false_alarms=(said & ~truth).sum(axis=1),
    right=((said == truth) & valid[..., None]).sum(axis=(1, 2)),
    decisions=valid.sum(axis=1) * logits.shape[-1],
    shared=(pixels * chosen).sum(axis=1),
    predicted=(pixels.sum(axis=-1, keepdims=True) * chosen).sum(axis=1),
    true=pixels.sum(axis=1),
  )


def total(counts: Counts) -> Counts:
  """Return the counts summed over images."""
  return Counts(*(field.sum(axis=0) for field in counts))


def scores(sums: Counts) -> dict[str, np.ndarray]:
  """Return the scores from counts summed over images.

  The fields may have leading axes, of resamples. `macro_recall`, `precision`
  and `f1` are means over the classes that some patch holds (a precision of
  nothing is 0), `miou` over those that some pixel holds; `accuracy` is the
  share of right (patch, class) decisions.
  """
  held = sums.hits + sums.misses
  said = sums.hits + sums.false_alarms
  union = sums.predicted + sums.true - sums.shared
  return {
    "macro_recall": _mean_over(_ratio(sums.hits, held), held > 0),
    "accuracy": _ratio(sums.right, sums.decisions),
    "precision": _mean_over(_ratio(sums.hits, said), held > 0),
    "f1": _mean_over(_ratio(2 * sums.hits, held + said), held > 0),
    "miou": _mean_over(_ratio(sums.shared, union), sums.true > 0),
  }


def by_class(sums: Counts) -> dict[str, Float[np.ndarray, "C"]]:
  """Return recall and IoU of each class, NaN for a class that is not there."""
  held = sums.hits + sums.misses
  union = sums.predicted + sums.true - sums.shared
  recall, iou = _ratio(sums.hits, held), _ratio(sums.shared, union)
  return {
    "recall": np.where(held > 0, recall, np.nan),
    "iou": np.where(sums.true > 0, iou, np.nan),
  }


def pixel_classes(
  logits: Float[np.ndarray, "N P C"], *, patch: int
) -> Int[np.ndarray, "N H W"]:
  """Return the best class of each pixel's patch, for a square grid."""
  side = round(logits.shape[1] ** 0.5)
  grid = logits.argmax(axis=-1).reshape(-1, side, side)
  return grid.repeat(patch, axis=1).repeat(patch, axis=2)


def standard_errors(
  counts: Counts, *, resamples: int, seed: int
) -> dict[str, float]:
  """Return each score's bootstrap standard error over images."""
  images = len(counts.right)
  draws = np.random.default_rng(seed).multinomial(
    images, np.full(images, 1 / images), size=resamples
  )
  found = scores(Counts(*(draws @ field for field in counts)))
  return {name: float(x.std(ddof=1)) for name, x in found.items()}


@functools.partial(jax.jit, static_argnums=0)
def _apply(head, params, features):
  return head.apply({"params": params}, features).astype(jnp.float32)


# Model and numbers are arguments, so that the arms share an executable.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(head, recipe, total, params, state, batch):
  features, targets, valid = batch

  def objective(params):
    return loss(head.apply({"params": params}, features), targets, valid)

  gradient = jax.grad(objective)(params)
  updates, state = _optimizer(recipe, total).update(gradient, state, params)
  return optax.apply_updates(params, updates), state


def _optimizer(recipe: Recipe, total: int) -> optax.GradientTransformation:
  """AdamW as torch's: its decay takes in the biases."""
  return optax.adamw(
    lambda step: learning_rate(step, recipe, total),
    weight_decay=recipe.weight_decay,
  )


def _ratio(part, whole):
  return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)


def _mean_over(values, present):
  return _ratio((values * present).sum(axis=-1), present.sum(axis=-1))
