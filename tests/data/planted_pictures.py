"""Image files for `planted.py`: all kinds that are fine, and what is not.

Everything is noise drawn from the generator that is given, so the same seed
gives the same bytes. Nothing here knows rows.
"""

import io
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image

ROTATED = 6  # EXIF orientation: a quarter turn.


def write_good(images: pathlib.Path, rng: np.random.Generator) -> list[str]:
  """Writes pictures that any row may use; returns their relative paths."""
  files = _jpeg_files(rng) | _png_files(rng) | _other_files(rng)
  for name, data in files.items():
    path = images / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  # A link is fine as long as it stays inside.
  (images / "alias.png").symlink_to("colour.png")
  return [*files, "alias.png"]


def undecodable(rng: np.random.Generator) -> list[tuple[str, bytes]]:
  """Returns (suffix, bytes) of files that no decoder can finish."""
  picture = _noise(rng, 64, 48)
  jpeg, png = _saved(picture, "JPEG"), _saved(picture, "PNG")
  return [
    (".png", b""),
    (".jpg", b"\x00\x01" + rng.bytes(500)),
    (".jpg", jpeg[: len(jpeg) // 2]),
    (".png", png[: len(png) // 2]),
    (".jpg", b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"),
    (".jpg", jpeg[:100]),
    (".png", png[:8] + rng.bytes(300)),
    (".jpg", b""),
  ]


def huge(rng: np.random.Generator) -> list[tuple[str, bytes]]:
  """Returns (suffix, bytes) of small files of more than 50 million pixels.

  One is a bomb that would unpack to 8000 x 6500 pixels, the rest have headers
  that claim more pixels than follow: 3.6e9, 1.2e8 and 4.2e9.
  """
  jpeg = bytearray(_saved(_noise(rng, 32, 32), "JPEG"))
  start = jpeg.index(b"\xff\xc0")  # Marker, length, bits; height and width.
  jpeg[start + 5 : start + 9] = struct.pack(">HH", 65_000, 65_000)
  return [
    (".png", _png(60_000, 60_000, rows=bytes(100))),
    (".png", blank(8_000, 6_500)),
    (".png", _png(12_000, 10_000, rows=bytes(100))),
    (".jpg", bytes(jpeg)),
  ]


def blank(width: int, height: int) -> bytes:
  """Returns a whole PNG of black pixels, one bit each."""
  return _png(width, height, rows=bytes((1 + -(-width // 8)) * height))


def _jpeg_files(rng: np.random.Generator) -> dict[str, bytes]:
  exif = Image.Exif()
  exif[0x0112] = ROTATED
  ink = Image.fromarray(_pixels(rng, 40, 24, 4), "CMYK")
  return {
    "photo.jpg": _saved(_noise(rng, 64, 48), "JPEG"),
    "sub/deep/photo.jpeg": _saved(_noise(rng, 48, 64), "JPEG", quality=30),
    "CAMERA.JPG": _saved(_noise(rng, 40, 30), "JPEG", progressive=True),
    "grey.jpg": _saved(_noise(rng, 33, 17).convert("L"), "JPEG"),
    "rotated.jpg": _saved(_noise(rng, 48, 32), "JPEG", exif=exif),
    "ink.jpg": _saved(ink, "JPEG"),
    # What a file holds decides, not what it is called.
    "really_a_png.jpg": _saved(_noise(rng, 24, 24), "PNG"),
  }


def _png_files(rng: np.random.Generator) -> dict[str, bytes]:
  colour = _noise(rng, 32, 24)
  grey_16 = rng.integers(0, 2**16, (20, 30)).astype(np.uint16)
  raw_16 = b"".join(b"\0" + rng.bytes(24 * 3 * 2) for _ in range(18))
  palette = colour.quantize(16)
  alpha = Image.fromarray(_pixels(rng, 24, 24, 4))
  return {
    "colour.png": _saved(colour, "PNG"),
    "grey.png": _saved(colour.convert("L"), "PNG"),
    "bits.png": _saved(colour.convert("1"), "PNG"),
    "palette.png": _saved(palette, "PNG"),
    # Pillow warns when such a palette is made RGB directly.
    "palette_alpha.png": _saved(palette, "PNG", transparency=b"\x80\x40"),
    "alpha.png": _saved(alpha, "PNG"),
    "grey_alpha.png": _saved(alpha.convert("LA"), "PNG"),
    "grey_16.png": _saved(Image.fromarray(grey_16), "PNG"),
    "colour_16.png": _png(24, 18, bits=16, colour=2, rows=raw_16),
    "large.png": blank(4_000, 3_000),
    "sub/two..dots.png": _saved(_noise(rng, 20, 20), "PNG"),
    "http_banner.png": _saved(_noise(rng, 60, 20), "PNG"),
    "with space.png": _saved(_noise(rng, 20, 21), "PNG"),
    "sub/größe_图.png": _saved(_noise(rng, 22, 20), "PNG"),
  }


def _other_files(rng: np.random.Generator) -> dict[str, bytes]:
  frames = [_noise(rng, 24, 18).quantize(32) for _ in range(3)]
  return {
    "still.gif": _saved(frames[0], "GIF"),
    "moving.gif": _saved(
      frames[0], "GIF", save_all=True, append_images=frames[1:]
    ),
    "picture.webp": _saved(_noise(rng, 30, 30), "WEBP"),
    "picture.bmp": _saved(_noise(rng, 18, 18), "BMP"),
  }


def _pixels(rng: np.random.Generator, width: int, height: int, channels: int):
  return rng.integers(0, 256, (height, width, channels)).astype(np.uint8)


def _noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
  return Image.fromarray(_pixels(rng, width, height, 3))


def _saved(image: Image.Image, kind: str, **options) -> bytes:
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


def _png(
  width: int, height: int, *, rows: bytes, bits: int = 1, colour: int = 0
) -> bytes:
  """Returns a PNG of the given header, checksums right, whatever follows.

  Args:
    rows: each row's filter byte and samples, before compression.
    bits: bits a sample.
    colour: 0 for grey, 2 for RGB.
  """
  header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
  chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data)) + kind + data
    + struct.pack(">I", zlib.crc32(kind + data))
    for kind, data in chunks
  )  # fmt: skip
