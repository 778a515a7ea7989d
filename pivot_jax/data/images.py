"""Files and PIL images to uint8 pixels, as large as an encoder expects them.

Decoding and resampling are Pillow's on uint8, as in the paper's code, unless
`pil_draft` is named (`DECODERS`); scaling to [-1, 1] happens on the device. An
image file is never trusted: its size is limited before it is decoded, and a
row's path cannot leave the image root. Errors name the path, and the source
adds the row. `framing.py` makes images square.

Axes: H, W height and width in pixels.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, ImageFile

from pivot_jax.data import framing, rows, wholeness
from pivot_jax.errors import InputError

MAX_PIXELS = 50_000_000
MAX_BYTES = 256 * 2**20
# Decoders of other formats are either unsafe (they start programs) or unused.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM")
SUFFIXES = (
  ".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".ppm", ".pgm",
)  # fmt: skip
# `pil`, the default, is exact: the pixels of the paper's code. `pil_draft` lets
# libjpeg decode a JPEG at 1/2, 1/4 or 1/8 of its size, sides rounded up, never
# below the size the encoder reads, and Pillow's resize does the rest. JPEGs that
# are not at least twice as large as is needed, CMYK JPEGs and other formats have
# the pixels of `pil`. Others are sharper: on 160 photographs of 480x360 (CamVid)
# values differ by 0.6 to 1.8 of 255 in the mean, by 54 at most, 37 to 48 dB; most
# where a JPEG is decoded at just the size needed. A resample that scales to a
# larger edge than it keeps (crop_bicubic:178 at 160) differs by 2.3, 68 and 35
# dB. Nothing gets brighter or moves: the mean difference is below 0.3, and what
# is rounded up to a whole pixel is cut off.
DECODERS = ("pil", "pil_draft")
# Pillow knows no format by name before its plugin is loaded.
Image.init()

parse_resample = framing.parse_resample
resize = framing.resize
resize_labels = framing.resize_labels

_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_UNREADABLE = (
  OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError,
  OverflowError, struct.error, zlib.error, *_BOMB,
)  # fmt: skip


def read(
  path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "H W 3"]:
  """Read an image file as RGB, at its own size.

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
  data: bytes,
  *,
  name: str,
  max_pixels: int = MAX_PIXELS,
  size: int | None = None,
  resample: str = "bicubic",
  decoder: str = "pil",
  pad: bool = False,
) -> UInt8[np.ndarray, "H W 3"]:
  """Decode the bytes of an image file; see `read` for colours and errors.

  Args:
    name: what messages call the image.
    size: side of the square to return, or None for the image's own size.
    resample: see `framing.resize`.
    decoder: see `DECODERS`.
    pad: whether to pad to a square before it is resized, if there is a `size`.
  """
  check_decoder(decoder)
  image, parts = _open(data, name=name, formats=FORMATS, max_pixels=max_pixels)
  of, times = image.size, 1
  # MPO is a JPEG with others behind it; the first is the picture.
  jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
  if size is not None and decoder == "pil_draft" and jpeg:
    times = framing.shrinkage(of, size, resample=resample, pad=pad)
  if times > 1:
    image.draft(None, (of[0] // times, of[1] // times))
  with _refusing(name, len(data), ()):
    wholeness.load(image, data, parts)
  image = _rgb(image, name)
  if size is None:
    return np.array(image)
  return framing.frame(
    image, size, resample=resample, of=of, times=times, pad=pad
  )


def check_decoder(decoder: str) -> None:
  """Raise InputError for a decoder that is none of `DECODERS`."""
  if decoder == "simplejpeg":
    raise InputError(
      "decoder='simplejpeg' is gone; choose 'pil_draft', which gives the same"
      " pixels as fast"
    )
  if decoder not in DECODERS:
    raise InputError(f"decoder={decoder!r} is none of {', '.join(DECODERS)}")


def read_labels(
  path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS
) -> Int32[np.ndarray, "H W"]:
  """Read a label map: a PNG whose grey values or palette indices are labels.

  Raises:
    InputError: as `read`, or a file whose pixels are not plain indices.
  """
  return decode_labels(_read_bytes(path), name=str(path), max_pixels=max_pixels)


def decode_labels(
  data: bytes, *, name: str, max_pixels: int = MAX_PIXELS
) -> Int32[np.ndarray, "H W"]:
  """Decode the bytes of a label map; see `read_labels`."""
  image = _open_labels(data, name=name, max_pixels=max_pixels)
  with _refusing(name, len(data), ()):
    image.load()
  return np.asarray(image).astype(np.int32)


def check_header(
  data: bytes,
  *,
  name: str,
  max_pixels: int = MAX_PIXELS,
  labels: bool = False,
) -> None:
  """Raise what can be known of an image, or label map, from its header."""
  if labels:
    _open_labels(data, name=name, max_pixels=max_pixels)
  else:
    _open(data, name=name, formats=FORMATS, max_pixels=max_pixels)


def preprocess(
  images: Sequence[Image.Image | np.ndarray], size: int, *, resample: str
) -> UInt8[np.ndarray, "N S S 3"]:
  """Return the pixels an encoder reads, from images as a program has them.

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


@dataclasses.dataclass(frozen=True)
class ImageSpec:
  """The form in which a source gives its images.

  image_size: side of the squares, None for each image's own size.
  resample: see `framing.parse_resample`.
  max_pixels: a larger image is refused.
  decoder: see `DECODERS`.

  Raises:
    InputError: an unknown resample or decoder.
  """

  image_size: int | None = None
  resample: str = "bicubic"
  max_pixels: int = MAX_PIXELS
  decoder: str = "pil"

  def __post_init__(self):
    parse_resample(self.resample)
    check_decoder(self.decoder)


# Images at their own size, as their files have them.
AS_THEY_ARE = ImageSpec()


class Pictures:
  """Opens the images of a source, each in the form of its `ImageSpec`.

  Attributes:
    root: the folder that paths are relative to.
    spec: the form.
  """

  def __init__(self, root: str | os.PathLike, spec: ImageSpec = AS_THEY_ARE):
    self.root = pathlib.Path(root)
    self.spec = spec

  def read(self, relative: str) -> np.ndarray:
    return self._read(relative, pad=False)

  def read_many(self, relatives: Sequence[str]) -> list[np.ndarray]:
    """Read the images of a row; of several each is padded to a square."""
    pad = len(relatives) > 1
    return self._held(self._read(one, pad=pad) for one in relatives)

  def read_row(self, image: str | list[str] | None) -> Any:
    """Read what a row shows: nothing, one image, or a list of several."""
    if image is None:
      return None
    several = isinstance(image, list)
    return self.read_many(image) if several else self.read(image)

  def read_native(self, relative: str) -> np.ndarray:
    """Read an image at its own size."""
    path = resolve(self.root, relative)
    return self.decode_native(_read_bytes(path), name=str(path))

  def read_bytes(self, relative: str) -> bytes:
    """Return an image's file as it is on disk."""
    return _read_bytes(resolve(self.root, relative))

  def read_files(self, relatives: Sequence[str]) -> tuple[bytes, ...]:
    """Return the files of a row's images, of `rows.BYTES` at most."""
    found = map(self.read_bytes, relatives)
    return tuple(rows.bounded(found, len, rows.BYTES, "bytes"))

  def decode(self, data: bytes, *, name: str, pad: bool = False) -> np.ndarray:
    """Decode an image's file as `read` does, padded to a square or not."""
    spec = self.spec
    return decode(
      data,
      name=name,
      max_pixels=spec.max_pixels,
      size=spec.image_size,
      resample=spec.resample,
      decoder=spec.decoder,
      pad=pad,
    )

  def decode_row(
    self, files: Sequence[bytes]
  ) -> None | np.ndarray | list[np.ndarray]:
    """Decode the images of a row: none, one, or a list of several.

    Of several each is padded to a square, as `read_many` does.
    """
    if len(files) < 2:
      return self.decode(files[0], name="image") if files else None
    return self._held(
      self.decode(data, name=f"image[{i}]", pad=True)
      for i, data in enumerate(files)
    )

  def decode_native(self, data: bytes, *, name: str) -> np.ndarray:
    """Decode an image's file at its own size."""
    return decode(
      data,
      name=name,
      max_pixels=self.spec.max_pixels,
      decoder=self.spec.decoder,
    )

  def fit_labeled(
    self,
    image: UInt8[np.ndarray, "H W 3"],
    labels: Int32[np.ndarray, "h w"],
    *,
    name: str,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Return an image and its label map at the size of the spec.

    Args:
      image: at its own size.
      labels: as large as the image, which is checked.
      name: the label map's name in messages.
    """
    check_same_size(labels.shape[::-1], image.shape[1::-1], name=name)
    size, resample = self.spec.image_size, self.spec.resample
    if size is None:
      return image, labels
    return (
      resize(image, size, resample=resample),
      resize_labels(labels, size, resample=resample),
    )

  def _held(self, decoded: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Return a row's images, which are held at once."""
    most = rows.IMAGES * self.spec.max_pixels
    return rows.bounded(decoded, lambda x: x.size // 3, most, "pixels")

  def _read(self, relative: str, *, pad: bool) -> np.ndarray:
    path = resolve(self.root, relative)
    return self.decode(_read_bytes(path), name=str(path), pad=pad)


def check_same_size(
  labels: Sequence[int], image: Sequence[int], *, name: str
) -> None:
  """Raise unless a label map is as large as its image, both (W, H)."""
  if tuple(labels) != tuple(image):
    raise InputError(
      f"{name}: the label map is {labels[0]}x{labels[1]} pixels, its image"
      f" {image[0]}x{image[1]}"
    )


def resolve(root: str | os.PathLike, relative: str) -> pathlib.Path:
  """Return the file `relative` names inside `root`, and only there.

  Raises:
    InputError: an absolute path, a URL, `..`, a symbolic link that leads out
      of `root`, or no such file.
  """
  if not isinstance(relative, str) or not relative or "\0" in relative:
    raise InputError(f"image: {relative!r} is not a path", kind="missing_image")
  if "://" in relative or relative.startswith("data:"):
    raise InputError(
      f"image: {relative!r} is a URL; download it into the image root",
      kind="outside_root",
    )
  # Both kinds of path, so that a data set means the same on every system.
  kinds = (pathlib.PurePosixPath(relative), pathlib.PureWindowsPath(relative))
  if any(path.anchor or ".." in path.parts for path in kinds):
    raise InputError(
      f"image: {relative!r} escapes the image root; use a relative path",
      kind="outside_root",
    )
  root = pathlib.Path(root)
  path = root / relative
  try:
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
      raise InputError(
        f"image: {relative!r} escapes the image root by a link",
        kind="outside_root",
      )
    found = real.is_file()
  except (OSError, RuntimeError) as error:  # A loop of links, a long name.
    raise InputError(
      f"image: {path}: {reason(error)}", kind="missing_image"
    ) from None
  if not found:
    raise InputError(f"image: {path}: no such file", kind="missing_image")
  return path


def reason(error: BaseException) -> str:
  """Return the words of an error, in one line."""
  text = str(error.strerror or error) if isinstance(error, OSError) else None
  return " ".join((text or str(error) or type(error).__name__).split())


def _read_bytes(path: str | os.PathLike) -> bytes:
  try:
    with open(path, "rb") as file:
      # Python sets aside all the memory that it is asked to fill.
      size = os.fstat(file.fileno()).st_size
      data = file.read(min(size, MAX_BYTES) + 1)
  except OSError as error:
    raise InputError(f"{path}: {reason(error)}") from None
  if not data:
    raise InputError(f"{path}: the image file is empty")
  if len(data) > MAX_BYTES:
    raise InputError(f"{path}: the image file has more than {MAX_BYTES} bytes")
  return data


def _open(
  data: bytes, *, name: str, formats: tuple[str, ...], max_pixels: int
) -> tuple[ImageFile.ImageFile, wholeness.Jpeg | None]:
  """Read the header alone and look at the size in it."""
  with _refusing(name, len(data), formats):
    parts = wholeness.check(data)
    image = Image.open(io.BytesIO(data), formats=formats)
  width, height = image.size
  if width * height > max_pixels:
    raise InputError(
      f"{name}: {width}x{height} pixels are more than {max_pixels};"
      " shrink the image or raise max_pixels",
      kind="too_many_pixels",
    )
  return image, parts


def _open_labels(data: bytes, *, name: str, max_pixels: int) -> Image.Image:
  """Read the header of a label map, whose pixels must be plain indices."""
  image, _ = _open(data, name=name, formats=("PNG",), max_pixels=max_pixels)
  if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
    raise InputError(
      f"{name}: a label map must hold one index a pixel (grey or palette PNG),"
      f" not mode {image.mode}"
    )
  # Bytes 24 and 25 of a PNG: bits a sample, colour type. Pillow stretches 2-
  # and 4-bit grey to 0..255, which would turn index 1 into 85 or 17.
  if data[25] == 0 and data[24] in (2, 4):
    raise InputError(
      f"{name}: label maps with {data[24]}-bit grey are ambiguous; save 8 bits"
    )
  return image


@contextlib.contextmanager
def _refusing(name: str, length: int, formats: tuple[str, ...]):
  """Turn what Pillow raises about a file of `length` bytes into InputError."""
  try:
    yield
  except Image.UnidentifiedImageError:
    kinds = ", ".join(formats)
    raise InputError(f"{name}: not a readable image ({kinds})") from None
  except _BOMB as error:
    raise InputError(
      f"{name}: cannot decode the image ({length} bytes): {reason(error)}",
      kind="too_many_pixels",
    ) from None
  except _UNREADABLE as error:
    raise InputError(
      f"{name}: cannot decode the image ({length} bytes): {reason(error)}"
    ) from None
  except MemoryError:
    # The machine's fault and not the file's, whose row must not be skipped.
    raise MemoryError(f"{name}: no memory to decode the image") from None


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
      f"{name}: cannot decode the image: {reason(error)}"
    ) from None
  return np.array(_rgb(image, name))


def _rgb(image: Image.Image, name: str) -> Image.Image:
  """Return an image of any mode as RGB; `read` defines the colours."""
  if image.mode == "RGB":
    return image
  if image.mode.startswith("I"):
    return Image.fromarray(_scale_16_bit(np.asarray(image), name))
  if image.mode == "F":
    raise InputError(
      f"{name}: float pixels (mode F) have no known range; save 8 bits a channel"
    )
  # Pillow warns when a palette with alpha goes to RGB directly.
  if image.mode in ("P", "PA"):
    image = image.convert("RGBA")
  try:
    return image.convert("RGB")
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
