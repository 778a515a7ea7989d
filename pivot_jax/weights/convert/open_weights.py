"""Published weights at an address: which format, read with which choices."""

import dataclasses
import logging
from typing import Any

import numpy as np

from pivot_jax import addresses
from pivot_jax.errors import InputError
from pivot_jax.weights.convert import big_vision, hf, positions, source, timm

LOG = logging.getLogger("pivot_jax")

_TABLE = "vision/embeddings/position_embedding/embedding"
# How the paper brings images to an encoder whose files do not say
# (paper.md 1.4); SigLIP's publishers differ among themselves.
_FRAMING = {"clip": "crop_bicubic", "dinov2": "crop_bicubic"}


def open_address(address: addresses.Address) -> source.Source:
  """Open `hf:`, `bv:` and `timm:` addresses, their choices applied.

  Raises:
    InputError: as the formats do, or choices that do not go with the weights.
  """
  given = address.options
  choices = {
    field: given[name]
    for name, field in (
      ("feature_layer", "feature_layer"),
      ("final_norm", "final_norm"),
      ("tokens", "feature_tokens"),
    )
    if name in given
  }
  if address.kind == "hf":
    opened = hf.open_folder(address.path, choices=choices)
  elif address.kind == "bv":
    opened = big_vision.open_file(
      address.path, inside=address.inside, choices=choices
    )
  else:
    opened = timm.open_file(address.path, choices=choices)
  if opened.vision is None and given.keys() - {"revision"}:
    raise InputError(
      f"{opened.where}: has no encoder, which the choices are of"
    )
  if "image_size" in given or "positions" in given:
    opened = _resized(opened, given.get("image_size"), given.get("positions"))
  return opened


def framing(opened: source.Source) -> str | None:
  """Return how images are brought to the encoder, None if nobody says.

  A processor for another size than the encoder's keeps its filter; the shortest
  edge is then the encoder's size, as the paper has it for DINOv2.
  """
  vision, known = opened.vision, opened.processor
  if vision is None:
    return None
  if known is None:
    if vision.family in ("vit", "vit_mae"):
      return f"crop_bicubic:{int(vision.image_size / 0.9)}"
    return _FRAMING.get(vision.family)
  if known.size == vision.image_size:
    return known.resample
  plain = known.resample.partition(":")[0]
  LOG.info(
    "%s: its processor makes images of %d pixels, the encoder reads %d: they are"
    " framed by %s",
    *(opened.where, known.size, vision.image_size, plain),
  )
  return plain


def _resized(opened, image_size, method) -> source.Source:
  """The source with its position table resized to another image size."""
  if image_size is None or method is None:
    raise InputError(
      f"{opened.where}: another image size needs both choices, as"
      " ?image_size=378&positions=dinov2 (or big_vision)"
    )
  positions.check_method(method)
  vision = opened.vision
  smaller = dataclasses.replace(vision, image_size=image_size)
  if smaller.grid < 1:
    raise InputError(
      f"{opened.where}: image_size={image_size} is less than a patch of"
      f" {vision.patch_size}"
    )
  LOG.info(
    "%s: positions resized from %d x %d to %d x %d patches, as %s does",
    *(opened.where, vision.grid, vision.grid, smaller.grid, smaller.grid),
    method,
  )

  def table(dtype: Any) -> np.ndarray:
    whole = opened.read(_TABLE, np.float32)
    resized = positions.resize(
      whole, smaller.grid, method=method, class_token=vision.class_token
    )
    return resized.astype(dtype)

  shapes = dict(opened.shapes)
  shapes[_TABLE] = (smaller.positions, vision.hidden_size)
  return dataclasses.replace(
    opened,
    vision=smaller,
    shapes=shapes,
    read=lambda path, dtype: (
      table(dtype) if path == _TABLE else opened.read(path, dtype)
    ),
  )
