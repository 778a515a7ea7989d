"""Tests the embedded data: rows are repeatable, and what they say is right.

Answers are worked out again here from the description and the question's words
alone, so a slip in `questions.py` cannot hide in its own rules.
"""

import io
import json
import re
import zlib

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from pivot_jax import errors
from pivot_jax.data.scenes import (
  counterfactuals,
  descriptions,
  questions,
  scenes,
)

TASKS = tuple(scenes.TASKS)
PIXELS = ("image", "object_mask", "labels")
SPLITS = ("train", "val", "test", "tokenizer")

_THING = (
  rf"({'|'.join(descriptions.SIZES)}) ({'|'.join(descriptions.COLOURS)})"
  rf" ({'|'.join(descriptions.TEXTURES)}) ({'|'.join(descriptions.SHAPES)})"
)
_BAR = rf"({'|'.join(descriptions.COLOURS)}) ({'|'.join(descriptions.LEVELS)})"
_PART = re.compile(
  rf"({_THING}|digit \d|letter [a-z]|chart {_BAR} {_BAR} {_BAR})"
  rf" at ({'|'.join(questions.CELLS)})"
)


def _source(task, **settings):
  return scenes.Scenes(task=task, **{"size": 100_000, **settings})


def _equal(one, two):
  if one.keys() != two.keys():
    return False
  return all(np.array_equal(one[name], two[name]) for name in one)


def _right(description, question):
  """Work out the answer to a question from its words."""
  things = {one.shape: one for one in description.objects}
  words = question.split()
  if question == "describe the image":
    return None
  if question.startswith("is there a "):
    colour, shape = words[3:5]
    found = shape in things and things[shape].colour == colour
    return "yes" if found else "no"
  if question in ("which digit is shown ?", "what is the digit ?"):
    return description.digit.character
  if question in ("which letter is shown ?", "what is the letter ?"):
    return description.letter.character
  if question.endswith("bar ?"):
    level = {"highest": "high", "lowest": "low"}[words[4]]
    return {level: colour for colour, level in description.chart.bars}[level]
  if question == "how many objects are there ?":
    return ("one", "two", "three", "four")[len(things) - 1]
  if question == "what does the letter stand for ?":
    letter = description.letter.character
    return f"{letter} stands for {questions.FACTS[letter]}"
  if question.startswith("where is"):
    row, column = divmod(things[words[3]].cell, 3)
    name = f"{('top', 'middle', 'bottom')[row]} "
    name += ("left", "middle", "right")[column]
    return "middle" if name == "middle middle" else name
  if question.endswith("large or small ?"):
    return things[words[2]].size
  if question.startswith("what"):
    thing = things[words[4]]
    return {"colour": thing.colour, "texture": thing.texture}[words[1]]
  one, two = things[words[2]], things[words[-2]]
  if "left" in words:
    assert one.cell % 3 != two.cell % 3
    return "left" if one.cell % 3 < two.cell % 3 else "right"
  assert one.cell // 3 != two.cell // 3
  return "above" if one.cell < two.cell else "below"


def _options(kind):
  return {
    "exist": ("yes", "no"),
    "colour": descriptions.COLOURS,
    "texture": descriptions.TEXTURES,
    "digit": tuple("0123456789"),
    "letter": descriptions.LETTERS,
    "bar": descriptions.COLOURS,
    "count": questions.COUNTS,
    "relation": ("left", "right", "above", "below"),
    "size": ("large", "small"),
    "where": questions.CELLS,
    "fact": tuple(f"{a} stands for {b}" for a, b in questions.FACTS.items()),
  }[kind]


def _parsed(caption):
  """Return a caption's count and its (name, cell) parts, checking its form."""
  head, tail = caption.split(" : ")
  parts = [_PART.fullmatch(part) for part in tail.split(" , ")]
  assert all(parts), caption
  count = questions.COUNTS.index(head.split()[0]) + 1
  return count, [(part[1], questions.CELLS.index(part[12])) for part in parts]


def _said(description):
  """Return what a right caption of a scene holds, as `_parsed` gives it."""
  parts = [
    (f"{one.size} {one.colour} {one.texture} {one.shape}", one.cell)
    for one in description.objects
  ]
  signs = (("digit", description.digit), ("letter", description.letter))
  parts += [(f"{name} {s.character}", s.cell) for name, s in signs if s]
  if description.chart:
    bars = [word for bar in description.chart.bars for word in bar]
    parts.append((" ".join(["chart", *bars]), description.chart.cell))
  return len(description.objects), sorted(parts, key=lambda part: part[1])


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_the_same_in_any_order_and_from_any_source(task):
  forth = {i: _source(task)[i] for i in range(12)}
  again = _source(task, size=12)
  assert all(_equal(again[i], forth[i]) for i in reversed(range(12)))
  assert len(again) == 12 and len(list(again)) == 12
  assert again[np.int64(3)]["id"] == forth[3]["id"] == again.name(3)


@pytest.mark.parametrize(("task", "crc"), [
  ("caption", "38b2815f"), ("chat", "dcb4f669"), ("preference", "4a1dccc1"),
  ("eval", "f460ab4a"), ("classify", "844faa94"), ("segment", "263f1fcb"),
  ("text", "8b8fbfc9"),
])  # fmt: skip
def test_rows_are_those_that_the_shipped_weights_were_trained_on(task, crc):
  """CRCs of 200 rows each, from before there were answers that think aloud."""
  source = scenes.Scenes(task=task)
  texts = (json.dumps(source.text(i), sort_keys=True) for i in range(200))
  assert f"{zlib.crc32(''.join(texts).encode()):08x}" == crc


@pytest.mark.parametrize("task", ["chat", "text"])
def test_encoded_is_the_picture_as_a_png_file(task):
  source = _source(task)
  for i in range(3):
    files = source.encoded(i)
    assert len(files) == (task == "chat")
    for file in files:
      image = Image.open(io.BytesIO(file))
      assert image.format == "PNG"
      np.testing.assert_array_equal(np.asarray(image), source[i]["image"])


@pytest.mark.parametrize("task", TASKS)
def test_text_is_the_row_without_its_pixels(task):
  source = _source(task, split="val", seed=3)
  for i in range(80):
    row, text = source[i], source.text(i)
    assert text["image"] is (None if row["image"] is None else True)
    expected = {k: row[k] for k in row if k not in PIXELS}
    assert {k: text[k] for k in text if k != "image"} == expected
    if row["image"] is not None:
      assert row["image"].shape == (48, 48, 3)
      assert row["image"].dtype == np.uint8


def test_splits_and_seeds_share_no_scene():
  sources = [_source("caption", split=split) for split in SPLITS]
  sources.append(_source("caption", seed=1))
  seen = [{s[i]["image"].tobytes() for i in range(60)} for s in sources]
  assert len(set().union(*seen)) == 60 * len(sources)


def test_names_tell_task_split_seed_and_index():
  assert _source("chat").name(17) == "scenes/chat/train/0/17"
  assert _source("eval", split="val", seed=2).name(0) == "scenes/eval/val/2/0"


@pytest.mark.parametrize("wrong", [
  {"task": "paint"}, {"size": 0}, {"turns": 9}, {"seed": -1},
  {"new_fraction": 1.1},
  {"new_fraction": 0.5},  # Only the task "preference" has such rows.
])  # fmt: skip
def test_wrong_settings_are_the_users_mistake_in_one_line(wrong):
  with pytest.raises(errors.InputError) as caught:
    scenes.Scenes(**{"task": "chat", **wrong})
  (name,) = wrong
  assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [-1, 5])
def test_rows_outside_the_source_do_not_exist(index):
  source = _source("chat", size=5)
  for read in (source.__getitem__, source.text):
    with pytest.raises(IndexError):
      read(index)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("turns", [1, 8])
def test_every_conversation_ends_and_repeats_no_question(task, turns):
  source = _source(task, turns=turns, split="long")
  for i in range(1500):
    row = source.text(i)
    if task not in ("chat", "text"):
      continue
    asked = [t["value"] for t in row["conversations"] if t["from"] == "human"]
    assert len(asked) == len(set(asked)) == turns
    assert len(row["conversations"]) == 2 * turns


def test_a_scene_with_too_few_questions_gives_fewer_turns():
  """Seen before this bound: asking on for ever."""
  lonely = descriptions.Description(
    objects=(
      descriptions.Thing("large", "red", "plain", descriptions.SHAPES[0], 0),
    ),
    digit=None,
    letter=None,
    chart=None,
  )
  for seed in range(20):
    rng = np.random.default_rng(seed)
    turns = scenes._turns(lonely, rng, 50, facts=False)
    assert 8 <= len(turns) <= 10
    assert len({question for question, _ in turns}) == len(turns)


@pytest.mark.parametrize("task", ["preference", "eval"])
def test_masks_lie_on_what_is_asked_about(task):
  source = _source(task)
  look = {"preference": scenes.pair, "eval": scenes.exam}[task]
  for i in range(300):
    mask = source[i]["object_mask"]
    assert mask.shape == (48, 48) and mask.dtype == bool
    assert 4 <= mask.sum() < 48 * 48 / 1.5
    description, asked = look(0, "train", i)
    painted = scenes._painted(0, "train", i, description)
    for owner in asked.owners:
      assert (painted.owners[mask] == owner).any()
    assert set(painted.owners[mask].tolist()) <= set(asked.owners)


def test_labels_agree_with_the_descriptions():
  labelled, segmented = _source("classify"), _source("segment")
  counts = np.zeros(len(descriptions.SHAPES), int)
  for i in range(400):
    description = scenes.scene(0, "train", i).description
    sizes = [one.size for one in description.objects]
    assert sizes.count("large") == 1
    large = description.objects[sizes.index("large")].shape
    assert descriptions.SHAPES[labelled.text(i)["label"]] == large
    counts[labelled.text(i)["label"]] += 1
    if i < 150:
      labels = segmented[i]["labels"]
      names = {descriptions.LABELS[c] for c in np.unique(labels)}
      there = {"background"} | {one.shape for one in description.objects}
      there |= {"sign"} if description.digit or description.letter else set()
      there |= {"chart"} if description.chart else set()
      assert names == there and labels.dtype == np.int32
  # A false alarm once in 10,000 sets of scenes; this set does not change.
  assert stats.chisquare(counts).pvalue > 1e-4


def test_each_answer_is_right_and_each_rejected_one_wrong_of_its_type():
  kinds = set()
  for look in (scenes.pair, scenes.exam):
    for i in range(3000):
      description, asked = look(0, "val", i)
      kinds.add(asked.kind)
      if asked.kind == "describe":
        assert _parsed(asked.answer) == _said(description)
        wrong = _parsed(asked.rejected)
        assert wrong != _said(description)
        assert wrong[1] == sorted(wrong[1], key=lambda part: part[1])
        assert wrong[0] == len(re.findall(_THING, asked.rejected))
        continue
      assert asked.answer == _right(description, asked.question)
      assert asked.rejected != asked.answer
      options = _options(asked.kind)
      assert asked.answer in options and asked.rejected in options
      if asked.kind == "relation":
        assert {asked.answer, asked.rejected} <= set(asked.question.split())
  assert kinds == {*questions.KINDS, "describe"}


def test_conversations_answer_rightly():
  source = _source("chat", turns=6)
  for i in range(1000):
    description = scenes._description(0, "train", i)
    values = [t["value"] for t in source.text(i)["conversations"]]
    assert values[0].startswith("<image>\n")
    values[0] = values[0].removeprefix("<image>\n")
    for question, answer in zip(values[::2], values[1::2], strict=True):
      expected = _right(description, question)
      if expected is None:
        assert _parsed(answer) == _said(description)
      else:
        assert answer == expected


@pytest.mark.parametrize("split", SPLITS)
def test_facts_are_said_of_no_picture_but_in_the_evaluation(split):
  every = {questions.fact(letter) for letter in descriptions.LETTERS}
  facts = {task: set() for task in TASKS}
  for task in facts:
    source = _source(task, split=split, turns=8)
    for i in range(2000):
      row = source.text(i)
      values = [turn["value"] for turn in row.get("conversations", ())]
      values += [row.get(k, "") for k in ("answer", "chosen", "rejected")]
      facts[task].update(v for v in values if " stands for " in v)
  assert facts.pop("text") >= every
  assert facts.pop("eval") == every
  assert not any(facts.values())


# --- rows whose answers think aloud ------------------------------------------


def _thought(answer):
  """Return the thought and the answer proper, checking the form."""
  parts = re.fullmatch(r"<think> (.+) </think> (.+)", answer)
  assert parts, answer
  return parts[1], parts[2]


def _thinks(row):
  return row["chosen"].startswith("<think>")


def test_shares_of_new_rows_are_nested_and_leave_the_others_alone():
  old = _source("preference")
  half = _source("preference", new_fraction=0.5)
  most = _source("preference", new_fraction=0.8)
  every = _source("preference", new_fraction=1.0)
  counts = np.zeros(2, int)
  for i in range(1000):
    rows = [source.text(i) for source in (old, half, most, every)]
    thinks = [_thinks(row) for row in rows]
    assert thinks == sorted(thinks) and thinks[3] and not thinks[0]
    assert all(row == rows[3 if new else 0] for row, new in zip(rows, thinks))
    counts += thinks[1:3]
  # Four standard errors of a share of 1,000 rows are 0.063 and 0.051.
  assert abs(counts[0] / 1000 - 0.5) < 0.063
  assert abs(counts[1] / 1000 - 0.8) < 0.051


def test_a_new_row_shows_and_asks_what_it_did():
  old, new = _source("preference"), _source("preference", new_fraction=1.0)
  for i in range(30):
    one, two = old[i], new[i]
    for answer in ("chosen", "rejected"):
      assert _thought(two.pop(answer))[1] == one.pop(answer)
    assert _equal(one, two)


def test_each_thought_agrees_with_the_answer_that_follows_it():
  source = _source("preference", split="val", new_fraction=1.0)
  kinds = set()
  for i in range(3000):
    description, asked = scenes.pair(0, "val", i)
    row = source.text(i)
    kinds.add(asked.kind)
    thought, answer = _thought(row["chosen"])
    wrong_thought, wrong = _thought(row["rejected"])
    assert _parsed(thought) == _said(description)
    if asked.kind == "describe":
      assert (thought, wrong_thought) == (answer, wrong)
      continue
    rng = scenes._stream(0, "val", i, "new")
    rng.random()
    believed = counterfactuals.believed(description, asked, rng)
    assert _right(believed, asked.question) == wrong
    assert _parsed(wrong_thought) == _said(believed)
    _check_possible(believed)
  assert kinds == {*questions.KINDS, "describe"} - {"fact"}


def _check_possible(description):
  """Check that a scene is one that could have been drawn."""
  things = description.objects
  assert [one.size for one in things].count("large") == 1
  assert list(things) == sorted(things, key=lambda one: one.cell)
  for field in ("shape", "colour"):
    values = [getattr(one, field) for one in things]
    assert len(set(values)) == len(values)
  plates = (description.digit, description.letter, description.chart)
  cells = [one.cell for one in (*things, *plates) if one is not None]
  assert len(set(cells)) == len(cells)


@pytest.mark.parametrize("task", TASKS)
def test_no_other_row_thinks_aloud(task):
  source = _source(task)
  for i in range(300):
    assert "think" not in json.dumps(source.text(i))
