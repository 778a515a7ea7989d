"""Looks at rows of data for whatever training would refuse, one at a time.

A row is read, encoded and decoded by the code that trains, and an error's
`kind` says which of the faults of `faults.py` it is. A row has at most
one: its text is looked at first, then its images, its length and its id. What
is found of many rows is counted, so that no text and no pixel is kept.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import struct
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pivot_jax.data import coders, framing, images, packing, rows
from pivot_jax.data.scenes import scenes
from pivot_jax.data.sources import (
  json_index,
  parquet,
  parquet_files,
  records,
)
from pivot_jax.data.tools import check_files
from pivot_jax.errors import InputError

Row = dict[str, Any]
Size = tuple[int, int]  # Width and height in pixels.

# Pictures whose size is remembered, as several rows may show the same one.
_REMEMBERED = 2**16
_OPENED = 16  # Files whose ids are at hand.
_LONGEST = 300  # Characters of a reason.
_CHUNK = 200  # Rows that one process takes at once.
# Of a parquet file one process takes whole row groups, since reading a row
# decodes its group; a longer group is one of short rows.
_LONGEST_CHUNK = 10_000
_JSON = (".json", ".jsonl")


class Frame(NamedTuple):
  """The size of an encoder's images, and how they get it (`framing.resize`)."""

  size: int
  resample: str


TOKENIZER = scenes.TOKENIZER  # Measures texts where none is named.
# The settings by which texts are read where no stage says any.
ALONE = {"template": "qwen_1_5", "mask": "paper", "resample": "bicubic"}
PATCHES = 729  # Tokens of an image where the encoder's are not known.


class Entry(NamedTuple):
  """A file or folder to check, and how it is read.

  root: the folder of its image paths, None for its own.
  max_bad: the share of its rows that may be bad.
  spec: the config's entry, as JSON; "" if it was named alone.
  """

  path: str
  root: str | None
  codings: tuple[coders.Coder, ...]
  frames: tuple[Frame, ...] = ()
  max_pixels: int = images.MAX_PIXELS
  max_bad: float = 0.0
  spec: str = ""

  @property
  def max_length(self) -> int:
    """The least number of tokens that a row may have; 0: any number."""
    limits = (coder.max_length for coder in self.codings)
    return min((limit for limit in limits if limit), default=0)

  @property
  def long(self) -> str:
    """The policies for longer rows, "" where they are errors."""
    policies = {coder.long for coder in self.codings if coder.max_length}
    return ", ".join(sorted(policies - {"error"}))

  def limited(self, max_length: int) -> "Entry":
    """Return an entry whose rows may have so many tokens; 0: any number."""
    codings = [limited(coder, max_length) for coder in self.codings]
    return self._replace(codings=tuple(dict.fromkeys(codings)))

  def open(self) -> rows.Source:
    """Return the source; raise as `check_files.open_file`."""
    if self.spec:
      return check_files.open_entry(json.loads(self.spec))
    return check_files.open_file(self.path, self.root)


class Wanted(NamedTuple):
  """The entries to check, and the measures of their rows.

  tokenizer: its address, "" if none is known.
  patches: tokens of an image, None if they are not known.
  skipped: why the sources of a name are not looked at.
  """

  entries: tuple[Entry, ...]
  tokenizer: str
  patches: int | None
  skipped: Mapping[str, str]


class Target(NamedTuple):
  """A source to check, the path it is reported by, and how it is read.

  codings: of the stages that read it; their image sizes do not count.
  """

  path: str
  source: rows.Source
  codings: tuple[coders.Coder, ...]
  frames: tuple[Frame, ...]
  max_pixels: int


class Task(NamedTuple):
  """Some rows of a target, by its number."""

  number: int
  rows: range


Targets = Sequence[Target | None]


class Fault(NamedTuple):
  """A fault of a row, or of a whole file.

  drop: whether the row is of no use; otherwise it is only worth a note.
  """

  name: str
  id: str | None
  kind: str
  why: str
  drop: bool = True


class Part(NamedTuple):
  """The findings of some rows.

  long: rows that training drops or cuts. tokens: how many rows have a length,
  of those whose text is in order. sizes: how many images have a size, of those
  that were decoded.
  """

  rows: int
  faults: list[Fault]
  long: list[str]
  tokens: collections.Counter[int]
  sizes: collections.Counter[Size]


class Checker:
  """Looks at the rows of targets; each process has its own.

  decode: whether images are decoded, and not only read.
  """

  def __init__(self, *, decode: bool = True):
    self._decode = decode
    self._files: dict[str, _Ids] = {}
    self._seen: dict[tuple, Size] = {}

  def part(self, target: Target, rows: Sequence[int]) -> Part:
    """Return the findings of some rows of a target."""
    counts = collections.Counter(), collections.Counter()
    found = Part(len(rows), [], [], *counts)
    with warnings.catch_warnings():
      # What Pillow warns of is a fault, or nothing to anybody here.
      warnings.simplefilter("ignore")
      for index in rows:
        self._look(target, index, found)
    return found

  def _look(self, target: Target, index: int, found: Part) -> None:
    """Count the tokens and images of a row, and note its fault."""
    name = target.source.name(index)
    row, kind = None, "schema"
    try:
      row = target.source.text(index)
      lengths = _lengths(row, target.codings)
      if lengths:
        found.tokens[max(lengths.values())] += 1
      kind = "undecodable_image"
      found.sizes.update(self._sizes(target, index, row))
      if _is_long(row, lengths):
        found.long.append(name)
      self._check_id(name)
    except InputError as error:
      kind = error.kind or kind
      # Training makes ids its own; answers are told apart by those given.
      drop = kind != "duplicate_id" or row is None or "answer" in row
      known = self._given_id(name, row)
      found.faults.append(Fault(name, known, kind, reason(error, name), drop))

  def _sizes(self, target: Target, index: int, row: Row) -> list[Size]:
    """Return the sizes of a row's images, none if they are not decoded."""
    shown = records.listed(row["image"])
    if not shown:
      return []
    if "labels" in row and self._decode:
      # Its label map is looked at as well.
      image = target.source[index]["image"]
      _check_frames(image, target.frames)
      return [image.shape[1::-1]]
    files = target.source.encoded(index)
    if not self._decode:
      return []
    names = [
      one if isinstance(one, str) else f"image[{i}]"
      for i, one in enumerate(shown)
    ]
    return [
      self._size(data, name, target, pad=len(shown) > 1)
      for data, name in zip(files, names)
    ]

  def _size(self, data: bytes, name: str, target: Target, *, pad: bool) -> Size:
    """Decode and frame an image, unless the same bytes have been."""
    most, digest = target.max_pixels, hashlib.blake2b(data, digest_size=16)
    key = most, target.frames, pad, digest.digest()
    if key not in self._seen:
      image = _decoded(data, name, most)
      with records.located(name):
        _check_frames(image, target.frames, pad=pad)
      if len(self._seen) == _REMEMBERED:
        del self._seen[next(iter(self._seen))]
      self._seen[key] = image.shape[1::-1]
    return self._seen[key]

  def _check_id(self, name: str) -> None:
    """Raise for a row whose id an earlier one of its file has."""
    at = rows.parse_name(name)
    # Readers of other formats make ids unique, and there it may be no fault.
    if at.file.endswith(_JSON) and self._ids(at.file).is_again(at.row):
      raise InputError(
        "id: an earlier row of the file has it", kind="duplicate_id"
      )

  def _given_id(self, name: str, row: Row | None) -> str | None:
    """Return the id that a faulty row has in its file, if that can be told."""
    at = rows.parse_name(name)
    if at.file.endswith(_JSON):
      return self._ids(at.file).given(at.row)
    return None if row is None else str(row["id"])

  def _ids(self, path: str) -> "_Ids":
    if path not in self._files:
      if len(self._files) == _OPENED:
        del self._files[next(iter(self._files))]
      self._files[path] = _Ids(path)
    return self._files[path]


def limited(coder: coders.Coder, max_length: int) -> coders.Coder:
  """Return a coder of rows of so many tokens; 0: any number."""
  return dataclasses.replace(coder, max_length=max_length)


def tasks(targets: Targets) -> list[Task]:
  """Return the rows of all targets in order, None having none."""
  return [
    Task(number, rows)
    for number, target in enumerate(targets)
    if target
    for rows in _chunks(target.source)
  ]


def look(held: tuple[Checker, Targets], task: Task) -> Part:
  """Return the findings of a checker in the rows of a task."""
  checker, targets = held
  target = targets[task.number]
  assert target is not None
  return checker.part(target, task.rows)


def _chunks(source: rows.Source) -> list[range]:
  """Return all rows of a source in pieces."""
  if not isinstance(source, parquet.Parquet):
    return _cut(range(len(source)), _CHUNK)
  pieces, begin = [], 0
  ends = _group_ends(source)
  for end in ends:
    # Of small groups several make a piece.
    if end - begin >= _CHUNK or end == ends[-1]:
      pieces += _cut(range(begin, end), _LONGEST_CHUNK)
      begin = end
  return pieces


def _cut(rows: range, most: int) -> list[range]:
  return [rows[i : i + most] for i in range(0, len(rows), most)]


def _group_ends(source: parquet.Parquet) -> list[int]:
  """Return where each row group ends, counted over all files."""
  ends, rows = [], 0
  read = parquet_files.pyarrow().parquet.read_metadata
  for path in parquet_files.Files(source.path).paths:
    footer = read(path)
    for group in range(footer.num_row_groups):
      rows += footer.row_group(group).num_rows
      ends.append(rows)
  return ends


class _Ids:
  """The ids of a file of records, as they are written there."""

  def __init__(self, path: str):
    self._file = json_index.File(path)
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
  """Return the text of an error, on one line and without the row's name."""
  text = " ".join(str(error).removeprefix(f"{name}: ").split())
  return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def claimed(data: bytes) -> Size:
  """Return the size in the header of a file that Pillow cannot open.

  Of the other formats Pillow reads a header that has nothing behind it.
  """
  if data.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR") and len(data) >= 24:
    return struct.unpack(">II", data[16:24])
  if data.startswith((b"GIF87a", b"GIF89a")) and len(data) >= 10:
    return struct.unpack("<HH", data[6:10])
  if data.startswith(b"RIFF") and data[8:16] == b"WEBPVP8X":
    sides = data[24:27], data[27:30]
    across, down = (int.from_bytes(side, "little") + 1 for side in sides)
    return across, down
  return 0, 0


def _lengths(
  row: Row, codings: Sequence[coders.Coder]
) -> dict[coders.Coder, int]:
  """Return the tokens of a prompt and its longest answer, with images.

  Nothing for rows without text.
  """
  if not {"chosen", "conversations", "answer"} & set(row):
    return {}
  known: dict[coders.Coder, int] = {}
  found = {}
  for coder in codings:
    alone = _unlimited(_own(coder, row))
    if alone not in known:
      example = alone.example(_as_learnt(row), pixels=False)
      known[alone] = packing.size(example, alone.patches).sequence
    found[coder] = known[alone]
  return found


def _is_long(row: Row, lengths: Mapping[coders.Coder, int]) -> bool:
  """Return whether a row is dropped or cut; raise if it is an error."""
  long = False
  for coder, length in lengths.items():
    if not 0 < coder.max_length < length:
      continue
    long = True
    try:
      _own(coder, row).example(_as_learnt(row), pixels=False)
    except coders.TooLongError as error:
      if coder.long != "drop":
        raise InputError(str(error), kind="too_long") from None
  return long


def _own(coder: coders.Coder, row: Row) -> coders.Coder:
  """Return how a stage codes a row of its kind."""
  return _of_kind(coder, "answer" in row, "chosen" in row)


@functools.lru_cache(maxsize=256)
def _of_kind(coder: coders.Coder, asks: bool, prefers: bool) -> coders.Coder:
  # An evaluation asks in ChatML, whatever the model was trained on.
  template = "qwen_1_5" if asks else coder.template
  pairs = coder.pairs and prefers
  return dataclasses.replace(coder, template=template, pairs=pairs)


@functools.lru_cache(maxsize=256)
def _unlimited(coder: coders.Coder) -> coders.Coder:
  """Return a coder by which texts are measured, whatever their images."""
  return dataclasses.replace(
    coder, max_length=0, long="error", image_size=1, resample="bicubic"
  )


def _as_learnt(row: Row) -> Row:
  """Return a row, questions with answers as conversations."""
  if "answer" not in row or "conversations" in row:
    return row
  turns = [
    {"from": "human", "value": row["question"]},
    {"from": "gpt", "value": row["answer"]},
  ]
  return row | {"conversations": turns}


def _decoded(data: bytes, name: str, most: int) -> np.ndarray:
  """Return uint8 [H, W, 3]; raise as `images.decode`, each with its kind."""
  try:
    return images.decode(data, name=name, max_pixels=most)
  except InputError as error:
    width, height = claimed(data)
    if error.kind or width * height <= most:
      raise
    raise InputError(
      f"{name}: its header says {width}x{height} pixels, over {most}",
      kind="too_many_pixels",
    ) from None


def _check_frames(
  image: np.ndarray, frames: Sequence[Frame], *, pad: bool = False
) -> None:
  """Raise for an image that no stage can bring to its encoder's size."""
  for frame in frames:
    # A picture that is squashed may be of any shape.
    if pad or images.parse_resample(frame.resample).crop:
      whole = framing.pad_square(image) if pad else image
      images.resize(whole, frame.size, resample=frame.resample)
