"""From an entry of a config to the pixels that are learnt from."""

import json

import numpy as np
from PIL import Image

from pivot_jax.data import opener
from tests.data.streams_test import coder, opened


def test_several_images_are_padded_to_squares_and_one_is_squashed(tmp_path):
  rng = np.random.default_rng(0)
  wide, tall = (
    rng.integers(0, 256, shape, np.uint8)
    for shape in ((20, 60, 3), (50, 30, 3))
  )
  for name, image in (("wide", wide), ("tall", tall)):
    Image.fromarray(image).save(tmp_path / f"{name}.png")
  rows = [
    dict(image="wide.png", question="q", chosen="yes", rejected="no"),
    dict(
      image=["wide.png", "tall.png"],
      question="<image> or <image>",
      chosen="yes",
      rejected="no",
    ),
  ]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = opened(dict(kind="preference", path=str(path)))
  by_id = {e.id: e.images for e in found.examples(range(2))}

  def squashed(image):
    return np.array(Image.fromarray(image).resize((48, 48), Image.BICUBIC))

  np.testing.assert_array_equal(by_id["rows-0"][0], squashed(wide))
  square = np.full((60, 60, 3), 127, np.uint8)
  square[20:40] = wide
  np.testing.assert_array_equal(by_id["rows-1"][0], squashed(square))
  square = np.full((50, 50, 3), 127, np.uint8)
  square[:, 10:40] = tall
  np.testing.assert_array_equal(by_id["rows-1"][1], squashed(square))
  # A coder pads by itself where a source gives images as they are.
  raw = opener.open_source(dict(kind="preference", path=str(path)))[1]
  for one, other in zip(coder().pixels(raw["image"]), by_id["rows-1"]):
    np.testing.assert_array_equal(one, other)


def test_a_decoder_is_the_one_that_pixels_come_from(tmp_path):
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
  image.resize((400, 300), Image.BICUBIC).save(tmp_path / "a.jpg", quality=88)
  row = dict(image="a.jpg", question="q", chosen="yes", rejected="no")
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps(row) + "\n")
  spec = dict(kind="preference", path=str(path))
  exact, fast = (
    opened(spec, decoder=name).example(0).images[0].astype(int)
    for name in ("pil", "pil_draft")
  )
  assert 0 < np.abs(exact - fast).mean() < 6


def test_a_crop_is_cut_once(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8)
  Image.fromarray(noise).save(tmp_path / "a.png")
  row = dict(image="a.png", question="q", chosen="yes", rejected="no")
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps(row) + "\n")
  how = coder(resample="crop_bicubic:64")
  found = opened(dict(kind="preference", path=str(path)), how).example(0)
  np.testing.assert_array_equal(found.images[0], how.pixels(noise)[0])
