"""Gradient maps: which patches a loss pulls at, and are they the asked-about?

  c.gradcam_dpo = stage("gradcam", inputs=dict(init="@stage2_dpo"), ...)

Reads preference scenes with the mask of the asked-about object, and writes the
maps and the ratios of evals/gradients.py; it trains nothing. Chosen and rejected
are laid out as two examples with an image encoding each, so that the chosen
branch and the total are both seen. The number uses the raw map, the pictures a
cleaned one. Legend: H W pixels, P patches.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from pivot_jax import files, metrics, processes, sharding
from pivot_jax.data import coders, feed, images, opener, packing
from pivot_jax.errors import InputError
from pivot_jax.evals import gradients
from pivot_jax.models import layers
from pivot_jax.training import loop
from pivot_jax.weights import checkpoint

# Parts that the model must have; looked for before anything runs.
NEEDS = (*checkpoint.PARTS, "tokenizer")


class Scene(NamedTuple):
  """One question laid out as three examples, and where its object is.

  `place` is the row's number in the source.
  """

  place: int
  row: Mapping[str, Any]
  examples: tuple[packing.Example, packing.Example, packing.Example]
  mask: Bool[np.ndarray, "H W"]
  share: Float[np.ndarray, "P"]


@runtime_checkable
class Rows(Protocol):
  """Rows by index, and their names for messages."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Mapping[str, Any]: ...

  def name(self, index: int) -> str: ...


def run(
  config: ConfigDict, inputs: Mapping[str, str], out: pathlib.Path
) -> dict[str, Any]:
  """Measure the gradient maps of `inputs["init"]` on preference scenes.

  Rows need `object_mask`; those with an empty mask are skipped. Returns by
  "TAP/LOSS" (encoder, projector; sft, dpo_chosen, dpo_total) the mean ratio
  with its standard error, and `scenes` and `without_object`. Writes
  `values.npz` (`id`, `kind`, `mask_share` and per "TAP/LOSS" the ratios),
  `maps.npz` (of a few scenes `images`, `masks`, and per "TAP/LOSS" the raw
  maps [K, g, g] and, under "picture/TAP/LOSS", the cleaned) and
  `examples.json` (their texts).
  """
  compute = layers.Compute(**config.compute.to_dict())
  model = checkpoint.load_model(inputs["init"], needs=NEEDS, compute=compute)
  source = opener.open_source(config.sources[config.data].to_dict())
  mesh = sharding.make_mesh(config.mesh)
  share = feed.Share.of(mesh)
  scenes, spare = read_scenes(config, model, source, share)
  with jax.set_mesh(mesh), layers.logical_rules(sharding.ACTIVATION_RULES):
    maps = _all_maps(config, model, scenes or spare, mesh)
  maps = {name: values[: len(scenes)] for name, values in maps.items()}
  columns, ratios = _columns(scenes, maps, share)
  shown = _examples(scenes, maps, share, config.examples)
  if processes.first():
    files.make_folder(out)
    files.save_arrays(out / "values.npz", columns | ratios, compressed=True)
    _write_examples(out, *shown, config.seed)
  measured = {name: gradients.mean_and_error(x) for name, x in ratios.items()}
  found = len(columns["id"])
  return measured | {"scenes": found, "without_object": len(source) - found}


def _columns(
  scenes: Sequence[Scene], maps: Mapping[str, np.ndarray], share: feed.Share
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Return what is kept of each scene of all processes, and its ratios.

  Both in the order of the source.
  """
  patches = next(iter(maps.values())).shape[1]
  masks = np.array([scene.share for scene in scenes]).reshape(-1, patches)
  told = [[s.place, s.row["id"], s.row["kind"]] for s in scenes]
  rows = sum(share.of_all("scenes", told), [])
  order = sorted(range(len(rows)), key=lambda i: rows[i][0])

  def gathered(own: np.ndarray) -> np.ndarray:
    return share.rows_of_all(own)[order]

  columns = {
    "id": np.array([rows[i][1] for i in order]),
    "kind": np.array([rows[i][2] for i in order]),
    "mask_share": gathered(masks.mean(axis=1)),
  }
  return columns, {
    name: gathered(gradients.localisation(values, masks))
    for name, values in maps.items()
  }


def read_scenes(
  config: ConfigDict,
  model: checkpoint.Model,
  source: Rows,
  share: feed.Share = feed.WHOLE,
) -> tuple[list[Scene], list[Scene]]:
  """Return the scenes with an object of a share, and one for want of any.

  The supervised example has the answer's tokens as targets; those of DPO are
  the answer's by the config's mask, as in training.
  """
  coder = coders.coder_of(
    config.to_dict(),
    model.tokenizer,
    image_size=model.mllm.vision.image_size,
  )
  supervised = dataclasses.replace(coder, pairs=False, mask="answer")
  vision = model.mllm.vision
  grid = gradients.grid_size(vision.num_patches)
  cell = _cell(config, vision, grid)
  batch = -(-config.batch // share.count) * share.count
  own = [
    start + place
    for start in range(0, len(source), batch)
    for place in share.of_batch(min(batch, len(source) - start), batch)
  ]
  found, spare = list[Scene](), list[Scene]()
  # A share behind the end of a short source lays out its first row.
  for index in own or [0]:
    processes.beat("reading row", index)
    row = source[index]
    try:
      mask = _object_mask(row, coder)
      examples = _lay_out(row, supervised, coder)
    except InputError as error:
      raise InputError(f"{source.name(index)}: {error}") from error
    inside = gradients.patch_share(mask, patch=cell, grid=grid)
    scene = Scene(index, row, examples, mask, inside)
    spare = spare or [scene]
    if inside.any() and own:
      found.append(scene)
  if not any(processes.exchange("number of scenes", len(found))):
    raise InputError(f"{config.name}: no row of {config.data} has an object")
  return found, spare


def _cell(config, vision, grid: int) -> int:
  """Return the pixels of a side of a feature, which may not be a patch."""
  if not vision.feature_tokens:
    return vision.patch_size
  if vision.image_size % grid:
    raise InputError(
      f"{config.name}: {vision.feature_tokens} features do not divide images of"
      f" {vision.image_size} pixels, so maps cannot be laid over masks: choose"
      " another ?tokens= or skip the stage"
    )
  return vision.image_size // grid


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
  """Return the raw maps [B, P] of this process's scenes by "TAP/LOSS".

  All processes compute as many batches as the one with most scenes.
  """
  vision = model.mllm.vision
  shards, share = sharding.row_shards(mesh), feed.Share.of(mesh)
  batch = -(-config.batch // shards) * shards // share.count
  layout = packing.layout_for(
    [[example] for scene in scenes for example in scene.examples],
    patches=vision.num_patches,
    image_size=vision.image_size,
    max_length=config.max_length,
  )
  layout = dataclasses.replace(_common(layout), rows=3 * batch)
  params = sharding.place(model.params, mesh)
  status = metrics.Status(config.name, len(scenes))
  pieces = []
  most = max(processes.exchange("batches", len(scenes)))
  for start in range(0, most, batch):
    slow = 0.0 if start else processes.SLOW
    processes.beat("maps of scenes from", start, allow=slow)
    piece = scenes[start : start + batch]
    # The last batch repeats a scene, so that one executable serves all.
    full = [*piece, *scenes[-1:] * (batch - len(piece))]
    examples = _in_blocks(full, shards // share.count)
    packed = packing.pack_in_order(examples, layout)
    found = gradients.scene_maps(
      model.mllm,
      params,
      sharding.place_rows(packed, mesh),
      beta=config.beta,
      chunk=config.chunk,
      shards=shards,
    )
    host = {k: sharding.own_rows(x, mesh) for k, x in found.items()}
    pieces.append({name: x[: len(piece)] for name, x in host.items()})
    status.show(start + len(piece))
    loop.stop_if_requested(config.name)
  return {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}


def _in_blocks(scenes, shards: int) -> list[packing.Example]:
  """Return the examples of each shard's scenes in three blocks."""
  size = len(scenes) // shards
  found = []
  for first in range(0, len(scenes), size):
    blocks = zip(*(one.examples for one in scenes[first : first + size]))
    found += [example for block in blocks for example in block]
  return found


def _common(layout: packing.Layout) -> packing.Layout:
  """Return the smallest layout that holds those of all processes."""
  everyone = processes.exchange("layout", dataclasses.astuple(layout))
  return packing.Layout(*map(max, zip(*everyone)))


def _examples(
  scenes: Sequence[Scene],
  maps: Mapping[str, np.ndarray],
  share: feed.Share,
  count: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list]:
  """Return pictures, raw maps and texts of the first scenes, of all processes."""
  places = sum(share.of_all("places", [scene.place for scene in scenes]), [])
  shown = sorted(places)[:count]
  own = [i for i, scene in enumerate(scenes) if scene.place in shown]
  fields = ("id", "question", "chosen", "rejected", "category", "kind")
  told = [
    [scenes[i].place, {name: scenes[i].row[name] for name in fields}]
    for i in own
  ]
  rows = sum(share.of_all("texts", told), [])
  order = sorted(range(len(rows)), key=lambda i: rows[i][0])

  def gathered(values: Sequence[np.ndarray]) -> np.ndarray:
    return share.rows_of_all(np.array([values[i] for i in own]))[order]

  pictures = {
    "images": gathered([scene.examples[0].images[0] for scene in scenes]),
    "masks": gathered([scene.mask for scene in scenes]),
  }
  raw = {name: gathered(values) for name, values in maps.items()}
  return pictures, raw, [rows[i][1] for i in order]


def _write_examples(out, arrays, maps, texts, seed: int) -> None:
  """Write images, masks, raw and cleaned maps and the texts of a few scenes."""
  for name, kept in maps.items():
    side = gradients.grid_size(kept.shape[1])
    # The same border cells are replaced in every map of a scene.
    cleaned = [
      gradients.picture(one, rng=np.random.default_rng([seed, index]))
      for index, one in enumerate(kept)
    ]
    arrays[name] = kept.reshape(-1, side, side)
    arrays[f"picture/{name}"] = np.stack(cleaned)
  files.save_arrays(out / "maps.npz", arrays, compressed=True)
  files.write_json(out / "examples.json", texts)
