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

from pivot_jax import sharding, trees
from pivot_jax.data import opener
from pivot_jax.errors import InputError
from pivot_jax.models import heads, mllm
from pivot_jax.training import loop

Rows = Sequence[Mapping[str, Any]]


class Batch(NamedTuple):
  """Some rows of a source: framed images, labels, and features by kind.

  `name(i)` is the name of the row at place i of the batch, for messages.
  """

  rows: Rows
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
  """Yield the rows of a source with their features, in order.

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
  shards = sharding.row_shards(mesh)
  batch = -(-config.batch // shards) * shards
  for start in range(0, len(source), batch):
    rows = [source[i] for i in range(start, min(start + batch, len(source)))]
    images, labels = frame(rows, model.vision.image_size, config.resample)
    on_devices = sharding.place_rows(sharding.filled(images, batch), mesh)
    found = jax.device_get(encode(model, placed, on_devices))
    yield Batch(
      rows,
      images,
      labels,
      {kind: values[: len(rows)] for kind, values in found.items()},
      lambda place, start=start: source.name(start + place),
    )
    loop.stop_if_requested(config.name)


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
