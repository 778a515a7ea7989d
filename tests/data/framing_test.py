"""The words of `resample` and the pixels they stand for."""

import hypothesis
import numpy as np
import pytest
import transformers
from hypothesis import strategies as st
from PIL import Image

from pivot_jax.data import framing, images
from pivot_jax.errors import InputError


def _noise(height, width):
  shape = (height, width, 3)
  return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("text, meaning", [
  ("bicubic", ("bicubic", False, None)),
  ("bilinear", ("bilinear", False, None)),
  ("lanczos", ("lanczos", False, None)),
  ("crop_bicubic", ("bicubic", True, None)),
  ("crop_lanczos", ("lanczos", True, None)),
  ("crop_bicubic:248", ("bicubic", True, 248)),
  ("crop_bilinear:256", ("bilinear", True, 256)),
])  # fmt: skip
def test_a_resample_names_a_filter_a_crop_and_an_edge(text, meaning):
  assert framing.parse_resample(text) == meaning


@pytest.mark.parametrize("text", [
  "", "cubic", "nearest", "Bicubic", "bicubic ", "bicubic:248", "crop_",
  "crop", "crop_cubic", "crop_bicubic:", "crop_bicubic:0", "crop_bicubic:-1",
  "crop_bicubic:024", "crop_bicubic:24.5", "crop_bicubic:24:24", "bicubic\n",
  "crop_bicubic:٢٤", "crop_bicubic:999999", None, 3,
])  # fmt: skip
def test_anything_else_is_refused_with_the_choices(text):
  said = "is none of bicubic, bilinear, lanczos, crop_bicubic, .*crop_bicubic:"
  with pytest.raises(InputError, match=said) as error:
    framing.parse_resample(text)
  assert str(error.value).startswith(f"resample={text!r} is none")
  assert "\n" not in str(error.value)


def test_images_hands_the_framing_on():
  assert images.resize is framing.resize
  assert images.resize_labels is framing.resize_labels
  assert images.parse_resample is framing.parse_resample


# Odd sides, odd margins, and images that are below the target on one side.
@pytest.mark.parametrize(
  "height, width",
  [(31, 48), (47, 30), (20, 20), (3, 90), (90, 3), (1, 33), (29, 17), (16, 16)],
)
@pytest.mark.parametrize("size, edge", [(16, 16), (15, 18), (16, 19), (7, 24)])
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("name", ["CLIP", "Bit"])
def test_a_crop_is_that_of_transformers(
  name, kernel, size, edge, height, width
):
  kinds = {
    "CLIP": transformers.CLIPImageProcessorPil,
    "Bit": transformers.BitImageProcessorPil,
  }
  processor = kinds[name](
    size={"shortest_edge": edge}, crop_size=size,
    resample=Image.Resampling[kernel.upper()],
    do_normalize=False, do_rescale=False,
  )  # fmt: skip
  pixels = _noise(height, width)
  theirs = processor(Image.fromarray(pixels), return_tensors="np")
  found = framing.resize(pixels, size, resample=f"crop_{kernel}:{edge}")
  np.testing.assert_array_equal(
    found, theirs["pixel_values"][0].transpose(1, 2, 0)
  )
  if edge == size:
    np.testing.assert_array_equal(
      found, framing.resize(pixels, size, resample=f"crop_{kernel}")
    )


def test_an_edge_keeps_only_the_middle_of_a_square_image():
  pixels = np.zeros((24, 24, 3), np.uint8)
  pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:] = 255, 255, 255, 255
  found = framing.resize(pixels, 16, resample="crop_bicubic:24")
  assert found.shape == (16, 16, 3) and found.max() == 0
  assert framing.resize(pixels, 16, resample="crop_bicubic").max() == 255


@hypothesis.given(
  height=st.integers(1, 60), width=st.integers(1, 60), size=st.integers(1, 30),
  more=st.integers(0, 20),
)  # fmt: skip
def test_a_label_map_stays_over_its_image(height, width, size, more):
  how = f"crop_bilinear:{size + more}"
  # The left half is 1: a border that the image shows in grey, the map sharply.
  labels = np.zeros((height, width), np.int32)
  labels[:, : width // 2] = 1
  image = np.repeat(labels[:, :, None] * 255, 3, 2).astype(np.uint8)
  labels = framing.resize_labels(labels, size, resample=how)
  image = framing.resize(image, size, resample=how)[:, :, 0]
  assert labels.shape == image.shape == (size, size)
  assert (labels[image > 160] == 1).all() and (labels[image < 95] == 0).all()


def test_an_edge_below_the_size_is_refused():
  pixels, labels = _noise(9, 9), np.zeros((9, 9), np.int32)
  said = "resample=crop_bicubic:15 .* fewer pixels than the 16 .* give 16 or"
  with pytest.raises(InputError, match=said):
    framing.resize(pixels, 16, resample="crop_bicubic:15")
  with pytest.raises(InputError, match=said):
    framing.resize_labels(labels, 16, resample="crop_bicubic:15")
  assert framing.resize(pixels, 15, resample="crop_bicubic:15").shape[0] == 15


def test_a_thread_of_an_image_is_refused_before_it_fills_the_memory():
  thread = np.zeros((1, 60_000, 3), np.uint8)
  with pytest.raises(InputError, match="60000x1 pixels would grow to 13440000"):
    framing.resize(thread, 224, resample="crop_bicubic")
  assert framing.resize(thread, 224).shape == (224, 224, 3)


def _expanded(image):
  """LLaVA's `expand2square`, by its rule: a new square, and one paste."""
  width, height = image.size
  side = max(width, height)
  square = Image.new("RGB", (side, side), tuple(int(255 * 0.5) for _ in "RGB"))
  corner = (0, (width - height) // 2)
  if height > width:
    corner = ((height - width) // 2, 0)
  square.paste(image, corner)
  return square


@pytest.mark.parametrize(
  "height, width", [(4, 9), (9, 4), (5, 9), (1, 2), (2, 1), (7, 7), (6, 7)]
)
def test_padding_is_that_of_llava(height, width):
  pixels = _noise(height, width)
  given = Image.fromarray(pixels)
  padded = framing.pad_square(pixels)
  np.testing.assert_array_equal(padded, np.asarray(_expanded(given)))
  framed = framing.frame(
    given, 5, resample="bicubic", of=(width, height), pad=True
  )
  np.testing.assert_array_equal(framed, framing.resize(padded, 5))


def test_an_odd_line_of_padding_is_below_or_right():
  wide = framing.pad_square(np.zeros((1, 4, 3), np.uint8))[:, 0, 0]
  assert wide.tolist() == [127, 0, 127, 127]
  tall = framing.pad_square(np.zeros((4, 1, 3), np.uint8))[0, :, 0]
  assert tall.tolist() == [127, 0, 127, 127]


@pytest.mark.parametrize("of, size, resample, pad, times", [
  ((640, 480), 384, "bicubic", False, 1),
  ((1024, 768), 384, "bicubic", False, 2),
  ((1024, 767), 384, "bicubic", False, 1),
  ((767, 1024), 384, "crop_bicubic", False, 1),
  ((1600, 1600), 384, "bicubic", False, 4),
  ((9000, 9000), 384, "bicubic", False, 8),
  # The crop's edge is what has to be covered.
  ((1000, 500), 224, "crop_bicubic:248", False, 2),
  ((1000, 500), 224, "crop_bicubic:256", False, 1),
  # Padded, the short side may come out smaller than the square.
  ((1024, 512), 384, "bicubic", True, 2),
  ((1024, 512), 384, "bicubic", False, 1),
  # Borders of 8, 4 and 2.5 pixels.
  ((160, 144), 20, "bicubic", True, 8),
  ((160, 152), 20, "bicubic", True, 4),
  ((160, 155), 20, "bicubic", True, 1),
])  # fmt: skip
def test_a_picture_is_never_decoded_below_the_size_it_is_scaled_to(
  of, size, resample, pad, times
):
  found = framing.shrinkage(of, size, resample=resample, pad=pad)
  assert found == times


def test_an_elongated_image_is_not_padded_to_gigabytes():
  image = np.zeros((1, 50_000, 3), np.uint8)
  with pytest.raises(
    InputError, match="50000x1 .* padded to a square of 50000"
  ):
    framing.pad_square(image)
