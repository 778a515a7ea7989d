"""Looks at rows of data for whatever training would refuse, one at a time.

A row is read, encoded and decoded by the code that trains, and an error's
`kind` says which of the faults of `checking_report.py` it is. A row has at most
one: its text is looked at first, then its images, its length and its id. What
is found of many rows is counted, so that no text and no pixel is kept.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pivot_jax.data import (
  chat,
  examples,
  images,
  indexed,
  opening,
  packing,
  records,
  registry,
)
from pivot_jax.errors import InputError

Row = dict[str, Any]
Size = tuple[int, int]  # Width and height in pixels.

# Pictures whose size is remembered, as several rows may show the same one.
_REMEMBERED = 2**16
_OPENED = 16  # Files whose ids are at hand.
_LONGEST = 300  # Characters of a reason.
_JSON = (".json", ".jsonl")
_NAME = re.compile(r"(.+)([:#])(\d+)", re.DOTALL)


class Unreadable(InputError):
  """A file none of whose rows can be read; its `kind` is set."""


class Target(NamedTuple):
  """What is checked: a source, what it is called, and its limits.

  max_length: tokens of a row; 0: any number.
  """

  path: str
  source: Any
  max_length: int
  max_pixels: int = images.MAX_PIXELS


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is the same for all rows.

  tokenizer: its folder. patches: tokens of an image. decode: whether images are
  decoded, and not only read.
  """

  tokenizer: str
  patches: int
  decode: bool = True


class Fault(NamedTuple):
  """What is wrong with a row, or with a whole file."""

  name: str
  id: str | None
  kind: str
  why: str


class Place(NamedTuple):
  """A file and the index of a row in it, from 0."""

  file: str
  row: int


class Part(NamedTuple):
  """What was found of some rows.

  tokens: how many rows have a length, of those whose text is in order. sizes:
    how many images have a size, of those that were decoded.
  """

  rows: int
  faults: list[Fault]
  tokens: collections.Counter[int]
  sizes: collections.Counter[Size]


def place(name: str) -> Place:
  """Returns what a row's name says: FILE:LINE, FILE#INDEX or FILE:ROW."""
  found = _NAME.fullmatch(name)
  if not found:
    raise ValueError(f"{name} is not the name of a row")
  file, mark, number = found[1], found[2], int(found[3])
  lines = mark == ":" and file.endswith(".jsonl")
  return Place(file, number - 1 if lines else number)


def open_file(path: str, root: str | None) -> Any:
  """Returns the source of a path of the command line.

  Raises:
    Unreadable: a .json or .jsonl file without a row that can be read.
    InputError: nothing there, or nothing that is known.
  """
  file = pathlib.Path(path)
  try:
    return opening.open_path(file, images=root, flawed=True)[1]
  except InputError as error:
    if not _holds_records(file):
      raise
    refused = error
  return _Unknown(_lines(file, refused))


def open_entry(spec: Mapping[str, Any]) -> Any:
  """Returns the source of a config's entry; raises as `open_file`."""
  file = pathlib.Path(spec["path"])
  try:
    return registry.open_source(spec)
  except InputError as error:
    if not _holds_records(file) or registry.format_of(file):
      raise
    refused = error
  _lines(file, refused)
  # The file has rows, and something else of the entry is wrong.
  raise refused


def _holds_records(path: pathlib.Path) -> bool:
  return path.suffix in _JSON and path.is_file()


def _lines(path: pathlib.Path, refused: InputError) -> indexed.File:
  """Returns a file's records, or raises that it has none."""
  try:
    found = indexed.File(path)
  except InputError as error:
    # Anything but a list is refused as JSON that is none.
    is_json = error.kind == "bad_json" and _is_json(path)
    kind = "schema" if is_json else error.kind
    raise Unreadable(str(refused), kind=kind) from None
  if not len(found):
    raise Unreadable(f"{path}: the file has no rows", kind="schema")
  return found


def _is_json(path: pathlib.Path) -> bool:
  """Returns whether a file, unless it is very large, is one JSON value."""
  with path.open("rb") as file:
    data = file.read(indexed.LONGEST + 1)
  if len(data) > indexed.LONGEST:
    return False
  try:
    json.loads(data.decode("utf-8-sig"))
  except (ValueError, RecursionError):
    return False
  return True


class _Unknown:
  """The records of a file of which none tells what kind they are of."""

  def __init__(self, file: indexed.File):
    self._file = file

  def __len__(self) -> int:
    return len(self._file)

  def name(self, index: int) -> str:
    return self._file.name(index)

  def text(self, index: int) -> Row:
    self._file.record(index)
    raise InputError(
      "has none of: conversations; question, chosen and rejected; question and"
      " answer",
      kind="schema",
    )


class Checker:
  """Looks at the rows of targets; each process has its own."""

  def __init__(self, settings: Settings):
    self._decode = settings.decode
    style = dict(
      tokenizer=chat.load_tokenizer(settings.tokenizer),
      template="qwen_1_5",
      mask="paper",
      image_size=1,
      patches=settings.patches,
    )
    self._conversation = examples.Coder(pairs=False, **style)
    self._pair = examples.Coder(pairs=True, **style)
    self._files: dict[str, _Ids] = {}
    self._seen: dict[tuple[int, bytes], Size] = {}

  def part(self, target: Target, rows: Sequence[int]) -> Part:
    """Returns what there is to say of some rows of a target."""
    found = Part(len(rows), [], collections.Counter(), collections.Counter())
    with warnings.catch_warnings():
      # What Pillow warns of is a fault, or nothing to anybody here.
      warnings.simplefilter("ignore")
      for index in rows:
        self._look(target, index, found)
    return found

  def _look(self, target: Target, index: int, found: Part) -> None:
    """Counts what a row has, and notes its fault."""
    name = target.source.name(index)
    row, kind = None, "schema"
    try:
      row = target.source.text(index)
      length = self._length(row)
      if length is not None:
        found.tokens[length] += 1
      kind = "undecodable_image"
      found.sizes.update(self._sizes(target, index, row))
      _check_length(length, target.max_length)
      self._check_id(name)
    except InputError as error:
      known = self._given_id(name, row)
      found.faults.append(
        Fault(name, known, error.kind or kind, reason(error, name))
      )

  def _length(self, row: Row) -> int | None:
    """Returns the tokens of a prompt and its longest answer, with images."""
    if "chosen" in row:
      example = self._pair.example(row, pixels=False)
    elif "conversations" in row or "answer" in row:
      turns = row.get("conversations") or [
        {"from": "human", "value": row["question"]},
        {"from": "gpt", "value": row["answer"]},
      ]
      row = row | {"conversations": turns}
      example = self._conversation.example(row, pixels=False)
    else:
      return None
    return packing.size(example, self._pair.patches).sequence

  def _sizes(self, target: Target, index: int, row: Row) -> list[Size]:
    """Returns the sizes of a row's images, none if they are not decoded."""
    shown = records.listed(row["image"])
    if not shown:
      return []
    if "labels" in row and self._decode:
      # Its label map is looked at as well.
      height, width = target.source[index]["image"].shape[:2]
      return [(width, height)]
    files = target.source.encoded(index)
    if not self._decode:
      return []
    names = [
      one if isinstance(one, str) else f"image[{i}]"
      for i, one in enumerate(shown)
    ]
    return [
      self._size(data, name, target.max_pixels)
      for data, name in zip(files, names)
    ]

  def _size(self, data: bytes, name: str, most: int) -> Size:
    """Decodes an image, unless the same bytes have been."""
    key = most, hashlib.blake2b(data, digest_size=16).digest()
    if key not in self._seen:
      try:
        height, width = images.decode(data, name=name, max_pixels=most).shape[
          :2
        ]
      except InputError as error:
        width, height = claimed(data)
        if error.kind or width * height <= most:
          raise
        raise InputError(
          f"{name}: its header says {width}x{height} pixels, over {most}",
          kind="too_many_pixels",
        ) from None
      if len(self._seen) == _REMEMBERED:
        del self._seen[next(iter(self._seen))]
      self._seen[key] = width, height
    return self._seen[key]

  def _check_id(self, name: str) -> None:
    """Raises for a row whose id an earlier one of its file has."""
    at = place(name)
    # Readers of other formats make ids unique, and there it may be no fault.
    if at.file.endswith(_JSON) and self._ids(at.file).is_again(at.row):
      raise InputError(
        "id: an earlier row of the file has it", kind="duplicate_id"
      )

  def _given_id(self, name: str, row: Row | None) -> str | None:
    """Returns the id that a faulty row has in its file, if that can be told."""
    at = place(name)
    if at.file.endswith(_JSON):
      return self._ids(at.file).given(at.row)
    return None if row is None else str(row["id"])

  def _ids(self, path: str) -> "_Ids":
    if path not in self._files:
      if len(self._files) == _OPENED:
        del self._files[next(iter(self._files))]
      self._files[path] = _Ids(path)
    return self._files[path]


class _Ids:
  """The ids of a file of records, as they are written there."""

  def __init__(self, path: str):
    self._file = indexed.File(path)
    self._again = self._file.again()

  def is_again(self, row: int) -> bool:
    at = int(np.searchsorted(self._again, row))
    return at < len(self._again) and int(self._again[at]) == row

  def given(self, row: int) -> str | None:
    try:
      found = self._file.record(row).get("id")
    except InputError:
      return None
    return str(found) if isinstance(found, (str, int)) else None


def reason(error: InputError, name: str) -> str:
  """Returns what an error says, on one line and without the row's name."""
  text = " ".join(str(error).removeprefix(f"{name}: ").split())
  return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def claimed(data: bytes) -> Size:
  """Returns the size in the header of a file that Pillow cannot open.

  Of the other formats Pillow reads a header that has nothing behind it.
  """
  if data.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR") and len(data) >= 24:
    return struct.unpack(">II", data[16:24])
  if data.startswith((b"GIF87a", b"GIF89a")) and len(data) >= 10:
    return struct.unpack("<HH", data[6:10])
  if data.startswith(b"RIFF") and data[8:16] == b"WEBPVP8X":
    sides = data[24:27], data[27:30]
    return tuple(int.from_bytes(side, "little") + 1 for side in sides)
  return 0, 0


def _check_length(length: int | None, most: int) -> None:
  if length is not None and 0 < most < length:
    raise InputError(
      f"{length} tokens with images are over max_length={most}",
      kind="too_long",
    )
