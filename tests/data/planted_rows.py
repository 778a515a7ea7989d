"""Rows that are right, however odd they look, and how files spell them.

`planted.py` puts them into files beside the faulty ones of `planted_ways.py`.
"""

import dataclasses
import itertools
import json
import pathlib
import string
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.data import planted_pictures

Record = dict[str, Any]
Keys = tuple[str | int, ...]  # The way to a value in a record; () is the whole.
CLEAN_START = 3  # The first rows are right: they tell a file's kind.


@dataclasses.dataclass(frozen=True)
class Form:
  """One data file: how it spells a row, and where its texts are."""

  file: str
  spell: Callable[..., Record]  # (images, question, answer, other) -> record
  asked: Keys
  said: tuple[Keys, ...]
  end: bytes = b"\n"  # Of each line.
  start: bytes = b""  # Of the file.
  tail: bytes = b"\n"  # After the last line, in place of its end.


class Kit:
  """What rows are made of: words, right pictures by turns, new bad ones."""

  def __init__(self, images: pathlib.Path, rng: np.random.Generator):
    self.rng = rng
    self._images = images
    self._pictures = itertools.cycle(planted_pictures.write_good(images, rng))
    self._count = itertools.count()

  def picture(self) -> str:
    return next(self._pictures)

  def words(self, length: int) -> str:
    """Returns random words, just as many characters in all."""
    letters = np.array(list(string.ascii_lowercase + string.digits + "  ."))
    return "Q" + "".join(self.rng.choice(letters, length - 2)) + "!"

  def add(self, suffix: str, data: bytes) -> str:
    """Writes an image file of its own for one row; returns its name."""
    name = f"sub/n{next(self._count):03d}{suffix}"
    (self._images / name).write_bytes(data)
    return name

  def link(self, target: str) -> str:
    """Makes a link in the image folder; returns its name."""
    name = f"n{next(self._count):03d}.png"
    (self._images / name).symlink_to(target)
    return name


def clean(form: Form, row: int, kit: Kit) -> bytes:
  """Returns a row with nothing wrong, as it stands in the file."""
  count, question, answer = _RIGHT[row % len(_RIGHT)]
  pictures: Any = [kit.picture() for _ in range(count)]
  for sign, length in (("%Q", 40), ("%A", 20), ("%L", 700)):
    question = question.replace(sign, kit.words(length))
    answer = answer.replace(sign, kit.words(length))
  record = form.spell(pictures, question, answer, kit.words(30))
  if count == 1 and row % 5 != 4:
    record["image"] = pictures[0]
  if not count and row % 2:
    record["image"] = None
  if form.spell is llava:
    _vary_turns(record, row, kit)
  if form.spell is pair and row % 9 == 4:
    record["rejected"] = answer.swapcase()  # Nearly equal.
  if row % 7 == 2:
    record["data_source"] = {"name": kit.words(9), "numbers": [1, 2.5, None]}
  if row < CLEAN_START or row % 11 not in (5, 8):
    record = {"id": f"row-{row:03d}"} | record
  elif row % 11 == 5:
    record["id"] = 10_000 + row
  return line(record, row)


def _vary_turns(record: Record, row: int, kit: Kit) -> None:
  turns = record["conversations"]
  if row % len(_RIGHT) == 0 and row % 2:
    turns[0]["value"] = "<image>"  # As for captions.
  if row % 6 in (1, 2):
    turns += exchange(kit.words(30), kit.words(25))
    turns += exchange(kit.words(30), kit.words(25))
  if row % 6 == 2:
    roles = {"human": "user", "gpt": "assistant"}
    record["conversations"] = [
      {"role": roles[turn["from"]], "content": turn["value"]} for turn in turns
    ]


def line(record: Any, row: int) -> bytes:
  """Returns a record as JSON; in every third row letters are escaped."""
  text = json.dumps(record, ensure_ascii=False)
  if row % 3 == 0 or any("\ud800" <= letter <= "\udfff" for letter in text):
    text = json.dumps(record)
  return text.encode()


def exchange(question: str, answer: str) -> list[dict[str, str]]:
  """Returns two turns of a conversation."""
  return [
    {"from": "human", "value": question},
    {"from": "gpt", "value": answer},
  ]


def llava(images, question: str, answer: str, other: str) -> Record:
  """Spells a conversation row; `other` is of no use to it."""
  record = {"image": images} if images else {}
  return record | {"conversations": exchange(question, answer)}


def pair(images, question: str, answer: str, other: str) -> Record:
  """Spells a preference row; `other` is the rejected answer."""
  record = {"image": images} if images else {}
  return record | {"question": question, "chosen": answer, "rejected": other}


def exam(images, question: str, answer: str, other: str) -> Record:
  """Spells an evaluation row; `other` decides whether it has a category."""
  record = {"image": images} if images else {}
  if len(other.split()) % 2:
    record |= {"category": "noise", "kind": "open"}
  return record | {"question": question, "answer": answer}


# Images, question and answer of rows that are right. Q and A are words, L is
# long, but below 2048 tokens at one token a character.
_RIGHT = (
  (1, "<image>\n%Q", "%A"),
  (0, "%Q", "%A"),
  (1, "%Q", "%A"),
  (1, "%Q <image>", "%A"),
  (2, "<image>\n<image>\n%Q", "%A"),
  (1, "Look at <image> first.\n%Q", "  %A\n"),
  (0, "%Q", "%L"),
  (2, "Image-1: <image>\nImage-2: <image>\n%Q", "%A"),
  # Near misses of tags and special tokens, and a reasoning token.
  (1, "<image>\nIs <img> like < image >? %Q", "<think>\n%A\n</think> <b>1</b>"),
  (1, "<image>\n%Q", "%A <|im_end> |im_start| im_end endoftext <im_end|>"),
  # Letters of many lengths, characters that some readers take for line ends,
  # the sign for an unreadable character, and a whole surrogate pair.
  (
    1,
    "<image>\nWas ist 图片 в \u2028 صورة \x85 Ω?",
    "Größe \u2029 Ж 猫 \ufffd",
  ),
  (0, "😀 👩‍👩‍👧 %Q", "e\u0301 😀"),
  # What an index of a list's records must not stumble over.
  (
    0,
    '"}, {"id": "row-000"}]}\n[[[ \\" %Q',
    '{"conversations": [ \\\\ "\r\n%A',
  ),
)


_ASKED, _SAID = ("conversations", 0, "value"), ("conversations", 1, "value")
FORMS = (
  Form("conversations.json", llava, _ASKED, (_SAID,)),
  Form(
    "turns.jsonl",
    llava,
    _ASKED,
    (_SAID,),
    end=b"\r\n",
    start=b"\xef\xbb\xbf",
    tail=b"\r\n\r\n",
  ),
  Form("pairs.jsonl", pair, ("question",), (("chosen",), ("rejected",))),
  Form("exam.jsonl", exam, ("question",), (("answer",),), tail=b""),
)
