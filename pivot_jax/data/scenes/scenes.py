"""The embedded data set: procedural scenes as rows for every stage.

`Scenes` is a random-access source: row i is a pure function of (task, seed,
split, i), nothing is on disk, and splits never share a random stream. The
content of a scene, its look and its texts come from `descriptions.py`,
`drawing.py`, `questions.py` and `counterfactuals.py`; this file only makes rows.
It knows no token and no template.
"""

import io
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from pivot_jax import errors
from pivot_jax.data.scenes import counterfactuals, descriptions, questions

# The evaluation takes the categories in turn, and the kinds within them.
EVAL_KINDS = {
  "general": ("exist", "colour", "texture"),
  "knowledge": ("fact",),
  "ocr": ("digit", "letter", "bar"),
  "vision": ("count", "relation", "size", "where"),
}
CATEGORIES = tuple(EVAL_KINDS)

# Questions about things that only some scenes hold get a scene that has them.
PREFERENCE_KINDS = (
  *(kind for kind in questions.KINDS if kind != "fact"),
  "describe",
  "describe",
)

# The address of the tokenizer of these texts.
TOKENIZER = "package:toy"

_DESCRIBE_SHARE = 1 / 3  # of conversations ask for a caption in one turn
_FACTS_SHARE = 1 / 4  # of text conversations are about facts alone
_MAX_TURNS = 8  # one lonely object allows ten different questions
_MAX_ROUNDS = 64  # of questions of each kind; eight are found in far fewer


class Scenes:
  """A source of rows, one per scene, for one task.

  Tasks and what their rows hold beside `id` and `image` (uint8 [48, 48, 3]):
    caption: conversations, one turn: "<image>\\n", then the caption.
    chat: conversations of `turns` questions about one image.
    preference: question, chosen, rejected, category, kind, object_mask. A
      share `new_fraction` of the rows is of a kind that no other task shows:
      both answers think aloud first (`counterfactuals.think`).
    eval: question, answer, category, kind, object_mask; category i % 4. No
      other task asks of a picture what its letter stands for.
    classify: label, the shape of the one large object (8 classes).
    segment: labels int32 [48, 48], classes `descriptions.LABELS`.
    text: conversations without a picture (`image` is None): facts, and
      questions about a caption.
  """

  def __init__(
    self,
    *,
    task: str,
    seed: int = 0,
    split: str = "train",
    size: int = 10_000,
    turns: int = 4,
    new_fraction: float = 0.0,
  ):
    """Make a source.

    Args:
      task: one of `TASKS`.
      seed: 0 .. 2**32 - 1; another seed gives other scenes in every split.
      split: any name; each has its own scenes.
      size: the number of rows.
      turns: questions of a "chat" or "text" conversation, 1 to 8.
      new_fraction: share of "preference" rows whose answers think aloud, 0 to
        1. Rows that do at one share do so at a greater one, word for word, and
        a row that does not is the same at any.
    """
    if task not in TASKS:
      raise errors.InputError(
        f"scenes: task is {task!r}; give one of {', '.join(TASKS)}"
      )
    if not 0 <= seed < 2**32:
      raise errors.InputError(
        f"scenes: seed is {seed}; give one in 0 .. 2**32 - 1"
      )
    if size < 1:
      raise errors.InputError(f"scenes: size is {size}; give at least 1")
    if not 1 <= turns <= _MAX_TURNS:
      raise errors.InputError(
        f"scenes: turns is {turns}; give one in 1 .. {_MAX_TURNS}"
      )
    if not 0 <= new_fraction <= 1:
      raise errors.InputError(
        f"scenes: new_fraction is {new_fraction}; give one in 0 .. 1"
      )
    if new_fraction and task != "preference":
      raise errors.InputError(
        f"scenes: new_fraction is {new_fraction}; only the task preference has"
        f" such rows, not {task}"
      )
    self._name = f"scenes/{task}/{split}/{seed}"
    self.task, self.seed, self.split = task, seed, split
    self.size, self.turns = size, turns
    self.new_fraction = new_fraction

  def __len__(self) -> int:
    return self.size

  def name(self, index: int) -> str:
    """Return what messages call a row: task, split, seed and index."""
    return f"{self._name}/{index}"

  def text(self, index: int) -> dict:
    """Return a row without its pixels, at a small part of the cost.

    `image` is True where the row has one, and None where it has none;
    `object_mask` and `labels` are absent. All else is as in `[index]`.
    """
    return self._row(index, self._said(index))

  def __getitem__(self, index: int) -> dict:
    said = self._said(index)
    row = self._row(index, said)
    if said.description is not None:
      one = _painted(self.seed, self.split, index, said.description)
      row["image"] = one.image
      if said.owners is not None:
        row["object_mask"] = one.mask(said.owners)
      if self.task == "segment":
        row["labels"] = one.labels
    return row

  @property
  def kind(self) -> str:
    """The kind of its rows."""
    talks = ("caption", "chat", "text")
    return "conversation" if self.task in talks else self.task

  def check_row(self, index: int) -> None:
    """Do nothing: no row is wrong."""

  def stamp(self) -> str:
    """Return "": its texts are made, and in no file."""
    return ""

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the row's picture, and its label map, as PNG files."""
    row = self[index]
    if row["image"] is None:
      return ()
    maps = [row["labels"].astype(np.uint8)] if "labels" in row else []
    return tuple(map(_png, (row["image"], *maps)))

  def _said(self, index):
    if not 0 <= index < self.size:
      raise IndexError(f"row {index} of {self.size}")
    return TASKS[self.task](self, int(index))

  def _row(self, index, said):
    image = None if said.description is None else True
    return {"id": self.name(index), "image": image, **said.fields}


def _png(pixels: np.ndarray) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "png")
  return file.getvalue()


class _Said(NamedTuple):
  """A row but for its pixels.

  `description` is of the picture, None where there is none; `owners` are the
  things asked about, None where the row has no mask.
  """

  fields: dict
  description: descriptions.Description | None
  owners: tuple[int, ...] | None = None


def scene(seed: int, split: str, index: int) -> descriptions.Scene:
  """Return the scene of a "caption", "chat", "classify" or "segment" row."""
  return _painted(seed, split, index, _description(seed, split, index))


def pair(
  seed: int, split: str, index: int
) -> tuple[descriptions.Description, questions.Question]:
  """Return what a preference row says, without its picture."""
  rng = _stream(seed, split, index, "preference")
  kind = PREFERENCE_KINDS[rng.integers(len(PREFERENCE_KINDS))]
  if kind == "describe":
    description = _description(seed, split, index)
    return description, counterfactuals.describe(description, rng)
  description = _description(seed, split, index, kind=kind)
  return description, questions.ask(description, kind, rng)


def exam(
  seed: int, split: str, index: int
) -> tuple[descriptions.Description, questions.Question]:
  """Return what an evaluation row asks, without its picture."""
  kinds = EVAL_KINDS[CATEGORIES[index % len(CATEGORIES)]]
  kind = kinds[index // len(CATEGORIES) % len(kinds)]
  rng = _stream(seed, split, index, "eval")
  description = _description(seed, split, index, kind=kind)
  return description, questions.ask(description, kind, rng)


def _description(seed, split, index, *, kind=None):
  """A scene; with a `kind`, one that holds what such a question needs."""
  rng = _stream(seed, split, index, "sample")
  needs = () if kind is None else questions.KINDS[kind].needs
  return descriptions.sample(rng, needs=needs)


def _painted(seed, split, index, description):
  return descriptions.paint(description, _stream(seed, split, index, "paint"))


def _stream(seed, split, index, purpose):
  """One Philox stream per row and purpose: the key is the row."""
  key = np.array([(seed << 32) | _crc(split), index], np.uint64)
  counter = np.array([0, 0, 0, _crc(purpose)], np.uint64)
  return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _crc(name):
  return zlib.crc32(name.encode())


def _caption_row(source, index):
  description = _description(source.seed, source.split, index)
  turns = [(questions.DESCRIBE, questions.caption(description))]
  return _Said(_conversation("<image>", turns), description)


def _chat_row(source, index):
  description = _description(source.seed, source.split, index)
  rng = _stream(source.seed, source.split, index, "chat")
  turns = _turns(description, rng, source.turns, facts=False)
  return _Said(_conversation("<image>", turns), description)


def _text_row(source, index):
  rng = _stream(source.seed, source.split, index, "text")
  if rng.random() < _FACTS_SHARE:
    turns = questions.fact_turns(rng, source.turns)
    return _Said(_conversation("", turns), None)
  description = _description(source.seed, source.split, index)
  turns = _turns(description, rng, source.turns, facts=True)
  text = questions.notes(description, rng)
  return _Said(_conversation(text, turns), None)


def _preference_row(source, index):
  description, asked = pair(source.seed, source.split, index)
  if source.new_fraction:
    rng = _stream(source.seed, source.split, index, "new")
    if rng.random() < source.new_fraction:
      asked = counterfactuals.think(description, asked, rng)
  fields = {
    "question": asked.question,
    "chosen": asked.answer,
    "rejected": asked.rejected,
    "category": asked.category,
    "kind": asked.kind,
  }
  return _Said(fields, description, asked.owners)


def _eval_row(source, index):
  description, asked = exam(source.seed, source.split, index)
  fields = {
    "question": asked.question,
    "answer": asked.answer,
    "category": asked.category,
    "kind": asked.kind,
  }
  return _Said(fields, description, asked.owners)


def _classify_row(source, index):
  description = _description(source.seed, source.split, index)
  return _Said({"label": description.label}, description)


def _segment_row(source, index):
  return _Said({}, _description(source.seed, source.split, index))


def _turns(description, rng, count, *, facts):
  """Draw `count` different questions: kinds in random order, then again.

  Some kinds have one question per scene, so a round may add nothing new. After
  `_MAX_ROUNDS` it ends with as many as it has found.
  """
  fits = questions.askable(description, facts=facts)
  kinds = [fits[place] for place in rng.permutation(len(fits)).tolist()]
  turns = {}
  for kind in kinds * _MAX_ROUNDS:
    asked = questions.ask(description, kind, rng)
    turns[asked.question] = asked.answer
    if len(turns) == count:
      break
  pairs = list(turns.items())
  if rng.random() < _DESCRIBE_SHARE:
    place = rng.integers(len(pairs))
    pairs[place] = (questions.DESCRIBE, questions.caption(description))
  return pairs


def _conversation(opening, turns):
  """Alternate question and answer; the first question follows `opening`."""
  conversation = []
  for place, (question, answer) in enumerate(turns):
    value = f"{opening}\n{question}" if place == 0 and opening else question
    conversation.append({"from": "human", "value": value})
    conversation.append({"from": "gpt", "value": answer})
  return {"conversations": conversation}


TASKS = {
  "caption": _caption_row,
  "chat": _chat_row,
  "preference": _preference_row,
  "eval": _eval_row,
  "classify": _classify_row,
  "segment": _segment_row,
  "text": _text_row,
}
