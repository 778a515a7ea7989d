"""PIL images to pixels, against transformers' processors."""

import io
import json

import numpy as np
import pytest
import transformers
from PIL import Image

from pivot_jax.data import images
from pivot_jax.errors import InputError

SIZE = 16
SQUASH = {"size": {"height": SIZE, "width": SIZE}}
CROP = {"do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE}}
# Our name of a framing, and the file that says the same to transformers.
PROCESSORS = {
  "bicubic": SQUASH
  | {"image_processor_type": "SiglipImageProcessor", "resample": 3},
  "bilinear": SQUASH
  | {"image_processor_type": "ViTImageProcessor", "resample": 2},
  "lanczos": SQUASH
  | {"image_processor_type": "ViTImageProcessor", "resample": 1},
  "crop_bicubic": CROP
  | {"image_processor_type": "CLIPImageProcessor", "resample": 3}
  | {"size": {"shortest_edge": SIZE}},
  "crop_bicubic:19": CROP
  | {"image_processor_type": "BitImageProcessor", "resample": 3}
  | {"size": {"shortest_edge": 19}},
  "crop_bilinear:18": CROP
  | {"image_processor_type": "CLIPImageProcessor", "resample": 2}
  | {"size": {"shortest_edge": 18}},
}


def _noise(height=31, width=46, channels=3):
  shape = (height, width, channels)
  return np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)


def _reopened(image, kind, **options):
  """The image as a program finds it: open, and not yet decoded."""
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return Image.open(io.BytesIO(stream.getvalue()))


def _cases():
  rgb = Image.fromarray(_noise())
  opaque = rgb.convert("RGBA")
  exif = Image.Exif()
  exif[0x0112] = 6  # Rotate by a quarter turn.
  frames = [Image.fromarray(_noise() // n).quantize(64) for n in (1, 2, 3)]
  return {
    "rgb": rgb,
    "jpeg": _reopened(rgb, "JPEG"),
    "grey": rgb.convert("L"),
    "one bit": _reopened(rgb.convert("1"), "PNG"),
    "opaque": opaque,
    "opaque grey": _reopened(rgb.convert("LA"), "PNG"),
    "palette": rgb.quantize(50),
    "palette file": _reopened(rgb.quantize(9), "PNG"),
    "cmyk": rgb.convert("CMYK"),
    "cmyk jpeg": _reopened(rgb.convert("CMYK"), "JPEG"),
    "ycbcr": rgb.convert("YCbCr"),
    "turned": _reopened(rgb, "JPEG", exif=exif),
    "gif": _reopened(frames[0], "GIF"),
    "animation": _reopened(
      frames[0], "GIF", save_all=True, append_images=frames[1:]
    ),
  }


def _theirs(folder, config, image):
  fields = config | dict(
    do_convert_rgb=True, do_rescale=False, do_normalize=False
  )
  path = folder / "preprocessor_config.json"
  path.write_text(json.dumps(fields))
  processor = transformers.AutoImageProcessor.from_pretrained(
    folder, backend="pil"
  )
  found = processor(image, return_tensors="np")["pixel_values"]
  return found.transpose(0, 2, 3, 1)


@pytest.mark.parametrize("resample", PROCESSORS)
@pytest.mark.parametrize("case", _cases())
def test_the_pixels_are_those_of_transformers(tmp_path, resample, case):
  theirs = _theirs(tmp_path, PROCESSORS[resample], _cases()[case])
  ours = images.preprocess([_cases()[case]], SIZE, resample=resample)
  assert ours.dtype == np.uint8 and ours.shape == (1, SIZE, SIZE, 3)
  np.testing.assert_array_equal(ours, theirs)


def test_a_rotation_tag_turns_nothing():
  turned = images.preprocess([_cases()["turned"]], SIZE, resample="bicubic")
  plain = images.preprocess([_cases()["jpeg"]], SIZE, resample="bicubic")
  np.testing.assert_array_equal(turned, plain)


def test_images_of_all_kinds_and_sizes_are_one_batch_in_their_order():
  given = [Image.fromarray(_noise(9, 5)), _noise(40, 60), *_cases().values()]
  got = images.preprocess(given, SIZE, resample="crop_bicubic:19")
  assert got.shape == (len(given), SIZE, SIZE, 3)
  for image, pixels in zip(given, got, strict=True):
    alone = images.preprocess([image], SIZE, resample="crop_bicubic:19")
    np.testing.assert_array_equal(alone[0], pixels)
  assert images.preprocess([], SIZE, resample="bicubic").shape == (0, 16, 16, 3)


def test_an_image_reads_as_its_file_does(tmp_path):
  for name, image in _cases().items():
    path = tmp_path / f"{name}.png"
    if image.mode in ("CMYK", "YCbCr"):
      continue  # PNG has neither.
    image.save(path)
    pixels = images.resize(images.read(path), SIZE)
    np.testing.assert_array_equal(
      images.preprocess([Image.open(path)], SIZE, resample="bicubic"),
      pixels[None],
    )


def test_transparency_is_dropped_and_the_colour_below_stays():
  # transformers 5 lays these on white: (128, 128, 255) and (255, 255, 255).
  half = Image.new("RGBA", (4, 4), (0, 0, 255, 127))
  none = Image.new("RGBA", (4, 4), (9, 8, 7, 0))
  grey = Image.new("LA", (4, 4), (50, 0))
  palette = Image.new("P", (4, 4), 1)
  palette.putpalette([0, 0, 0, 200, 30, 10])
  palette = _reopened(palette, "PNG", transparency=b"\x80\x40")
  keyed = _reopened(
    Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3)
  )
  given = [half, none, grey, palette, keyed]
  got = images.preprocess(given, 4, resample="bicubic")
  colours = [(0, 0, 255), (9, 8, 7), (50, 50, 50), (200, 30, 10), (1, 2, 3)]
  for pixels, colour in zip(got, colours, strict=True):
    assert (pixels == colour).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_grey_is_scaled_where_pillow_would_clip(mode):
  values = np.array([[0, 129], [32768, 65535]], np.uint16)
  kind = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
  image = Image.frombytes(mode, (2, 2), values.astype(kind).tobytes())
  got = images.preprocess([image], 2, resample="bicubic")
  # value / 257, to the nearest.
  assert got[0, :, :, 0].tolist() == [[0, 1], [128, 255]]
  assert (got == got[..., :1]).all()


@pytest.mark.parametrize("image, said", [
  (Image.new("F", (4, 4)), "float pixels .mode F. have no known range"),
  (Image.new("I", (4, 4), 70_000), "grey values outside 0..65535"),
  (Image.new("I", (4, 4), -1), "grey values outside 0..65535"),
  (Image.new("La", (4, 4)), "mode La has no conversion to RGB"),
  (Image.new("RGB", (0, 4)), "the image has no pixels"),
  (np.zeros((4, 4, 3)), r"uint8 \[H, W, 3\], not float64 \[4, 4, 3\]"),
  (np.zeros((4, 4), np.uint8), r"not uint8 \[4, 4\]"),
  (np.zeros((4, 4, 4), np.uint8), r"not uint8 \[4, 4, 4\]"),
  (np.zeros((3, 4, 4), np.uint8), r"not uint8 \[3, 4, 4\]"),
  (np.zeros((0, 4, 3), np.uint8), r"not uint8 \[0, 4, 3\]"),
  ("a.png", "str is neither a PIL image nor an array; .* PIL.Image.open"),
])  # fmt: skip
def test_what_has_no_meaning_is_refused_by_its_place(image, said):
  good = Image.new("RGB", (4, 4))
  with pytest.raises(InputError, match=rf"^images\[1\]: .*{said}"):
    images.preprocess([good, image], 4, resample="bicubic")


def test_a_damaged_file_a_single_image_and_a_wrong_name_are_refused():
  stream = io.BytesIO()
  Image.fromarray(_noise()).save(stream, "JPEG")
  cut = Image.open(io.BytesIO(stream.getvalue()[:-200]))
  with pytest.raises(InputError, match=r"images\[0\]: cannot decode .*trunc"):
    images.preprocess([cut], SIZE, resample="bicubic")
  with pytest.raises(InputError, match="give a list of images"):
    images.preprocess(Image.new("RGB", (4, 4)), SIZE, resample="bicubic")
  with pytest.raises(InputError, match="resample='cubic' is none of"):
    images.preprocess([], SIZE, resample="cubic")
