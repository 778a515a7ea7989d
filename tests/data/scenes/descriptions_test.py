"""Pictures: masks and labels are true, and a person could tell things apart."""

import collections

import numpy as np

from pivot_jax.data.scenes import descriptions, drawing, questions, scenes

SOME = 300  # scenes that a property is checked on

GOLDEN_CAPTION = (
  "three objects : letter h at top left , small pink solid cross at top right"
  " , small green dotted ring at middle , digit 4 at middle right ,"
  " large blue dotted triangle at bottom middle"
)
GOLDEN_MEAN = 137.5327  # of the pixels, which may round otherwise elsewhere


def _plate(description, name):
  return {
    "digit": description.digit,
    "letter": description.letter,
    "chart": description.chart,
  }[name]


def test_a_scene_is_the_same_on_every_machine():
  one = scenes.scene(0, "train", 0)
  assert questions.caption(one.description) == GOLDEN_CAPTION
  assert abs(float(one.image.mean()) - GOLDEN_MEAN) < 0.01


def test_counts_shapes_and_plates_are_uniform():
  counts, labels = collections.Counter(), collections.Counter()
  plates = collections.Counter()
  for i in range(2000):
    one = scenes._description(0, "contents", i)
    objects = one.objects
    assert len({thing.shape for thing in objects}) == len(objects)
    assert len({thing.colour for thing in objects}) == len(objects)
    assert [thing.size for thing in objects].count("large") == 1
    assert [t.cell for t in objects] == sorted(t.cell for t in objects)
    counts[len(objects)] += 1
    labels[one.label] += 1
    there = [_plate(one, name) for name in ("digit", "letter", "chart")]
    plates.update(i for i, plate in enumerate(there) if plate is not None)
    taken = len(objects) + sum(plate is not None for plate in there)
    assert len(one.free_cells) == 9 - taken
  # Five standard deviations of a binomial with n = 2000.
  assert all(abs(counts[n] - 500) < 5 * 20 for n in (1, 2, 3, 4))
  assert all(abs(labels[n] - 250) < 5 * 15 for n in range(8))
  assert all(abs(plates[n] - 1000) < 5 * 23 for n in range(3))


def test_masks_and_labels_agree_with_the_objects():
  for i in range(SOME):
    one = scenes.scene(0, "masks", i)
    labels = one.labels
    assert labels.dtype == np.int32 and labels.shape == (48, 48)
    covered = np.zeros((48, 48), bool)
    for owner, (thing, box) in enumerate(
      zip(one.description.objects, one.boxes), 1
    ):
      top, left, bottom, right = box
      assert 0 <= top < bottom <= 48 and 0 <= left < right <= 48
      assert bottom - top == right - left
      assert (bottom - top >= 16) == (thing.size == "large")
      mask = one.mask((owner,))
      assert mask.any()
      inside = np.zeros((48, 48), bool)
      whole = drawing.shape_mask(thing.shape, bottom - top)
      inside[top:bottom, left:right] = whole
      assert not (mask & ~inside).any()
      assert mask.sum() >= 0.5 * whole.sum()
      name = descriptions.LABELS[labels[mask][0]]
      assert name == thing.shape and (labels[mask] == labels[mask][0]).all()
      middle = divmod(thing.cell, 3)
      assert abs((top + bottom) / 2 - 16 * middle[0] - 8) <= 4
      assert abs((left + right) / 2 - 16 * middle[1] - 8) <= 4
      covered |= mask
    for owner, name, least in (
      (descriptions.DIGIT, "digit", 14 * 16 * 0.8),
      (descriptions.LETTER, "letter", 14 * 16 * 0.8),
      (descriptions.CHART, "chart", 256),
    ):
      mask = one.mask((owner,))
      there = _plate(one.description, name) is not None
      assert there == mask.any()
      if there:
        assert mask.sum() >= least
        label = "chart" if name == "chart" else "sign"
        assert (labels[mask] == descriptions.LABELS.index(label)).all()
      covered |= mask
    assert (labels[~covered] == 0).all()


def test_shapes_and_colours_can_be_told_from_the_pixels():
  """Find an object's pixels by colour, its shape by the nearest template."""
  names = list(drawing.COLOURS)
  palette = np.array([drawing.COLOURS[name] for name in names], np.float32)
  right_shape, right_colour, looked = 0, 0, 0
  for i in range(SOME):
    one = scenes.scene(0, "pixels", i)
    for owner, thing in enumerate(one.description.objects, 1):
      top, left, bottom, right = one.boxes[owner - 1]
      whole = drawing.shape_mask(thing.shape, bottom - top)
      if one.mask((owner,)).sum() < whole.sum():
        continue  # partly hidden
      crop = one.image[top:bottom, left:right].astype(np.float32)
      bright = crop[whole & (drawing._shades(thing.texture, bottom - top) == 1)]
      distance = np.abs(bright.mean(0) - palette).sum(1)
      right_colour += names[int(distance.argmin())] == thing.colour
      base = palette[names.index(thing.colour)]
      shades = base * np.array([[1.0], [drawing.DARK]])
      near = np.abs(crop[:, :, None] - shades).max(-1).min(-1) < 40
      overlaps = {
        shape: (near & template).sum() / (near | template).sum()
        for shape in descriptions.SHAPES
        for template in [drawing.shape_mask(shape, bottom - top)]
      }
      right_shape += max(overlaps, key=overlaps.get) == thing.shape
      looked += 1
  assert looked > 400
  assert right_colour == looked
  assert right_shape >= 0.98 * looked


def test_characters_differ_from_one_another():
  characters = descriptions.DIGITS + descriptions.LETTERS
  masks = {one: drawing.glyph_mask(one) for one in characters}
  for one in characters:
    assert masks[one].shape == (14, 10)
    for other in characters:
      # Four pixels are one dot of the 5 x 7 font.
      assert one == other or (masks[one] ^ masks[other]).sum() >= 3 * 4


def test_textures_differ_inside_every_shape():
  for shape in descriptions.SHAPES:
    for pixels in (11, 12, 16, 17):
      mask = drawing.shape_mask(shape, pixels)
      dark = {
        texture: (drawing._shades(texture, pixels) < 1)[mask].mean()
        for texture in descriptions.TEXTURES
      }
      assert dark["solid"] == 0
      assert 0.1 < dark["dotted"] < 0.4 < dark["striped"] < 0.6
