"""Gradient maps: which patches a loss pulls at, and are they the asked-about?

  c.gradcam_dpo = stage("gradcam", inputs=dict(init="@stage2_dpo"), ...)

For the gradient of the SFT and the DPO loss on the vision features, at the
encoder's output (the paper's text) and the projector's (its code): paper.md
5.3. No training and no activation weighting; the number uses the raw map, the
pictures a cleaned one. Chosen and rejected are laid out as two examples with
an image encoding each, so that the chosen branch and the total are both seen.

A map's scale cancels in the number: beta and the reference model do not matter,
and none is read (the margin is that of a model which is its own reference, 0).
On one model "dpo_chosen" is "sft" up to scale where both have the same target
tokens: what differs between arms is their weights. "dpo_total" is the map of
the difference of the two answers' gradients.

Legend: B scenes, R = 3 B rows, P patches, D width at a tap, M loss positions.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from pivot_jax import files, metrics, sharding, trees
from pivot_jax.data import feed, images, opener, packing
from pivot_jax.errors import InputError
from pivot_jax.models import layers, mllm
from pivot_jax.training import loop, objectives
from pivot_jax.weights import checkpoint


class Gradients(NamedTuple):
  """Per row the summed log-probability and its gradient at the taps."""

  logps: Float[Array, "R"]
  targets: Float[Array, "R"]
  encoder: Float[Array, "R P D"]
  projector: Float[Array, "R P E"]


class Scene(NamedTuple):
  """One question laid out as three examples, and where its object is."""

  row: Mapping[str, Any]
  examples: tuple[packing.Example, packing.Example, packing.Example]
  mask: Bool[np.ndarray, "H W"]
  share: Float[np.ndarray, "P"]


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


def _cell(config, vision, grid: int) -> int:
  """Return the pixels of a side of a feature, which may not be a patch."""
  if not vision.feature_tokens:
    return vision.patch_size
  if vision.image_size % grid:
    raise InputError(
      f"{config.name}: {vision.feature_tokens} features do not divide images of"
      f" {vision.image_size} pixels, so maps cannot be laid over masks: choose"
      " another ?tokens= or leave the stage out"
    )
  return vision.image_size // grid


def grid_size(patches: int) -> int:
  """Return the side of a square grid of patches, of at least 3."""
  side = round(patches**0.5)
  if side * side != patches or side < 3:
    raise ValueError(f"{patches} patches are not a square grid of 3 or more")
  return side


def run(
  config: ConfigDict, inputs: Mapping[str, str], out: pathlib.Path
) -> dict[str, Any]:
  """Measure the gradient maps of `inputs["init"]` on preference scenes.

  Rows need `object_mask`; those with an empty mask are left out. Returns by
  "TAP/LOSS" (encoder, projector; sft, dpo_chosen, dpo_total) the mean ratio
  with its standard error, and `scenes` and `without_object`. Writes
  `values.npz` (`id`, `kind`, `mask_share` and per "TAP/LOSS" the ratios),
  `maps.npz` (of a few scenes `images`, `masks`, and per "TAP/LOSS" the raw
  maps [K, g, g] and, under "picture/TAP/LOSS", the cleaned) and
  `examples.json` (their texts).
  """
  compute = layers.Compute(**config.compute.to_dict())
  model = checkpoint.load_model(
    inputs["init"], needs=(*checkpoint.PARTS, "tokenizer"), compute=compute
  )
  source = opener.open_source(config.sources[config.data].to_dict())
  scenes, empty = read_scenes(config, model, source)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh), layers.logical_rules(sharding.ACTIVATION_RULES):
    maps = _all_maps(config, model, scenes, mesh)
  share = np.stack([scene.share for scene in scenes])
  ratios = {name: localisation(values, share) for name, values in maps.items()}
  out.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(
    out / "values.npz",
    id=np.array([scene.row["id"] for scene in scenes]),
    kind=np.array([scene.row["kind"] for scene in scenes]),
    mask_share=share.mean(axis=1),
    **ratios,
  )
  _write_examples(out, scenes[: config.examples], maps, config.seed)
  measured = {name: mean_and_error(x) for name, x in ratios.items()}
  return measured | {"scenes": len(scenes), "without_object": empty}


def read_scenes(config, model, source) -> tuple[list[Scene], int]:
  """Return the scenes with an object, and the number of those without.

  The supervised example has the answer's tokens as targets; those of DPO are
  the answer's by the config's mask, as in training.
  """
  coder = feed.Coder(
    tokenizer=model.tokenizer,
    template=config.template,
    mask=config.mask,
    pairs=True,
    image_size=model.mllm.vision.image_size,
    resample=config.resample,
  )
  supervised = dataclasses.replace(coder, pairs=False, mask="answer")
  vision = model.mllm.vision
  grid = grid_size(vision.num_patches)
  cell = _cell(config, vision, grid)
  found = []
  for index in range(len(source)):
    row = source[index]
    try:
      mask = _object_mask(row, coder)
      examples = _lay_out(row, supervised, coder)
    except InputError as error:
      raise InputError(f"{source.name(index)}: {error}") from error
    share = patch_share(mask, patch=cell, grid=grid)
    if share.any():
      found.append(Scene(row, examples, mask, share))
  if not found:
    raise InputError(f"{config.name}: no row of {config.data} has an object")
  return found, len(source) - len(found)


def _object_mask(row, coder) -> Bool[np.ndarray, "H W"]:
  """Return the mask of the asked-about object, framed as the encoder's image."""
  if "object_mask" not in row:
    raise InputError("'object_mask': the row has no such field")
  if row["image"] is None:
    raise InputError("'image': none, so there is nothing to differentiate")
  mask, shape = row["object_mask"], row["image"].shape[:2]
  if mask.shape != shape:
    raise InputError(f"'object_mask': {mask.shape} for an image of {shape}")
  if shape == (coder.image_size,) * 2:
    return mask
  labels = mask.astype(np.int32)
  return (
    images.resize_labels(labels, coder.image_size, resample=coder.resample) > 0
  )


def _lay_out(row, supervised, coder) -> tuple[packing.Example, ...]:
  """Return the chosen answer twice and the rejected one, an image each."""
  images = coder.pixels(row["image"])
  pair = coder.encode(row)
  alone = [
    pair._replace(answers=(tokens,), answer_targets=(targets,))
    for tokens, targets in zip(pair.answers, pair.answer_targets)
  ]
  return tuple(
    packing.Example(id=row["id"], images=images, **encoded._asdict())
    for encoded in (supervised.encode(row), *alone)
  )


def _all_maps(config, model, scenes, mesh) -> dict[str, np.ndarray]:
  """Return the raw maps [B, P] of all scenes by "TAP/LOSS"."""
  vision = model.mllm.vision
  shards = sharding.row_shards(mesh)
  batch = -(-config.batch // shards) * shards
  layout = packing.layout_for(
    [[example] for scene in scenes for example in scene.examples],
    patches=vision.num_patches,
    image_size=vision.image_size,
    max_length=config.max_length,
  )
  layout = dataclasses.replace(layout, rows=3 * batch)
  params = sharding.place(model.params, mesh)
  status = metrics.Status(config.name, len(scenes))
  pieces = []
  for start in range(0, len(scenes), batch):
    piece = scenes[start : start + batch]
    # The last batch repeats a scene, so that one executable serves all.
    full = [*piece, *piece[-1:] * (batch - len(piece))]
    blocks = zip(*(scene.examples for scene in full))
    examples = [example for block in blocks for example in block]
    packed = packing.pack_in_order(examples, layout)
    found = _scene_maps(
      model.mllm,
      params,
      sharding.place_rows(packed, mesh),
      beta=config.beta,
      chunk=config.chunk,
    )
    host = jax.device_get(found)
    pieces.append({name: x[: len(piece)] for name, x in host.items()})
    status.show(start + len(piece))
    loop.stop_if_requested(config.name)
  return {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}


# Model and numbers are arguments, so that the arms share an executable.
@functools.partial(jax.jit, static_argnums=0, static_argnames=("beta", "chunk"))
def _scene_maps(model, params, batch, *, beta, chunk):
  gradients = row_gradients(model, params, batch, chunk=chunk)
  margin = jnp.zeros(len(gradients.logps) // 3)
  return loss_maps(gradients, margin, beta=beta)


def _write_examples(out, scenes: Sequence[Scene], maps, seed: int) -> None:
  """Write images, masks, raw and cleaned maps and the texts of a few scenes."""
  arrays = {
    "images": np.stack([scene.examples[0].images[0] for scene in scenes]),
    "masks": np.stack([scene.mask for scene in scenes]),
  }
  for name, values in maps.items():
    kept = values[: len(scenes)]
    side = grid_size(kept.shape[1])
    # The same border cells are replaced in every map of a scene.
    cleaned = [
      picture(one, rng=np.random.default_rng([seed, index]))
      for index, one in enumerate(kept)
    ]
    arrays[name] = kept.reshape(-1, side, side)
    arrays[f"picture/{name}"] = np.stack(cleaned)
  np.savez_compressed(out / "maps.npz", **arrays)
  fields = ("id", "question", "chosen", "rejected", "category", "kind")
  texts = [{name: scene.row[name] for name in fields} for scene in scenes]
  files.write_json(out / "examples.json", texts)
