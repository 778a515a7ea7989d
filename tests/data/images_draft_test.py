"""JPEGs decoded smaller: what is shared, and how far their pixels are apart."""

import io

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from pivot_jax.data import framing, images
from pivot_jax.errors import InputError


def _noise(height=96, width=128):
  shape = (height, width, 3)
  noise = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
  return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))


def _saved(image, kind="JPEG", **options):
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


def _decoded(data, decoder, size=24, **options):
  return images.decode(data, name="x", size=size, decoder=decoder, **options)


@pytest.mark.parametrize("options", [
  {}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True},
  {"quality": 30},
])  # fmt: skip
@pytest.mark.parametrize("size", [48, 24, 17, 12, 5])
def test_a_jpeg_is_decoded_smaller_and_has_other_pixels(size, options):
  data = _saved(_noise(), **options)
  draft = _decoded(data, "pil_draft", size)
  assert draft.shape == (size, size, 3) and draft.dtype == np.uint8
  assert (draft != _decoded(data, "pil", size)).any()


def test_grey_and_the_first_of_several_are_decoded_smaller():
  grey = _noise().convert("L")
  several = _saved(_noise(), "MPO", save_all=True, append_images=[grey])
  assert Image.open(io.BytesIO(several)).format == "MPO"
  for data in (_saved(grey), several):
    found, exact = (_decoded(data, name) for name in ("pil_draft", "pil"))
    assert 0 < np.abs(found.astype(int) - exact).mean() < 3
    assert (found == found[..., :1]).all() == (data != several)


@pytest.mark.parametrize("case, size", [
  ("as it is", None), ("just too small", 49), ("enlarged", 200),
  ("cmyk", 24), ("png", 24), ("webp", 24), ("gif", 24),
])  # fmt: skip
def test_what_is_not_decoded_smaller_has_the_pixels_of_pillow(case, size):
  image = _noise().convert("CMYK") if case == "cmyk" else _noise()
  kind = case.upper() if case in ("png", "webp", "gif") else "JPEG"
  data = _saved(image, kind)
  np.testing.assert_array_equal(
    _decoded(data, "pil_draft", size), _decoded(data, "pil", size)
  )


def _outcome(data, decoder):
  """Return the message of a refusal, or None for an image."""
  try:
    _decoded(data, decoder, size=8)
  except InputError as error:
    return str(error)
  return None


@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_file_is_refused_by_all_decoders_in_the_same_words(progressive):
  data = _saved(_noise(32, 40), progressive=progressive)
  refused = 0
  for length in range(1, len(data)):
    said = _outcome(data[:length], "pil")
    refused += said is not None
    assert _outcome(data[:length], "pil_draft") == said
  # Pillow itself forgives a cut behind the last block that it needs.
  assert refused > 0.95 * len(data)
  assert "truncated" in _outcome(data[:-100], "pil_draft")


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.data())
def test_damage_is_refused_by_all_decoders_or_by_none(data):
  damaged = bytearray(
    _saved(_noise(32, 40), progressive=data.draw(st.booleans()))
  )
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] = data.draw(st.integers(0, 255))
  said = _outcome(bytes(damaged), "pil")
  assert _outcome(bytes(damaged), "pil_draft") == said


@pytest.mark.parametrize("decoder", images.DECODERS)
def test_the_limit_counts_the_pixels_of_the_file(decoder):
  data = _saved(_noise(96, 128))
  with pytest.raises(InputError, match="128x96 pixels are more than 12287"):
    _decoded(data, decoder, max_pixels=96 * 128 - 1)
  assert _decoded(data, decoder, max_pixels=96 * 128).shape == (24, 24, 3)


@pytest.mark.parametrize("decoder, message", [
  ("cv2", "'cv2' is none of pil, pil_draft"),
  ("simplejpeg", "simplejpeg.*choose 'pil_draft'"),
])  # fmt: skip
def test_another_decoder_is_refused(tmp_path, decoder, message):
  for ask in (_pictures, lambda *_: _decoded(_saved(_noise()), decoder)):
    with pytest.raises(InputError, match=message) as refused:
      ask(tmp_path, decoder)
    assert "\n" not in str(refused.value)
  assert _pictures(tmp_path, "pil_draft").spec.decoder == "pil_draft"


def _pictures(root, decoder="pil", size=24):
  return images.Pictures(root, images.ImageSpec(size, decoder=decoder))


@pytest.mark.parametrize("decoder", images.DECODERS)
def test_a_source_reads_files_and_bytes_alike(tmp_path, decoder):
  data = _saved(_noise())
  (tmp_path / "a.jpg").write_bytes(data)
  pictures = _pictures(tmp_path, decoder)
  wanted = _decoded(data, decoder)
  np.testing.assert_array_equal(pictures.read("a.jpg"), wanted)
  np.testing.assert_array_equal(pictures.decode(data, name="x"), wanted)
  assert pictures.read_bytes("a.jpg") == data
  native = images.decode(data, name="x")
  np.testing.assert_array_equal(pictures.read_native("a.jpg"), native)
  np.testing.assert_array_equal(
    _pictures(tmp_path, decoder, size=None).read("a.jpg"), native
  )
  with pytest.raises(InputError, match="escapes the image root"):
    pictures.read_bytes("../a.jpg")


@pytest.mark.parametrize("decoder", images.DECODERS)
def test_several_images_are_padded_and_a_single_one_is_not(tmp_path, decoder):
  (tmp_path / "a.jpg").write_bytes(_saved(_noise()))
  (tmp_path / "b.png").write_bytes(_saved(_noise(60, 31), "PNG"))
  pictures = _pictures(tmp_path, decoder)
  alone, *rest = pictures.read_many(["a.jpg"])
  assert not rest
  np.testing.assert_array_equal(alone, pictures.read("a.jpg"))
  wide, tall = pictures.read_many(["a.jpg", "b.png"])
  assert (wide[:2] == 127).all() and (wide[-2:] == 127).all()
  native = np.asarray(_noise(60, 31))
  np.testing.assert_array_equal(
    tall, framing.resize(framing.pad_square(native), 24)
  )
  assert pictures.read_many([]) == []


def _psnr(off):
  return 10 * np.log10(255**2 / np.square(off).mean())


# Sizes from the largest at which a file of 480x360 is decoded 2, 4 and 8 times
# smaller, where its pixels differ most, to the smallest.
@pytest.mark.parametrize("resample, sizes, mean, most, least_psnr", [
  ("bicubic", (180, 150, 120, 91, 90, 60, 45), 2.0, 60, 37.0),
  ("bilinear", (180, 150, 120, 91, 90, 60, 45), 2.0, 60, 37.0),
  ("crop_bicubic", (180, 150, 120, 91, 90, 60, 45), 2.0, 60, 37.0),
  ("crop_bicubic:178", (160,), 2.6, 75, 34.0),
])  # fmt: skip
def test_photographs_differ_by_no_more_than_is_stated(
  test_data, resample, sizes, mean, most, least_psnr
):
  paths = sorted((test_data / "camvid").glob("*/images/*.jpg"))[::16]
  assert len(paths) == 10
  for size in sizes:
    smaller, exact = (
      np.stack([
        _decoded(path.read_bytes(), name, size, resample=resample)
        for path in paths
      ]).astype(int)
      for name in ("pil_draft", "pil")
    )  # fmt: skip
    off = smaller - exact
    assert 0.3 < np.abs(off).mean() < mean
    assert np.abs(off).max() <= most
    assert _psnr(off) > least_psnr
    # Neither brighter nor darker, and in its place.
    assert abs(off.mean()) < 0.35


@pytest.mark.parametrize("size", [75, 37, 19])
@pytest.mark.parametrize("resample, pad, height, width", [
  # Decoded smaller, these end in the middle of a pixel.
  ("bicubic", False, 155, 211),
  ("crop_bicubic", False, 155, 211),
  ("bicubic", True, 152, 200),
  ("bicubic", True, 200, 152),
  ("crop_bicubic", True, 152, 200),
])  # fmt: skip
def test_a_picture_decoded_smaller_keeps_its_place(
  resample, pad, height, width, size
):
  rows, columns = np.mgrid[:height, :width]
  ramps = [rows * 1.2, columns * 1.2, (rows + columns) * 0.6]
  image = Image.fromarray(np.stack(ramps, axis=-1).astype(np.uint8))
  data = _saved(image, quality=98, subsampling=0)
  options = dict(size=size, resample=resample, pad=pad)
  exact = _decoded(data, "pil", **options).astype(int)
  smaller = _decoded(data, "pil_draft", **options)
  assert (smaller != exact).any()
  # Next to the grey border a sharper filter swings further.
  assert np.abs(smaller - exact).max() <= (8 if pad else 4)
