"""Scenes: what rows hold, that answers are true, and that pictures show it."""

import collections
import re

import numpy as np
import pytest

from pivot_jax.data import drawing, layout, misnaming, questions, scenes

SOME = 300  # rows that a property is checked on

_ITEM = re.compile(
  r"(?:(?P<size>large|small) (?P<colour>\w+) (?P<texture>\w+) (?P<shape>\w+)"
  r"|digit (?P<digit>\d)|letter (?P<letter>[a-z])|chart (?P<chart>[\w ]+?))"
  r" at (?P<cell>[\w ]+)"
)


def _parse(caption):
  """Reads a caption back, by other means than those that wrote it."""
  head, _, body = caption.partition(" : ")
  found = {"objects": [], "digit": None, "letter": None, "chart": None}
  for part in body.split(" , "):
    item = _ITEM.fullmatch(part).groupdict()
    cell = questions.CELLS.index(item["cell"])
    if item["shape"]:
      words = (item[key] for key in ("size", "colour", "texture", "shape"))
      found["objects"].append(layout.Thing(*words, cell))
    for name in ("digit", "letter"):
      if item[name]:
        found[name] = layout.Sign(item[name], cell)
    if item["chart"]:
      words = item["chart"].split()
      bars = tuple(zip(words[::2], words[1::2]))
      found["chart"] = layout.Chart(bars, cell)
  found["objects"] = tuple(found["objects"])
  return head, layout.Description(**found)


def _answer(description, kind, question):
  """Answers from the fields of a scene, reading the question's words."""
  words = question.split()
  by_shape = {one.shape: one for one in description.objects}
  named = [by_shape[word] for word in words if word in by_shape]
  if kind == "exist":
    pairs = {(one.colour, one.shape) for one in description.objects}
    return "yes" if (words[3], words[4]) in pairs else "no"
  if kind in ("digit", "letter"):
    signs = {"digit": description.digit, "letter": description.letter}
    return signs[kind].character
  if kind == "bar":
    level = {"highest": "high", "lowest": "low"}[words[4]]
    return next(name for name, at in description.chart.bars if at == level)
  if kind == "count":
    return ("one", "two", "three", "four")[len(description.objects) - 1]
  if kind == "relation":
    (row, column), (row2, column2) = (divmod(one.cell, 3) for one in named)
    if "left" in words:
      assert column != column2
      return "left" if column < column2 else "right"
    assert row != row2
    return "above" if row < row2 else "below"
  if kind == "fact":
    letter = description.letter.character
    return f"{letter} stands for {questions.FACTS[letter]}"
  (one,) = named
  return {
    "colour": one.colour,
    "texture": one.texture,
    "size": one.size,
    "where": questions.CELLS[one.cell],
  }[kind]


def _flat(value):
  return value.tobytes() if isinstance(value, np.ndarray) else value


def _same(row, other):
  return {k: _flat(v) for k, v in row.items()} == {
    k: _flat(v) for k, v in other.items()
  }


@pytest.mark.parametrize("task", scenes.TASKS)
def test_a_row_is_the_same_in_any_order_and_any_source(task):
  source = scenes.Scenes(task=task, seed=1, size=20)
  backwards = [source[i] for i in reversed(range(20))][::-1]
  longer = scenes.Scenes(task=task, seed=1, size=50)
  for i in range(20):
    assert _same(source[i], backwards[i])
    assert _same(source[i], longer[i])


@pytest.mark.parametrize("task", scenes.TASKS)
def test_rows_carry_the_keys_and_types_of_their_task(task):
  row = scenes.Scenes(task=task, split="val", seed=3, size=5)[4]
  conversation = {"id", "image", "conversations"}
  asked = {"id", "image", "question", "category", "kind", "object_mask"}
  keys = {
    "caption": conversation,
    "chat": conversation,
    "text": conversation,
    "preference": asked | {"chosen", "rejected"},
    "eval": asked | {"answer"},
    "classify": {"id", "image", "label"},
    "segment": {"id", "image", "labels"},
  }
  assert set(row) == keys[task]
  assert row["id"] == f"scenes/{task}/val/3/4"
  if task == "text":
    assert row["image"] is None
  else:
    assert row["image"].shape == (48, 48, 3)
    assert row["image"].dtype == np.uint8
  if "object_mask" in row:
    assert row["object_mask"].shape == (48, 48)
    assert row["object_mask"].dtype == bool


def test_a_row_does_not_depend_on_machine_or_session():
  one = scenes.scene(0, "train", 0)
  assert questions.caption(one.description) == GOLDEN_CAPTION
  # Content is exact everywhere; pixels may round differently, hence the sum.
  assert abs(float(one.image.mean()) - GOLDEN_MEAN) < 0.01


def test_splits_and_seeds_share_no_scene():
  seen = collections.Counter()
  for split in ("train", "val", "test", "probe_train", "probe_test"):
    for seed in (0, 1):
      for i in range(40):
        seen[scenes.scene(seed, split, i).image.tobytes()] += 1
  assert len(seen) == 400


def test_sources_refuse_what_they_cannot_make():
  for wrong in (
    {"task": "nothing"},
    {"task": "chat", "seed": -1},
    {"task": "chat", "seed": 2**32},
    {"task": "chat", "size": 0},
    {"task": "chat", "turns": 9},
  ):
    with pytest.raises(ValueError):
      scenes.Scenes(**wrong)
  source = scenes.Scenes(task="chat", size=3)
  for index in (-1, 3):
    with pytest.raises(IndexError):
      source[index]
  assert len(list(source)) == 3


def test_scenes_hold_what_they_should():
  counts, labels = collections.Counter(), collections.Counter()
  plates = collections.Counter()
  for i in range(2000):
    one = scenes.pair(0, "contents", i)[0]
    objects = one.objects
    assert len({thing.shape for thing in objects}) == len(objects)
    assert len({thing.colour for thing in objects}) == len(objects)
    assert [thing.size for thing in objects].count("large") == 1
    assert len(one.free_cells) == 9 - len(objects) - sum(
      plate is not None for plate in (one.digit, one.letter, one.chart)
    )
    assert [t.cell for t in objects] == sorted(t.cell for t in objects)
  for i in range(2000):
    one = scenes._description(0, "contents", i)
    counts[len(one.objects)] += 1
    labels[one.label] += 1
    for name in ("digit", "letter", "chart"):
      plates[name] += getattr_free(one, name) is not None
  # Five standard deviations of a binomial with n = 2000.
  assert all(abs(counts[n] - 500) < 5 * 20 for n in (1, 2, 3, 4))
  assert len(labels) == 8 and all(abs(n - 250) < 75 for n in labels.values())
  assert all(abs(n - 1000) < 5 * 23 for n in plates.values())


def getattr_free(description, name):
  return {
    "digit": description.digit,
    "letter": description.letter,
    "chart": description.chart,
  }[name]


def test_captions_say_everything_and_only_that():
  for i in range(SOME):
    one = scenes._description(0, "captions", i)
    text = questions.caption(one)
    head, parsed = _parse(text)
    assert parsed == one
    count = len(one.objects)
    noun = "object" if count == 1 else "objects"
    assert head == f"{questions.COUNTS[count - 1]} {noun}"


def test_every_answer_is_true_and_every_rejected_one_is_not():
  kinds = collections.Counter()
  for maker in (scenes.pair, scenes.exam):
    for i in range(1500):
      description, asked = maker(0, "answers", i)
      kinds[asked.kind] += 1
      assert asked.rejected != asked.answer
      if asked.kind != "describe":
        truth = _answer(description, asked.kind, asked.question)
        assert asked.answer == truth
  assert set(kinds) == {*questions.KINDS, "describe"}
  assert min(kinds.values()) > 50


def test_a_rejected_caption_is_a_scene_that_differs_in_one_detail():
  rng = np.random.default_rng(0)
  for i in range(SOME):
    one = scenes._description(0, "misnamed", i)
    wrong, owners = misnaming.misname(one, rng)
    head, parsed = _parse(questions.caption(wrong))
    assert parsed == wrong != one
    assert head.split()[0] == questions.COUNTS[len(wrong.objects) - 1]
    assert [t.size for t in wrong.objects].count("large") == 1
    assert len({t.colour for t in wrong.objects}) == len(wrong.objects)
    assert len({t.shape for t in wrong.objects}) == len(wrong.objects)
    gone = set(one.objects) - set(wrong.objects)
    assert len(gone) <= 2 and abs(len(wrong.objects) - len(one.objects)) <= 1
    plates = ("digit", "letter", "chart")
    changed = [
      name
      for name in plates
      if getattr_free(one, name) != getattr_free(wrong, name)
    ]
    assert len(changed) + (one.objects != wrong.objects) == 1
    assert owners


def test_chat_turns_are_different_questions_with_true_answers():
  for task, turns in (("chat", 8), ("text", 8), ("chat", 1)):
    source = scenes.Scenes(task=task, size=SOME, turns=turns)
    for row in source:
      talk = row["conversations"]
      assert [turn["from"] for turn in talk] == ["human", "gpt"] * turns
      asked = [turn["value"] for turn in talk[::2]]
      assert len(set(asked)) == turns
      opening = "<image>\n" if task == "chat" else ""
      assert asked[0].startswith(opening)
      assert not any("<image>" in turn["value"] for turn in talk[1:])


def test_text_rows_can_be_answered_from_their_caption_alone():
  answered = 0
  for row in scenes.Scenes(task="text", size=SOME, turns=4):
    talk = [turn["value"] for turn in row["conversations"]]
    if "\n" not in talk[0]:
      assert all("stands for" in answer for answer in talk[1::2])
      continue
    text, talk[0] = talk[0].split("\n")
    description = _parse(text)[1]
    for question, answer in zip(talk[::2], talk[1::2]):
      if question == questions.DESCRIBE:
        assert answer == text
      else:
        assert answer == _answer(description, _kind(question), question)
      answered += 1
  assert answered > 500


def _kind(question):
  starts = {
    "is there": "exist",
    "what colour is the highest": "bar",
    "what colour is the lowest": "bar",
    "what colour": "colour",
    "what texture": "texture",
    "which digit": "digit",
    "which letter": "letter",
    "how many": "count",
    "where": "where",
    "what does the letter": "fact",
  }
  for start, kind in starts.items():
    if question.startswith(start):
      return kind
  return "size" if "large" in question else "relation"


def test_held_out_facts_are_asked_in_the_evaluation_alone():
  held_out = {questions.FACTS[letter] for letter in questions.HELD_OUT}
  taught = {questions.FACTS[letter] for letter in questions.TAUGHT}
  assert len(held_out) == 4 and len(taught) == 6 and not held_out & taught
  words = collections.defaultdict(set)
  for split in ("train", "val"):
    for task in ("caption", "chat"):
      for row in scenes.Scenes(task=task, split=split, size=SOME, turns=6):
        for turn in row["conversations"]:
          words[task].update(turn["value"].split())
    for i in range(3000):
      asked = scenes.pair(0, split, i)[1]
      for text in (asked.question, asked.answer, asked.rejected):
        words["preference"].update(text.split())
      asked = scenes.exam(0, split, i)[1]
      words["eval"].update(asked.answer.split())
  for row in scenes.Scenes(task="text", size=SOME):
    for turn in row["conversations"]:
      words["text"].update(turn["value"].split())
  assert not held_out & (words["caption"] | words["chat"] | words["preference"])
  assert taught <= words["chat"] and taught <= words["preference"]
  assert held_out <= words["eval"] and not taught & words["eval"]
  assert held_out | taught <= words["text"]
  # Every letter is looked at in training, held out or not.
  assert set(layout.LETTERS) <= words["caption"] & words["chat"]


def test_the_evaluation_takes_categories_and_kinds_in_turn():
  rows = [scenes.exam(0, "test", i)[1] for i in range(48)]
  assert [row.category for row in rows[:5]] == [
    "general",
    "knowledge",
    "ocr",
    "vision",
    "general",
  ]
  kinds = collections.Counter(row.kind for row in rows)
  for names in scenes.EVAL_KINDS.values():
    assert len({kinds[name] for name in names}) == 1


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
      assert (bottom - top >= 14) == (thing.size == "large")
      mask = one.mask((owner,))
      assert mask.any()
      inside = np.zeros((48, 48), bool)
      whole = drawing.shape_mask(thing.shape, bottom - top)
      inside[top:bottom, left:right] = whole
      assert not (mask & ~inside).any()
      assert mask.sum() >= 0.5 * whole.sum()
      name = layout.LABELS[labels[mask][0]]
      assert name == thing.shape and (labels[mask] == labels[mask][0]).all()
      middle = divmod(thing.cell, 3)
      assert abs((top + bottom) / 2 - 16 * middle[0] - 8) <= 4
      assert abs((left + right) / 2 - 16 * middle[1] - 8) <= 4
      covered |= mask
    for owner, name, least in (
      (layout.DIGIT, "digit", 14 * 16 * 0.8),
      (layout.LETTER, "letter", 14 * 16 * 0.8),
      (layout.CHART, "chart", 256),
    ):
      mask = one.mask((owner,))
      there = getattr_free(one.description, name) is not None
      assert there == mask.any()
      if there:
        assert mask.sum() >= least
        label = "chart" if name == "chart" else "sign"
        assert (labels[mask] == layout.LABELS.index(label)).all()
      covered |= mask
    assert (labels[~covered] == 0).all()


def test_asked_about_things_are_in_the_mask():
  for row in scenes.Scenes(task="preference", split="masks", size=SOME):
    assert row["object_mask"].any()
    assert not row["object_mask"].all()
  description, asked = scenes.pair(0, "masks", 3)
  row = scenes.Scenes(task="preference", split="masks", size=4)[3]
  painted = scenes._painted(0, "masks", 3, description)
  assert (row["object_mask"] == painted.mask(asked.owners)).all()
  assert (row["image"] == painted.image).all()


def test_labels_and_captions_belong_to_the_same_picture():
  sources = {
    task: scenes.Scenes(task=task, size=SOME)
    for task in ("caption", "chat", "classify", "segment")
  }
  for i in range(50):
    rows = {task: source[i] for task, source in sources.items()}
    assert len({row["image"].tobytes() for row in rows.values()}) == 1
    caption = rows["caption"]["conversations"][1]["value"]
    large = re.search(r"large \w+ \w+ (\w+)", caption).group(1)
    label = rows["classify"]["label"]
    assert layout.SHAPES[label] == large
    assert (rows["segment"]["labels"] == label + 1).any()


def test_shapes_and_colours_can_be_told_from_the_pixels():
  """Finds an object's pixels by colour, its shape by the nearest template."""
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
      shades = base * np.array([[1.0], [0.58]])
      near = np.abs(crop[:, :, None] - shades).max(-1).min(-1) < 40
      overlaps = {
        shape: (near & template).sum() / (near | template).sum()
        for shape in layout.SHAPES
        for template in [drawing.shape_mask(shape, bottom - top)]
      }
      right_shape += max(overlaps, key=overlaps.get) == thing.shape
      looked += 1
  assert looked > 400
  assert right_colour == looked
  assert right_shape >= 0.98 * looked


def test_characters_differ_from_one_another():
  characters = layout.DIGITS + layout.LETTERS
  masks = {one: drawing.glyph_mask(one) for one in characters}
  for one in characters:
    assert masks[one].shape == (14, 10)
    for other in characters:
      # Four pixels are one dot of the 5 x 7 font.
      assert one == other or (masks[one] ^ masks[other]).sum() >= 3 * 4


def test_textures_differ_inside_every_shape():
  for shape in layout.SHAPES:
    for pixels in (10, 11, 14, 15):
      mask = drawing.shape_mask(shape, pixels)
      dark = {
        texture: (drawing._shades(texture, pixels) < 1)[mask].mean()
        for texture in layout.TEXTURES
      }
      assert dark["solid"] == 0
      assert 0.1 < dark["dotted"] < 0.4 < dark["striped"] < 0.6


GOLDEN_CAPTION = ""
GOLDEN_MEAN = 0.0
