"""Files and PIL images to uint8 pixels, as large as an encoder expects them.

Decoding and resampling are Pillow's on uint8, as in the paper's code; scaling
to [-1, 1] happens on the device. An image file is never trusted: its size is
limited before it is decoded, and a row's path cannot leave the image root. It
knows nothing of rows: errors name the path, and the source adds the row. How
an image is made square is `framing.py`'s.

Axes: H, W height and width in pixels.
"""

import io
import os
import pathlib
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from pivot_jax.data import framing
from pivot_jax.errors import InputError

MAX_PIXELS = 50_000_000
MAX_BYTES = 256 * 2**20
# Decoders of other formats are either unsafe (they start programs) or unused.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM")
SUFFIXES = (
  ".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".ppm", ".pgm",
)  # fmt: skip
# Pillow knows no format by name before its plugin is loaded.
Image.init()

parse_resample = framing.parse_resample
resize = framing.resize
resize_labels = framing.resize_labels

_UNREADABLE = (
  OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError,
  OverflowError, struct.error, zlib.error, MemoryError,
  Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def resolve(root: str | os.PathLike, relative: str) -> pathlib.Path:
  """Returns the file `relative` names inside `root`, and only there.

  Raises:
    InputError: an absolute path, a URL, `..`, a symbolic link that leads out
      of `root`, or no such file.
  """
  if not isinstance(relative, str) or not relative or "\0" in relative:
    raise InputError(f"image: {relative!r} is not a path")
  if "://" in relative or relative.startswith("data:"):
    raise InputError(
      f"image: {relative!r} is a URL; download it into the image root"
    )
  # Both kinds of path, so that a data set means the same on every system.
  kinds = (pathlib.PurePosixPath(relative), pathlib.PureWindowsPath(relative))
  if any(path.anchor or ".." in path.parts for path in kinds):
    raise InputError(
      f"image: {relative!r} escapes the image root; use a relative path"
    )
  root = pathlib.Path(root)
  path = root / relative
  try:
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
      raise InputError(f"image: {relative!r} escapes the image root by a link")
    found = real.is_file()
  except (OSError, RuntimeError) as error:  # A loop of links, a long name.
    raise InputError(f"image: {path}: {_reason(error)}") from None
  if not found:
    raise InputError(f"image: {path}: no such file")
  return path


def read(
  path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "H W 3"]:
  """Reads an image file as RGB, at its own size.

  Colour is defined for every kind of file: alpha is dropped (the colour below
  it stays), 16-bit grey is scaled to 8 bits and not clipped, of 16-bit colour
  the high byte is kept, CMYK is converted by Pillow without a profile. An EXIF
  rotation is not applied, as in the paper's code; an animation gives its first
  frame.

  Raises:
    InputError: empty, truncated, corrupt, too large, or an unknown format.
  """
  return decode(_read_bytes(path), name=str(path), max_pixels=max_pixels)


def decode(
  data: bytes, *, name: str, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "H W 3"]:
  """Decodes the bytes of an image file; see `read`. `name` is for messages."""
  image = _open(data, name=name, formats=FORMATS, max_pixels=max_pixels)
  return _to_rgb(image, name)


def read_labels(
  path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS
) -> Int32[np.ndarray, "H W"]:
  """Reads a label map: a PNG whose grey values or palette indices are labels.

  Raises:
    InputError: as `read`, or a file whose pixels are not plain indices.
  """
  data = _read_bytes(path)
  image = _open(data, name=str(path), formats=("PNG",), max_pixels=max_pixels)
  if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
    raise InputError(
      f"{path}: a label map must hold one index a pixel (grey or palette PNG),"
      f" not mode {image.mode}"
    )
  # Bytes 24 and 25 of a PNG: bits a sample, colour type. Pillow stretches 2-
  # and 4-bit grey to 0..255, which would turn index 1 into 85 or 17.
  if data[25] == 0 and data[24] in (2, 4):
    raise InputError(
      f"{path}: label maps with {data[24]}-bit grey are ambiguous; save 8 bits"
    )
  return np.asarray(image).astype(np.int32)


def preprocess(
  images: Sequence[Image.Image | np.ndarray], size: int, *, resample: str
) -> UInt8[np.ndarray, "N S S 3"]:
  """Returns the pixels an encoder reads, from images as a program has them.

  Colours are those of `read`: an EXIF rotation is not applied, and an animation
  gives the frame it stands at, the first of a file just opened. Arrays are
  uint8 [H, W, 3]. For images without transparency this is, pixel for pixel,
  what transformers' PIL processors make before they rescale, but for 16-bit
  grey, which Pillow clips at 255. Of transparent pixels transformers 4 keeps
  the colour below, as here, and transformers 5 blends them with white.

  Args:
    resample: see `parse_resample`.

  Raises:
    InputError: an unknown resample, or an image (its place in the list is
      named) that is unreadable, empty, of floats, or no image.
  """
  parse_resample(resample)
  if isinstance(images, Image.Image):
    raise InputError("images: one image is given; give a list of images")
  squares = [
    resize(_pixels(image, f"images[{i}]"), size, resample=resample)
    for i, image in enumerate(images)
  ]
  return np.stack(squares) if squares else np.zeros((0, size, size, 3), "uint8")


class Pictures:
  """Opens the images of a source at the size that the source was given."""

  def __init__(
    self,
    root: str | os.PathLike,
    *,
    image_size: int | None,
    resample: str,
    max_pixels: int,
  ):
    parse_resample(resample)
    self.root = pathlib.Path(root)
    self.size = image_size
    self.resample = resample
    self.max_pixels = max_pixels

  def read(self, relative: str) -> np.ndarray:
    return self.fit(self.read_native(relative))

  def read_native(self, relative: str) -> np.ndarray:
    path = resolve(self.root, relative)
    return read(path, max_pixels=self.max_pixels)

  def fit(self, image: np.ndarray) -> np.ndarray:
    if self.size is None:
      return image
    return resize(image, self.size, resample=self.resample)

  def fit_labels(self, labels: np.ndarray) -> np.ndarray:
    if self.size is None:
      return labels
    return resize_labels(labels, self.size, resample=self.resample)


def _read_bytes(path: str | os.PathLike) -> bytes:
  try:
    with open(path, "rb") as file:
      data = file.read(MAX_BYTES + 1)
  except OSError as error:
    raise InputError(f"{path}: {_reason(error)}") from None
  if not data:
    raise InputError(f"{path}: the image file is empty")
  if len(data) > MAX_BYTES:
    raise InputError(f"{path}: the image file has more than {MAX_BYTES} bytes")
  return data


def _open(
  data: bytes, *, name: str, formats: tuple[str, ...], max_pixels: int
) -> Image.Image:
  """Decodes after looking at the size in the header."""
  try:
    image = Image.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    if width * height > max_pixels:
      raise InputError(
        f"{name}: {width}x{height} pixels are more than {max_pixels};"
        " shrink the image or raise max_pixels"
      )
    image.load()
  except InputError:
    raise
  except Image.UnidentifiedImageError:
    kinds = ", ".join(formats)
    raise InputError(f"{name}: not a readable image ({kinds})") from None
  except _UNREADABLE as error:
    raise InputError(
      f"{name}: cannot decode the image ({len(data)} bytes): {_reason(error)}"
    ) from None
  return image


def _reason(error: BaseException) -> str:
  text = str(error.strerror or error) if isinstance(error, OSError) else None
  return " ".join((text or str(error) or type(error).__name__).split())


def _pixels(
  image: Image.Image | np.ndarray, name: str
) -> UInt8[np.ndarray, "H W 3"]:
  if isinstance(image, np.ndarray):
    shape, wanted = image.shape, image.ndim == 3 and image.shape[-1] == 3
    if not wanted or image.dtype != np.uint8 or not image.size:
      raise InputError(
        f"{name}: an array must be uint8 [H, W, 3], not {image.dtype}"
        f" {list(shape)}"
      )
    return image
  if not isinstance(image, Image.Image):
    raise InputError(
      f"{name}: {type(image).__name__} is neither a PIL image nor an array;"
      " open files by PIL.Image.open"
    )
  if not image.width * image.height:
    raise InputError(f"{name}: the image has no pixels")
  try:
    image.load()
  except _UNREADABLE as error:
    raise InputError(
      f"{name}: cannot decode the image: {_reason(error)}"
    ) from None
  return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> UInt8[np.ndarray, "H W 3"]:
  """Returns the pixels of an image of any mode; `read` defines the colours."""
  if image.mode.startswith("I"):
    return _scale_16_bit(np.asarray(image), name)
  if image.mode == "F":
    raise InputError(
      f"{name}: float pixels (mode F) have no known range; save 8 bits a channel"
    )
  # Pillow warns when a palette with alpha goes to RGB directly.
  if image.mode in ("P", "PA"):
    image = image.convert("RGBA")
  try:
    return np.array(image.convert("RGB"))
  except ValueError:
    raise InputError(
      f"{name}: mode {image.mode} has no conversion to RGB; convert the image"
    ) from None


def _scale_16_bit(grey: np.ndarray, name: str) -> UInt8[np.ndarray, "H W 3"]:
  grey = grey.astype(np.int64)
  if grey.min() < 0 or grey.max() > 65535:
    raise InputError(f"{name}: grey values outside 0..65535")
  # 65535 = 255 * 257: white stays white, and the nearest value is taken.
  grey = ((grey + 128) // 257).astype(np.uint8)
  return np.repeat(grey[:, :, None], 3, axis=2)
