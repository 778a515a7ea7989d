"""How a picture becomes square: squashed, or scaled to cover it and cropped.

Here are the words of a `resample` setting and the pixels they stand for:
Pillow's filters on uint8, and sides rounded as transformers' processors round
them. Files and colours are not known here (`images.py`).

Axes: h, w height and width in pixels; S the side of the square.
"""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from pivot_jax.errors import InputError

_FILTERS = {
  "bicubic": Image.Resampling.BICUBIC,
  "bilinear": Image.Resampling.BILINEAR,
  "lanczos": Image.Resampling.LANCZOS,
}
_NAMES = "|".join(_FILTERS)
_GRAMMAR = re.compile(
  rf"(?P<squash>{_NAMES})|crop_(?P<crop>{_NAMES})(:(?P<edge>[1-9][0-9]{{0,4}}))?"
)
# An image of 1 x 50000 pixels has to grow to thousands of millions before its
# centre is cut out; no file may take that much memory.
_MAX_COVERED = 100_000_000


class Resample(NamedTuple):
  """A filter, whether it crops, and the edge it scales to before (or None)."""

  filter: str
  crop: bool
  edge: int | None


def parse_resample(text: str) -> Resample:
  """Reads `FILTER` or `crop_FILTER[:EDGE]`, as in "crop_bicubic:248".

  A filter alone squashes the image to the square. With `crop_` the shortest
  edge is scaled to EDGE pixels, or to the side of the square without one, and
  the square is cut out of the centre.

  Raises:
    InputError: anything else.
  """
  found = _GRAMMAR.fullmatch(f"{text}")
  if not found:
    names = (*_FILTERS, *(f"crop_{name}" for name in _FILTERS))
    raise InputError(
      f"resample={text!r} is none of {', '.join(names)}; those with crop_ may"
      " give the shortest edge before the crop, as in crop_bicubic:248"
    )
  if found["squash"]:
    return Resample(found["squash"], False, None)
  edge = found["edge"]
  return Resample(found["crop"], True, int(edge) if edge else None)


def same(one: str, other: str, size: int) -> bool:
  """Returns whether two settings frame images of `size` pixels alike."""
  first, second = (parse_resample(text) for text in (one, other))
  return first._replace(edge=first.edge or size) == second._replace(
    edge=second.edge or size
  )


def resize(
  image: UInt8[np.ndarray, "h w 3"],
  size: int,
  *,
  resample: str = "bicubic",
) -> UInt8[np.ndarray, "S S 3"]:
  """Resizes to a square of `size` pixels and rounds to uint8, as Pillow does.

  `bicubic` and `bilinear` ignore the aspect ratio (paper.md 1.3);
  `crop_bicubic` scales the image until it covers `size` and cuts the centre
  out (paper.md 1.4, CLIP); see `parse_resample`. All are antialiased.

  Raises:
    InputError: an unknown resample, an edge below `size`, or an image too
      elongated to be cropped.
  """
  how = parse_resample(resample)
  return _frame(image, size, how, _FILTERS[how.filter])


def resize_labels(
  labels: Int32[np.ndarray, "h w"],
  size: int,
  *,
  resample: str = "bicubic",
) -> Int32[np.ndarray, "S S"]:
  """Resizes a label map by nearest pixel, framed as `resize` frames."""
  how = parse_resample(resample)
  return _frame(labels, size, how, Image.Resampling.NEAREST)


def _frame(array: np.ndarray, size: int, how: Resample, kernel: int):
  if array.shape[:2] == (size, size) and how.edge in (None, size):
    return array.copy()
  image = Image.fromarray(array)
  if not how.crop:
    return np.array(image.resize((size, size), kernel))
  edge = size if how.edge is None else how.edge
  if edge < size:
    raise InputError(
      f"resample=crop_{how.filter}:{edge} scales the shortest edge to fewer"
      f" pixels than the {size} of the square; give {size} or more"
    )
  # The long side is rounded down, as in transformers.
  short = min(image.size)
  covered = [int(edge * side / short) for side in image.size]
  if covered[0] * covered[1] > _MAX_COVERED:
    raise InputError(
      f"an image of {image.width}x{image.height} pixels would grow to"
      f" {covered[0]}x{covered[1]} before its centre is cut out; leave it out"
      " or take a resample without crop_"
    )
  resized = np.array(image.resize(covered, kernel))
  left, top = ((side - size) // 2 for side in covered)
  return resized[top : top + size, left : left + size].copy()
