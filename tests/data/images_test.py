import io
import os
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from pivot_jax.data import images
from pivot_jax.errors import InputError


def _noise(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
  shape = (height, width, channels)
  return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def _saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


def _decoded(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
  return images.decode(_saved(image, kind, **options), name="x")


def test_lossless_pixels_come_back_as_they_were(tmp_path):
  pixels = _noise()
  Image.fromarray(pixels).save(tmp_path / "a.png")
  read = images.read(tmp_path / "a.png")
  assert read.dtype == np.uint8
  np.testing.assert_array_equal(read, pixels)


def test_grey_of_16_bits_is_scaled_and_not_clipped():
  values = np.array([[0, 128, 129, 257, 32768, 40000, 65535]], np.uint16)
  read = _decoded(Image.fromarray(values))
  assert read[0, :, 0].tolist() == [0, 0, 1, 1, 128, 156, 255]
  assert (read == read[:, :, :1]).all()


def test_every_colour_mode_has_one_meaning():
  red = (200, 30, 10)
  assert _decoded(Image.new("L", (2, 1), 77)).tolist() == [[[77] * 3] * 2]
  assert _decoded(Image.new("1", (1, 1), 1)).tolist() == [[[255] * 3]]
  # Alpha is dropped: the colour under a transparent pixel stays.
  assert _decoded(Image.new("RGBA", (1, 1), (*red, 0))).tolist() == [[[*red]]]
  assert _decoded(Image.new("LA", (1, 1), (9, 0))).tolist() == [[[9] * 3]]
  palette = Image.new("P", (1, 1), 1)
  palette.putpalette([0, 0, 0, *red])
  assert _decoded(palette).tolist() == [[[*red]]]
  clear = _decoded(palette, transparency=b"\x80\x40")
  assert clear.tolist() == [[[*red]]]
  ink = _decoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
  assert (abs(ink.astype(int) - [255, 0, 0]) <= 2).all()


def test_float_pixels_have_no_range_and_are_refused():
  # A PFM file: "Pf", width and height, a negative scale for little-endian.
  data = b"Pf\n1 1\n-1.0\n" + np.float32(0.5).tobytes()
  with pytest.raises(InputError, match="x: float pixels .mode F. have no"):
    images.decode(data, name="x")


def test_a_rotation_tag_is_not_applied_and_the_first_frame_is_taken():
  exif = Image.Exif()
  exif[0x0112] = 6  # Rotate by a quarter turn.
  turned = _saved(Image.fromarray(_noise(8, 16)), "JPEG", exif=exif)
  assert images.decode(turned, name="x").shape == (8, 16, 3)
  frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
  movie = _saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
  assert images.decode(movie, name="x")[0, 0].tolist() == [255, 0, 0]


def test_files_that_are_no_image_are_named(tmp_path):
  cases = {
    "empty.png": (b"", "the image file is empty"),
    "text.png": (b"<html>no</html>", "not a readable image"),
    "cut.jpg": (_saved(Image.fromarray(_noise()), "JPEG")[:-200], "truncated"),
    "cut.png": (_saved(Image.fromarray(_noise()))[:-200], "cannot decode"),
    # Pillow runs a program to read this format.
    "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a readable image"),
  }
  for name, (data, message) in cases.items():
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name}: .*{message}") as caught:
      images.read(tmp_path / name)
    assert "\n" not in str(caught.value)
  with pytest.raises(InputError, match="none.png: No such file"):
    images.read(tmp_path / "none.png")


def test_a_large_image_is_refused_by_its_header_alone():
  header = bytearray(_saved(Image.new("L", (1, 1))))
  header[16:24] = (20_000).to_bytes(4, "big") * 2
  for data in (header, _with_header_checksum(header)):
    with pytest.raises(InputError, match="x: "):
      images.decode(bytes(data), name="x")
  small = _saved(Image.fromarray(_noise(10, 10)))
  with pytest.raises(InputError, match="10x10 pixels are more than 99"):
    images.decode(small, name="x", max_pixels=99)
  assert images.decode(small, name="x", max_pixels=100).shape == (10, 10, 3)


def _with_header_checksum(data: bytearray) -> bytearray:
  data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
  return data


def test_a_file_with_too_many_bytes_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(images, "MAX_BYTES", 50)
  Image.fromarray(_noise()).save(tmp_path / "a.png")
  with pytest.raises(InputError, match="a.png: .* more than 50 bytes"):
    images.read(tmp_path / "a.png")


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.data())
def test_damage_is_an_input_error_or_still_an_image(data):
  kind = data.draw(
    st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM"])
  )
  damaged = bytearray(_saved(Image.fromarray(_noise(9, 9)), kind))
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] = data.draw(st.integers(0, 255))
  cut = data.draw(st.integers(0, len(damaged)))
  try:
    read = images.decode(bytes(damaged[:cut]), name="x", max_pixels=10_000)
  except InputError as error:
    assert str(error).startswith("x: ")
  else:
    assert read.dtype == np.uint8 and read.shape[2] == 3


def test_bicubic_is_pillows_squash_on_rounded_pixels():
  pixels = _noise(40, 60)
  resized = images.resize(pixels, 16)
  theirs = Image.fromarray(pixels).resize((16, 16), Image.BICUBIC)
  np.testing.assert_array_equal(resized, np.asarray(theirs))
  assert resized.shape == (16, 16, 3) and resized.dtype == np.uint8
  linear = images.resize(pixels, 16, resample="bilinear")
  theirs = Image.fromarray(pixels).resize((16, 16), Image.BILINEAR)
  np.testing.assert_array_equal(linear, np.asarray(theirs))
  assert (linear != resized).any()


def test_an_image_of_the_right_size_is_left_as_it_is():
  pixels = _noise(16, 16)
  for resample in ("bicubic", "bilinear", "crop_bicubic"):
    np.testing.assert_array_equal(
      images.resize(pixels, 16, resample=resample), pixels
    )


def test_a_squashed_image_keeps_all_and_a_crop_only_the_middle():
  pixels = np.zeros((10, 30, 3), np.uint8)
  pixels[:, :10], pixels[:, 20:] = 255, 255
  squashed = images.resize(pixels, 30)
  assert squashed[:, :9].min() > 240 and squashed[:, 21:].min() > 240
  cropped = images.resize(pixels, 10, resample="crop_bicubic")
  assert cropped.max() == 0


@hypothesis.given(
  height=st.integers(1, 40), width=st.integers(1, 40), size=st.integers(1, 40),
  resample=st.sampled_from(("bicubic", "bilinear", "crop_bicubic")), level=st.integers(0, 255),
)  # fmt: skip
def test_a_flat_image_stays_flat_at_any_size(
  height, width, size, resample, level
):
  flat = np.full((height, width, 3), level, np.uint8)
  resized = images.resize(flat, size, resample=resample)
  assert resized.shape == (size, size, 3)
  assert (resized == level).all()
  labels = np.full((height, width), level, np.int32)
  labels = images.resize_labels(labels, size, resample=resample)
  assert labels.shape == (size, size) and (labels == level).all()


def test_label_maps_never_mix_their_values():
  labels = np.array([[0, 200], [7, 70_000]], np.int32)
  large = images.resize_labels(labels, 8)
  assert large.dtype == np.int32
  np.testing.assert_array_equal(large, np.kron(labels, np.ones((4, 4), int)))
  with pytest.raises(InputError, match="'nearest' is none of bicubic"):
    images.resize_labels(labels, 8, resample="nearest")
  with pytest.raises(InputError, match="'nearest' is none of bicubic"):
    images.resize(_noise(), 8, resample="nearest")


def test_label_maps_are_read_as_indices(tmp_path):
  path = tmp_path / "a.png"
  values = np.array([[0, 1, 11, 255]], np.uint8)
  grey = Image.fromarray(values)
  palette = Image.fromarray(values)
  palette.putpalette([i // 3 * 40 % 256 for i in range(768)])
  assert palette.mode == "P"
  for image in (grey, palette):
    image.save(path)
    read = images.read_labels(path)
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, values)
  Image.fromarray(values.astype(np.uint16) * 200).save(path)
  assert images.read_labels(path).tolist() == [[0, 200, 2200, 51000]]


def test_label_maps_that_are_not_indices_are_refused(tmp_path):
  path = tmp_path / "a.png"
  Image.fromarray(_noise()).save(path)
  with pytest.raises(InputError, match="one index a pixel .* not mode RGB"):
    images.read_labels(path)
  Image.fromarray(_noise()[:, :, 0]).save(path, "JPEG")
  with pytest.raises(InputError, match="not a readable image .PNG."):
    images.read_labels(path)
  # Two bits a sample, as Pillow itself cannot write: 0 and 1 become 0 and 85.
  path.write_bytes(_grey_png_of_two_bits())
  with pytest.raises(InputError, match="2-bit grey are ambiguous"):
    images.read_labels(path)


def _grey_png_of_two_bits() -> bytes:
  def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body).to_bytes(4, "big")
    return len(body).to_bytes(4, "big") + kind + body + checksum

  header = (
    (4).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes((2, 0, 0, 0, 0))
  )
  data = zlib.compress(b"\x00" + bytes([0b00_01_10_11]))
  chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.fixture
def root(tmp_path):
  (tmp_path / "root" / "sub").mkdir(parents=True)
  (tmp_path / "root" / "sub" / "a.png").write_bytes(b"x")
  (tmp_path / "secret").write_bytes(b"x")
  return tmp_path / "root"


def test_paths_inside_the_root_are_found(root):
  assert images.resolve(root, "sub/a.png") == root / "sub" / "a.png"
  assert images.resolve(root, "./sub/a.png").read_bytes() == b"x"
  os.symlink(root / "sub", root / "link")
  assert images.resolve(root, "link/a.png").read_bytes() == b"x"


@pytest.mark.parametrize("relative, message", [
  ("../secret", "escapes the image root"),
  ("sub/../../secret", "escapes the image root"),
  ("sub/../sub/a.png", "escapes the image root"),
  ("/etc/passwd", "escapes the image root"),
  ("C:\\secret", "escapes the image root"),
  ("..\\secret", "escapes the image root"),
  ("\\\\host\\share", "escapes the image root"),
  ("https://host/a.png", "is a URL"),
  ("file:///etc/passwd", "is a URL"),
  ("data:image/png;base64,AA", "is a URL"),
  ("", "is not a path"),
  ("a\0b", "is not a path"),
  ("none.png", "no such file"),
  ("sub", "no such file"),
  ("x" * 5000, "name too long"),
])  # fmt: skip
def test_paths_out_of_the_root_are_refused(root, relative, message):
  with pytest.raises(InputError, match=f"(?i)image: .*{message}"):
    images.resolve(root, relative)


def test_links_that_leave_the_root_are_refused(root):
  os.symlink(root.parent / "secret", root / "file")
  os.symlink(root.parent, root / "up")
  os.symlink(root / "loop", root / "loop")
  for relative in ("file", "up/secret"):
    with pytest.raises(InputError, match="escapes the image root by a link"):
      images.resolve(root, relative)
  with pytest.raises(InputError, match="image: "):
    images.resolve(root, "loop")


@hypothesis.given(st.lists(st.sampled_from(
  ["..", ".", "/", "\\", "sub", "a.png", "C:", "secret", "link", "", "\0"]
), max_size=6))  # fmt: skip
def test_no_path_leads_out_of_the_root(tmp_path_factory, parts):
  root = tmp_path_factory.getbasetemp() / "confined" / "root"
  if not root.is_dir():
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.png").write_bytes(b"in")
    (root.parent / "secret").write_bytes(b"out")
    os.symlink("..", root / "link")
  for joint in ("/", "", "\\"):
    try:
      path = images.resolve(root, joint.join(parts))
    except InputError:
      continue
    assert path.read_bytes() == b"in"
