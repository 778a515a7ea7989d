"""Cut and overwritten pictures, in `images`, in training and in `check`."""

import io
import json
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from pivot_jax.data import __main__ as program
from pivot_jax.data import images, opener, wholeness
from pivot_jax.errors import InputError
from tests.data.tools import checked

JPEGS = {
  "baseline": {},
  "optimized": {"optimize": True},
  "full_colour": {"subsampling": 0, "quality": 95},
  "restarts": {"restart_marker_rows": 1},
  "progressive": {"progressive": True},
  "progressive_restarts": {"progressive": True, "restart_marker_blocks": 5},
}
OTHERS = {
  "png": ("PNG", {}),
  "webp": ("WEBP", {}),
  "webp_lossless": ("WEBP", {"lossless": True}),
}
# Bytes before the end that a cut may leave out unseen.
END = 64


def _picture(mode: str = "RGB", width: int = 200, height: int = 150):
  rng = np.random.default_rng(0)
  cells = rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)
  smooth = Image.fromarray(cells).resize((width, height), Image.BICUBIC)
  noisy = np.asarray(smooth) + rng.normal(scale=9, size=(height, width, 3))
  pixels = np.clip(noisy, 0, 255).astype(np.uint8)
  return Image.fromarray(pixels).convert(mode)


def _saved(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


def _is_refused(data: bytes, **options) -> bool:
  try:
    images.decode(data, name="x", **options)
  except InputError as error:
    assert error.kind in ("", "undecodable_image")
    return True
  return False


def _pillows(data: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _overwritten(data: bytes, fill: str, size: int) -> list[bytes]:
  """Return files with a window exchanged, from the middle of their data."""
  rng = np.random.default_rng(size)
  begin, end = len(data) * 2 // 5, len(data) - size - END
  found = []
  for at in np.linspace(begin, end, 40).astype(int):
    window = bytes(size) if fill == "zeros" else rng.bytes(size)
    found.append(data[:at] + window + data[at + size :])
  return found


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", JPEGS)
def test_whole_jpegs_have_pillows_pixels(kind, mode):
  data = _saved(_picture(mode), **JPEGS[kind])
  read = images.decode(data, name="x")
  np.testing.assert_array_equal(read, _pillows(data))


@pytest.mark.parametrize("decoder", images.DECODERS)
@pytest.mark.parametrize("ending", [b"", b"\xff\xd9", b"\0\0\xff\xd9"])
@pytest.mark.parametrize("kind", JPEGS)
def test_every_cut_jpeg_is_refused(kind, ending, decoder):
  data = _saved(_picture(), **JPEGS[kind])
  for cut in np.linspace(10, len(data) - END, 150).astype(int):
    cut_data = data[:cut] + ending
    assert _is_refused(cut_data, size=32, decoder=decoder), cut


@pytest.mark.parametrize("kind", OTHERS)
def test_every_cut_png_and_webp_is_refused(kind):
  data = _saved(_picture(), OTHERS[kind][0], **OTHERS[kind][1])
  for cut in np.linspace(10, len(data) - END, 60).astype(int):
    assert _is_refused(data[:cut]), cut
    if kind == "png":
      assert _is_refused(data[:cut] + data[-12:]), cut
    else:
      # The sizes are made right again.
      sized = bytearray(data[: max(cut, 30) // 2 * 2])
      sized[4:8] = struct.pack("<I", len(sized) - 8)
      sized[16:20] = struct.pack("<I", len(sized) - 20)
      assert _is_refused(bytes(sized)), cut


# The share that is found at least; the rest decodes to as many pixels.
@pytest.mark.parametrize("fill, size, share", [
  ("zeros", 512, 0.95), ("zeros", 2048, 1.0),
  ("random", 64, 0.4), ("random", 512, 0.9), ("random", 2048, 1.0),
])  # fmt: skip
@pytest.mark.parametrize("kind", JPEGS)
def test_jpegs_overwritten_in_the_middle_are_refused(kind, fill, size, share):
  data = _saved(_picture(width=400, height=300), **JPEGS[kind])
  refused = [_is_refused(one) for one in _overwritten(data, fill, size)]
  assert np.mean(refused) >= share


@pytest.mark.parametrize("fill", ["zeros", "random"])
@pytest.mark.parametrize("size", [4, 64])
def test_overwritten_pngs_are_refused(fill, size):
  data = _saved(_picture(), "PNG")
  assert all(map(_is_refused, _overwritten(data, fill, size)))


def test_a_png_is_refused_for_its_checksum_alone():
  data = bytearray(_saved(_picture(), "PNG"))
  data[data.rindex(b"IEND") - 6] ^= 1  # Of IDAT; its pixels are right.
  with pytest.raises(InputError, match="x: .*another checksum"):
    images.decode(bytes(data), name="x")
  data[data.rindex(b"IEND") - 6] ^= 1
  end = data.rindex(b"IEND") - 4
  with pytest.raises(InputError, match="x: .*IEND is missing"):
    images.decode(bytes(data[:end]), name="x")


def test_label_maps_are_whole_or_bad():
  data = bytearray(_saved(_picture("L"), "PNG"))
  assert images.decode_labels(bytes(data), name="x").shape == (150, 200)
  data[len(data) // 2] ^= 255
  with pytest.raises(InputError, match="x: .*another checksum"):
    images.decode_labels(bytes(data), name="x")


@pytest.mark.parametrize("at", [4, 16])
def test_a_webp_with_a_wrong_size_is_refused(at):
  data = bytearray(_saved(_picture(), "WEBP"))
  for size in (3, len(data) + 1000, 2**32 - 1):
    data[at : at + 4] = struct.pack("<I", size)
    assert _is_refused(bytes(data))


def test_harmless_flaws_stay_harmless():
  data = _saved(_picture())
  whole = images.decode(data, name="x")
  scan = data.index(b"\xff\xda")
  exif = b"\xff\xe1\x00\x10Exif\0\0" + b"\xff\xd9\xff\xda" * 2
  flawed = {
    "bytes behind": data + b"anything\xff\xd9\xff\xd8",
    "another picture behind": data + data,
    "a few bytes before the end": data[:-2] + b"\x12\x34\x56" + data[-2:],
    "filled before the end": data[:-2] + b"\xff" * 30 + data[-2:],
    "bytes between segments": data[:scan] + b"\0" * 9 + data[scan:],
    "damaged EXIF": data[:2] + exif + data[2:],
  }
  for flaw, one in flawed.items():
    read = images.decode(one, name=flaw)
    np.testing.assert_array_equal(read, whole, err_msg=flaw)


@pytest.mark.parametrize("kind", JPEGS)
def test_flat_and_letterboxed_pictures_are_whole(kind):
  pixels = np.zeros((300, 400, 3), np.uint8)
  pixels[100:140] = np.asarray(_picture(width=400, height=40))
  for image in (Image.new("RGB", (400, 300), "white"), Image.fromarray(pixels)):
    for mode in ("RGB", "L"):
      data = _saved(image.convert(mode), **JPEGS[kind])
      read = images.decode(data, name="x")
      np.testing.assert_array_equal(read, _pillows(data))


def test_several_pictures_in_one_file_give_the_first():
  data = _saved(_picture(), "MPO", save_all=True, append_images=[_picture()])
  np.testing.assert_array_equal(images.decode(data, name="x"), _pillows(data))
  assert _is_refused(data[: len(data) // 3] + b"\xff\xd9")


def _scans(count: int) -> bytes:
  data = _saved(_picture(), progressive=True)
  return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * count + data[-2:]


def _chunked(kind: bytes, body: bytes, count: int) -> bytes:
  chunk = kind + body
  chunk += zlib.crc32(chunk).to_bytes(4, "big")
  data = _saved(_picture(), "PNG")
  return data[:33] + (len(body).to_bytes(4, "big") + chunk) * count + data[33:]


def _commented() -> bytes:
  data = _saved(_picture("P"), "GIF")
  at = data.index(b"\x2c", 13 + 768)
  return data[:at] + b"\x21\xfe\x01a\0" * 500_000 + data[at:]


BOMB = zlib.compress(bytes(100 * 2**20))
COSTLY = {
  "scans": (lambda: _scans(2000), "more than 100 scans"),
  "ascii": (lambda: b"P3 3000 3000 255\n" + b"1 " * 9_000_000, "ASCII"),
  "segments": (
    lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 10**6 + _scans(0)[2:],
    "more than 50000 segments",
  ),
  "filling": (
    lambda: b"\xff\xd8" + b"\xff" * 10**7 + _scans(0)[2:],
    "bytes between segments",
  ),
  "chunks": (lambda: _chunked(b"tEXt", b"a\0b", 10**6), "than 50000 chunks"),
  "text": (lambda: _chunked(b"zTXt", b"a\0\0" + BOMB, 1), "too large"),
  "texts": (lambda: _chunked(b"iTXt", b"a\0\1\0\0\0" + BOMB, 1), "too large"),
  "profile": (lambda: _chunked(b"iCCP", b"a\0\0" + BOMB, 1), "too large"),
  "comments": (_commented, "more than 50000 blocks"),
}


@pytest.mark.parametrize("bomb", COSTLY)
def test_costly_files_are_refused_at_once(bomb):
  make, why = COSTLY[bomb]
  data, began = make(), time.process_time()
  with pytest.raises(InputError, match=f"x: .*{why}"):
    images.decode(data, name="x")
  assert time.process_time() - began < 2


def test_as_many_scans_as_encoders_write_are_read():
  data = _saved(_picture(), progressive=True)
  # The first scan of coefficients, which may come again.
  begin = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
  end = data.index(b"\xff\xc4", begin)
  more = data[:end] + data[begin:end] * 80 + data[end:]
  read = images.decode(more, name="x")
  np.testing.assert_array_equal(read, _pillows(data))


def test_the_second_pass_finds_data_that_nothing_waits_for(monkeypatch):
  """A flat picture whose scan goes on after its last pixel."""
  data = _saved(Image.new("L", (400, 300), 90), progressive=True)
  begin = data.index(b"\xff\xda")
  end = data.index(b"\xff", begin + 2)
  passes = []
  second = wholeness._decode_until
  monkeypatch.setattr(
    wholeness,
    "_decode_until",
    lambda *args: (passes.append(1), second(*args)),
  )
  assert _is_refused(data[:end] + b"\x5a" * 300 + data[end:])
  assert passes


def _rows(tmp_path):
  (tmp_path / "images").mkdir()
  data = _saved(_picture(), progressive=True)
  for name, one in {
    "whole.jpg": data,
    "cut.jpg": data[: len(data) // 2] + b"\xff\xd9",
    "hole.jpg": _saved(_picture())[:1500]
    + bytes(900)
    + _saved(_picture())[2400:],
    "scans.jpg": _scans(2000),
  }.items():
    (tmp_path / "images" / name).write_bytes(one)
  names = ("whole.jpg", "cut.jpg", "hole.jpg", "scans.jpg")
  return [checked.PAIR | {"id": name, "image": name} for name in names]


def test_check_and_training_refuse_the_same_pictures(tmp_path):
  rows = _rows(tmp_path)
  bad = "undecodable_image"
  assert checked.kinds(tmp_path, rows) == [None, bad, bad, bad]
  source = opener.open_path(
    tmp_path / "rows.jsonl", image_root=str(tmp_path / "images")
  )
  assert source[0]["image"].shape == (150, 200, 3)
  for index in (1, 2, 3):
    with pytest.raises(InputError, match=f"rows.jsonl:{index + 1}: .*decode"):
      source[index]


def test_no_memory_is_not_called_a_bad_picture(tmp_path, monkeypatch, capsys):
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps(_rows(tmp_path)[0]) + "\n")

  def fail(*args):
    raise MemoryError

  monkeypatch.setattr(wholeness, "load", fail)
  with pytest.raises(MemoryError, match="x: no memory to decode"):
    images.decode(_scans(0), name="x")
  argv = [f"--images={tmp_path / 'images'}", f"--out={tmp_path / 'out'}"]
  assert program.main(["check", str(path), "--workers=0", *argv]) == 2
  said = capsys.readouterr().err
  assert "no memory to decode" in said and "Traceback" not in said
  assert not (tmp_path / "out" / "bad.jsonl").exists()
