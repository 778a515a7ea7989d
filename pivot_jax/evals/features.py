"""Frozen features: an encoder over the images of a source, batch by batch.

The one reader of features for the probes, which train on what it returns. It
trains nothing and knows no label. Legend: N images, P patches, D feature width.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8
from ml_collections import ConfigDict

from pivot_jax import processes, sharding, trees
from pivot_jax.data import feed, opener
from pivot_jax.errors import InputError
from pivot_jax.models import heads, mllm
from pivot_jax.training import loop

Rows = Sequence[Mapping[str, Any]]


class Batch(NamedTuple):
  """The rows of a batch that this process reads, those of its share.

  There are framed images and labels of them, and features by kind of the whole
  batch, in every process. `places` are the rows' numbers in the source, `name(i)`
  the name of the one at place i of `rows`, for messages.
  """

  rows: Rows
  places: Sequence[int]
  images: UInt8[np.ndarray, "N H W 3"]
  labels: Shaped[np.ndarray, "N ..."]
  features: dict[str, Float[np.ndarray, "N ..."]]
  name: Callable[[int], str]


def read(
  config: ConfigDict,
  spec: Mapping[str, Any],
  model: mllm.MLLM,
  params: trees.Params,
  *,
  encode: Callable[..., dict[str, Array]],
  frame: Callable[..., tuple[np.ndarray, np.ndarray]],
  mesh: jax.sharding.Mesh,
) -> Iterator[Batch]:
  """Yield the batches of a source with features, each process its share.

  Args:
    config: of the stage: its name, batch and resample.
    spec: the source's entry.
    model: with the encoder; an argument of `encode`.
    params: those that `encode` reads.
    encode: jitted (model, params, images) -> features by kind.
    frame: (rows, image_size, resample) -> images and labels.
    mesh: the devices that images are spread over.

  Raises:
    InputError: the source is empty.
  """
  source = opener.open_source(spec)
  if len(source) == 0:
    raise InputError(f"{config.name}: the data {spec} is empty")
  placed = sharding.place(params, mesh)
  share, shards = feed.Share.of(mesh), sharding.row_shards(mesh)
  batch = -(-config.batch // shards) * shards
  side = model.vision.image_size
  for start in range(0, len(source), batch):
    processes.beat("reading rows from", start)
    size = min(batch, len(source) - start)
    places = [start + place for place in share.of_batch(size, batch)]
    rows = [source[index] for index in places]
    images, labels = (
      frame(rows, side, config.resample) if rows else _nothing(side)
    )
    filled = sharding.filled(images, batch // share.count)
    slow = 0.0 if start else processes.SLOW
    processes.beat("encoding images from", start, allow=slow)
    found = encode(model, placed, sharding.place_rows(filled, mesh))
    # Shares are filled one after the other, so that what fills up is last.
    whole = {k: sharding.all_rows(x, mesh)[:size] for k, x in found.items()}
    yield Batch(
      rows,
      places,
      images,
      labels,
      whole,
      lambda place, places=places: source.name(places[place]),
    )
    loop.stop_if_requested(config.name)


def _nothing(side: int) -> tuple[np.ndarray, np.ndarray]:
  """Return no images and no labels, of a share behind the end of a source."""
  return np.zeros((0, side, side, 3), np.uint8), np.zeros(0, np.int32)


# The model is an argument, so that the arms of a recipe share an executable.
@functools.partial(jax.jit, static_argnums=0)
def by_patch(
  model: mllm.MLLM, params: trees.Params, images: UInt8[Array, "N H W 3"]
) -> dict[str, Float[Array, "N P D"]]:
  """Return the encoder's features of each patch, as it gives them."""
  features = model.apply({"params": params}, images, method="encode")
  return {"encoder": features}


@functools.partial(jax.jit, static_argnums=0)
def pooled(
  model: mllm.MLLM, params: trees.Params, images: UInt8[Array, "N H W 3"]
) -> dict[str, Float[Array, "N D"]]:
  """Return float32 means over an image's patches: encoder and projector."""

  def mean(features: Float[Array, "N P D"]) -> Float[Array, "N D"]:
    return features.astype(jnp.float32).mean(axis=1)

  features = model.apply({"params": params}, images, method="encode")
  found = {"encoder": mean(features)}
  if "projector" in params:
    width = params["projector"]["linear_2"]["bias"].shape[0]
    # Not through the model: cut from its LLM, it has no projector of its own.
    projector = heads.Projector(width, model.compute)
    visual = projector.apply({"params": params["projector"]}, features)
    found["projector"] = mean(visual)
  return found
