"""Puts scenes into words: captions, questions, answers, and wrong answers.

Every function reads a `descriptions.Description`; none sees a pixel. For each
kind of question the right and the wrong answer have the same distribution given the
question, so that a pair can be told apart only by looking: a wrong answer is
drawn by a rule that keeps the uniform distribution of right ones. Tests hold it
to that. Wrong captions are made in `counterfactuals.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from pivot_jax.data.scenes import descriptions

COUNTS = ("one", "two", "three", "four")
CELLS = (
  "top left",
  "top middle",
  "top right",
  "middle left",
  "middle",
  "middle right",
  "bottom left",
  "bottom middle",
  "bottom right",
)
# What letters stand for can be known from text alone: no picture shows it, and
# no row to train on that has a picture says it. The evaluation asks for it.
FACTS = {
  "e": "bow",
  "h": "sand",
  "j": "nest",
  "k": "moss",
  "l": "ink",
  "p": "kite",
  "t": "bell",
  "w": "tree",
  "x": "lamp",
  "y": "boat",
}

Value = TypeVar("Value")

DESCRIBE = "describe the image"


@dataclasses.dataclass(frozen=True)
class Question:
  """A question with its answer and one that is wrong in one detail.

  `owners` are the things asked about, as numbered in `layout.Scene.owners`.
  """

  kind: str
  category: str
  question: str
  answer: str
  rejected: str
  owners: tuple[int, ...]


def caption(description: descriptions.Description) -> str:
  """Names everything that questions ask for, in reading order of the cells."""
  listed = " , ".join(
    f"{' '.join(words)} at {CELLS[cell]}"
    for cell, words in sorted(_parts(description))
  )
  count = len(description.objects)
  noun = "object" if count == 1 else "objects"
  return f"{COUNTS[count - 1]} {noun} : {listed}"


def notes(
  description: descriptions.Description, rng: np.random.Generator
) -> str:
  """Return the content of a scene in no order: what an image is, in words.

  A language model that reads these learns to look up what belongs together,
  not to copy a sentence.
  """
  parts = _parts(description)
  listed = []
  for place in rng.permutation(len(parts)).tolist():
    cell, words = parts[place]
    units = [*words, CELLS[cell]]
    order = rng.permutation(len(units)).tolist()
    listed.append(" ".join(units[i] for i in order))
  return ": " + " ".join(f"{part} ," for part in listed)


def _parts(description) -> list[tuple[int, tuple[str, ...]]]:
  """Return the cell and the words of each thing in a scene."""
  parts = [
    (one.cell, (one.size, one.colour, one.texture, one.shape))
    for one in description.objects
  ]
  signs = (("digit", description.digit), ("letter", description.letter))
  parts += [
    (sign.cell, (f"{name} {sign.character}",)) for name, sign in signs if sign
  ]
  chart = description.chart
  if chart is not None:
    bars = " ".join(" ".join(bar) for bar in chart.bars)
    parts.append((chart.cell, (f"chart {bars}",)))
  return parts


def fact(letter: str) -> str:
  """Return the sentence that says what a letter stands for."""
  return f"{letter} stands for {FACTS[letter]}"


def fact_turns(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
  """Return questions and answers about the facts of `count` letters."""
  letters = rng.permutation(tuple(FACTS))[:count].tolist()
  asks = (
    lambda letter: f"what does {letter} stand for ?",
    lambda letter: f"what does the letter {letter} stand for ?",
    lambda letter: f"which letter stands for {FACTS[letter]} ?",
  )
  return [(asks[rng.integers(3)](letter), fact(letter)) for letter in letters]


def askable(
  description: descriptions.Description, *, facts: bool
) -> tuple[str, ...]:
  """Return the kinds of question that fit a scene.

  Args:
    description: the scene.
    facts: whether what a letter stands for may be asked.
  """
  there = {
    "pair": len(description.objects) > 1,
    "digit": description.digit is not None,
    "letter": description.letter is not None,
    "chart": description.chart is not None,
  }
  return tuple(
    kind
    for kind, rule in KINDS.items()
    if all(there[need] for need in rule.needs) and (facts or kind != "fact")
  )


def ask(
  description: descriptions.Description, kind: str, rng: np.random.Generator
) -> Question:
  """Ask one question of a kind that `askable` returned.

  Args:
    description: the scene.
    kind: a key of `KINDS` whose needs the scene meets.
    rng: where the choice of object and wrong answer comes from.
  """
  rule = KINDS[kind]
  return Question(kind, rule.category, *rule.ask(description, rng))


def other(
  rng: np.random.Generator, options: Sequence[Value], value: Value
) -> Value:
  """Return another of the options than `value`, uniformly."""
  rest = [option for option in options if option != value]
  return rest[rng.integers(len(rest))]


def _ask_exist(description, rng):
  objects = description.objects
  i = int(rng.integers(len(objects)))
  thing = objects[i]
  if rng.random() < 0.5:
    return _exists(thing.shape, thing.colour), "yes", "no", (i + 1,)
  if len(objects) == 1:  # no second object could lend its colour
    colour = other(rng, descriptions.COLOURS, thing.colour)
    return _exists(thing.shape, colour), "no", "yes", (i + 1,)
  j = other(rng, range(len(objects)), i)
  question = _exists(thing.shape, objects[j].colour)
  return question, "no", "yes", (i + 1, j + 1)


def _exists(shape, colour):
  return f"is there a {colour} {shape} ?"


def _ask_colour(description, rng):
  """The wrong colour is another object's where there is one."""
  objects = description.objects
  i = int(rng.integers(len(objects)))
  thing = objects[i]
  if len(objects) == 1:
    wrong = other(rng, descriptions.COLOURS, thing.colour)
  else:
    wrong = objects[other(rng, range(len(objects)), i)].colour
  return f"what colour is the {thing.shape} ?", thing.colour, wrong, (i + 1,)


def _ask_texture(description, rng):
  i = int(rng.integers(len(description.objects)))
  thing = description.objects[i]
  wrong = other(rng, descriptions.TEXTURES, thing.texture)
  return f"what texture is the {thing.shape} ?", thing.texture, wrong, (i + 1,)


def _ask_digit(description, rng):
  right = description.digit.character
  wrong = other(rng, descriptions.DIGITS, right)
  return _ask_sign(rng, "digit"), right, wrong, (descriptions.DIGIT,)


def _ask_letter(description, rng):
  right = description.letter.character
  wrong = other(rng, descriptions.LETTERS, right)
  return _ask_sign(rng, "letter"), right, wrong, (descriptions.LETTER,)


def _ask_sign(rng, name):
  """Two wordings, so that reading a sign does not hang on one sentence."""
  asks = (f"which {name} is shown ?", f"what is the {name} ?")
  return asks[rng.integers(2)]


def _ask_bar(description, rng):
  bars = description.chart.bars
  extreme, level = (("highest", "high"), ("lowest", "low"))[rng.integers(2)]
  (right,) = (colour for colour, height in bars if height == level)
  wrong = other(rng, [colour for colour, _ in bars], right)
  question = f"what colour is the {extreme} bar ?"
  return question, right, wrong, (descriptions.CHART,)


def _ask_count(description, rng):
  count = len(description.objects)
  right = COUNTS[count - 1]
  wrong = other(rng, COUNTS, right)
  owners = tuple(range(1, count + 1))
  return "how many objects are there ?", right, wrong, owners


def _ask_relation(description, rng):
  """Ask along an axis on which the two objects' cells differ."""
  objects = description.objects
  i = int(rng.integers(len(objects)))
  j = other(rng, range(len(objects)), i)
  (y, x), (other_y, other_x) = (divmod(objects[k].cell, 3) for k in (i, j))
  across = x != other_x and (y == other_y or rng.random() < 0.5)
  words = ("left", "right") if across else ("above", "below")
  later = x > other_x if across else y > other_y
  tail = " of" if across else ""
  question = (
    f"is the {objects[i].shape} {words[0]} or {words[1]}{tail}"
    f" the {objects[j].shape} ?"
  )
  return question, words[later], words[not later], (i + 1, j + 1)


def _ask_size(description, rng):
  """Large or small with equal chance, though only one object is large."""
  right, wrong = (
    descriptions.SIZES if rng.random() < 0.5 else descriptions.SIZES[::-1]
  )
  fitting = [
    i for i, one in enumerate(description.objects) if one.size == right
  ]
  i = fitting[rng.integers(len(fitting))]
  question = f"is the {description.objects[i].shape} large or small ?"
  return question, right, wrong, (i + 1,)


def _ask_where(description, rng):
  """The wrong place is off along one axis only."""
  i = int(rng.integers(len(description.objects)))
  thing = description.objects[i]
  row, column = divmod(thing.cell, 3)
  step = int(rng.integers(1, 3))
  if rng.random() < 0.5:
    wrong = 3 * ((row + step) % 3) + column
  else:
    wrong = 3 * row + (column + step) % 3
  question = f"where is the {thing.shape} ?"
  return question, CELLS[thing.cell], CELLS[wrong], (i + 1,)


def _ask_fact(description, rng):
  """The wrong fact is that of another letter, and true of it."""
  right = description.letter.character
  wrong = other(rng, descriptions.LETTERS, right)
  question = "what does the letter stand for ?"
  return question, fact(right), fact(wrong), (descriptions.LETTER,)


@dataclasses.dataclass(frozen=True)
class _Kind:
  category: str
  needs: tuple[str, ...]
  ask: Callable[..., tuple[str, str, str, tuple[int, ...]]]


KINDS = {
  "exist": _Kind("general", (), _ask_exist),
  "colour": _Kind("general", (), _ask_colour),
  "texture": _Kind("general", (), _ask_texture),
  "digit": _Kind("ocr", ("digit",), _ask_digit),
  "letter": _Kind("ocr", ("letter",), _ask_letter),
  "bar": _Kind("ocr", ("chart",), _ask_bar),
  "count": _Kind("vision", (), _ask_count),
  "relation": _Kind("vision", ("pair",), _ask_relation),
  "size": _Kind("vision", ("pair",), _ask_size),
  "where": _Kind("vision", (), _ask_where),
  "fact": _Kind("knowledge", ("letter",), _ask_fact),
}
