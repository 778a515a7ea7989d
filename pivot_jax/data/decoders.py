"""Decoders of JPEG files by name; but for the default they decode smaller.

`pil`, the default, is exact: the pixels of the paper's code. The others let
libjpeg-turbo decode a JPEG at 1/2, 1/4 or 1/8 of its size, never below the size
the encoder reads, and Pillow's resize does the rest: `pil_draft` in Pillow's
draft mode, `simplejpeg` by the optional package of that name. Both give the
same pixels. JPEGs that are not at least twice as large as is needed, CMYK JPEGs
and other formats have the pixels of `pil` with any decoder; so has a damaged
JPEG that simplejpeg refuses. A file is readable by all decoders or by none,
with the same message.

A JPEG that is decoded smaller is sharper than `pil`'s. On 160 photographs of
480x360 (CamVid) its values differ from `pil`'s by 0.6 to 1.8 of 255 in the
mean, by 54 at most, 37 to 48 dB; most where it is decoded at just the size
needed. A resample that scales to a larger edge than it keeps (crop_bicubic:178
at 160) differs by 2.3, 68 and 35 dB. Nothing gets brighter or moves: the mean
difference is below 0.3, and what is rounded up to a whole pixel is cut off.

This file knows neither paths nor messages (`images.py`), nor what size is
needed (`framing.py`).
"""

import types

from PIL import Image

from pivot_jax.errors import InputError

NAMES = ("pil", "pil_draft", "simplejpeg")


def check(decoder: str) -> None:
  """Raise InputError for an unknown decoder, or one that is not installed."""
  if decoder not in NAMES:
    raise InputError(f"decoder={decoder!r} is none of {', '.join(NAMES)}")
  if decoder == "simplejpeg":
    _simplejpeg()


def can_shrink(image: Image.Image) -> bool:
  """Return whether an opened file is a JPEG that may be decoded smaller."""
  # MPO is a JPEG with others behind it; the first is the picture.
  return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


def shrink(
  image: Image.Image, data: bytes, *, decoder: str, times: int
) -> tuple[Image.Image, int]:
  """Return a JPEG as an image 2, 4 or 8 `times` smaller, its sides rounded up.

  Args:
    image: the file `data` as Pillow opened it, and not yet loaded.

  Returns:
    An image, loaded or not, and how many times smaller it is: once, if it is up
    to Pillow what becomes of the file.
  """
  width, height = image.size
  if decoder == "pil_draft":
    image.draft(None, (width // times, height // times))
    return image, times
  package = _simplejpeg()
  try:
    # A size that nobody has limited must not be decoded.
    if package.decode_jpeg_header(data)[:2] != (height, width):
      return image, 1
    pixels = package.decode_jpeg(
      data,
      # Of its sizes it takes the smallest that is no smaller than these.
      min_height=-(-height // times),
      min_width=-(-width // times),
      strict=True,
    )
  except ValueError:
    return image, 1
  return Image.fromarray(pixels), times


def _simplejpeg() -> types.ModuleType:
  try:
    import simplejpeg
  except ImportError:
    raise InputError(
      "decoder='simplejpeg' needs a package; install it:"
      ' pip install "pivot_jax[fast-images]"'
    ) from None
  return simplejpeg
