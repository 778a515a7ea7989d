"""Makes pictures square: squashes, scales and crops, or pads them.

A `resample` setting names the way: Pillow's filters on uint8, and sides rounded
as transformers' processors round them. `images.py` reads files and colours.

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
# centre is cut out, or to be padded; no file may take that much memory.
_MAX_COVERED = 100_000_000
# int(255 * mean) with a mean of 0.5 a channel (paper.md 1.3).
_GREY = (127, 127, 127)


class Resample(NamedTuple):
  """A filter, whether it crops, and the edge it scales to before (or None)."""

  filter: str
  crop: bool
  edge: int | None


def parse_resample(text: str) -> Resample:
  """Read `FILTER` or `crop_FILTER[:EDGE]`, as in "crop_bicubic:248".

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
  """Return whether two settings frame images of `size` pixels alike."""
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
  """Resize to a square of `size` pixels and round to uint8, as Pillow does.

  `bicubic` and `bilinear` ignore the aspect ratio (paper.md 1.3);
  `crop_bicubic` scales the image until it covers `size` and cuts the centre
  out (paper.md 1.4, CLIP); see `parse_resample`. All are antialiased.

  Raises:
    InputError: an unknown resample, an edge below `size`, or an image too
      elongated to be cropped.
  """
  return frame(
    Image.fromarray(image), size, resample=resample, of=image.shape[1::-1]
  )


def resize_labels(
  labels: Int32[np.ndarray, "h w"],
  size: int,
  *,
  resample: str = "bicubic",
) -> Int32[np.ndarray, "S S"]:
  """Resize a label map by nearest pixel, framed as `resize` frames."""
  how = parse_resample(resample)
  image = Image.fromarray(labels)
  return _squash_or_crop(
    image, image.size, (0, 0, *image.size), size, how, Image.Resampling.NEAREST
  )


def pad_square(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
  """Centre an image on a grey square of its longer side (paper.md 1.3).

  An odd pixel of border is below the image, or right of it, as in LLaVA's
  `expand2square`.
  """
  return np.array(_padded(Image.fromarray(image)))


def shrinkage(
  of: tuple[int, int], size: int, *, resample: str, pad: bool = False
) -> int:
  """Return how many times smaller a picture may be decoded before `frame`.

  That is 8, 4, 2 or 1: the most that leaves the picture, of width and height
  `of`, on no side smaller than `frame` makes it there. A picture that is padded
  keeps its edges where they are only if they fall between pixels.
  """
  how = parse_resample(resample)
  least = size if how.edge is None else how.edge
  # Padded, the longer side becomes the square's, and the other goes with it.
  side = max(of) if pad else min(of)
  edges = (*of, *_margins(*of)) if pad else ()
  fits = (
    times
    for times in (8, 4, 2)
    if side >= times * least and not any(edge % times for edge in edges)
  )
  return next(fits, 1)


def frame(
  image: Image.Image,
  size: int,
  *,
  resample: str,
  of: tuple[int, int],
  times: int = 1,
  pad: bool = False,
) -> UInt8[np.ndarray, "S S 3"]:
  """Make an RGB image square; see `resize` for the meaning of `resample`.

  Args:
    of: width and height of the picture. They are `image`'s, but if it was
      decoded `times` smaller, rounded up: all is placed as in the picture, to
      a fraction of a pixel.
    pad: whether to pad as `pad_square` does and then resize.

  Raises:
    InputError: as `resize`.
  """
  how = parse_resample(resample)
  if pad:
    image, of = _padded(image), (max(of), max(of))
  box = (0, 0, of[0] / times, of[1] / times)
  return _squash_or_crop(image, of, box, size, how, _FILTERS[how.filter])


def _margins(width: int, height: int) -> tuple[int, int]:
  side = max(width, height)
  return (side - width) // 2, (side - height) // 2


def _padded(image: Image.Image) -> Image.Image:
  if image.width == image.height:
    return image
  if max(image.size) ** 2 > _MAX_COVERED:
    raise InputError(
      f"an image of {image.width}x{image.height} pixels would be padded to a"
      f" square of {max(image.size)}; skip it, or show it alone"
    )
  square = Image.new("RGB", (max(image.size), max(image.size)), _GREY)
  square.paste(image, _margins(*image.size))
  return square


def _squash_or_crop(
  image: Image.Image,
  of: tuple[int, int],
  box: tuple[float, float, float, float],
  size: int,
  how: Resample,
  kernel: Image.Resampling,
) -> np.ndarray:
  """Frames a picture of size `of`, which is `box` of the image."""
  if not how.crop:
    return np.array(image.resize((size, size), kernel, box))
  edge = size if how.edge is None else how.edge
  if edge < size:
    raise InputError(
      f"resample=crop_{how.filter}:{edge} scales the shortest edge to fewer"
      f" pixels than the {size} of the square; give {size} or more"
    )
  # The long side is rounded down, as in transformers.
  covered = [int(edge * side / min(of)) for side in of]
  if covered[0] * covered[1] > _MAX_COVERED:
    raise InputError(
      f"an image of {of[0]}x{of[1]} pixels would grow to"
      f" {covered[0]}x{covered[1]} before its centre is cut out; skip it"
      " or take a resample without crop_"
    )
  left, top = ((side - size) // 2 for side in covered)
  resized = image.resize(covered, kernel, box)
  return np.array(resized.crop((left, top, left + size, top + size)))
