"""MMPR, millions of preference pairs in many files, as one source.

It reads whatever a `meta.json` lists and holds no text. Training sets of some of
the rows are lists of their own, which `mmpr_selection.py` writes.
"""

import bisect
import logging
import os
import pathlib
import posixpath
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pivot_jax import files
from pivot_jax.data import images
from pivot_jax.data.sources import json_index, records
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

Row = dict[str, Any]

_MOST = 1000  # Times that rows may come.
LARGEST = 2**24  # Bytes of a `meta.json`.
# Fields of a config's entry that would choose some of the rows.
_CHOOSING = (
  "set", "select", "selection", "size", "seed", "tokenizer", "new_fraction",
  "only", "text_only", "several",
)  # fmt: skip


class Part(NamedTuple):
  """One entry of a `meta.json`: its file, and where its rows begin.

  rows: of the file, the first ones, that are taken. times: of each.
  """

  name: str
  root: str
  file: json_index.File
  begin: int
  has_ids: bool
  rows: int
  times: int

  @property
  def size(self) -> int:
    """The number of rows of the source that come from it."""
    return self.rows * self.times


class Mmpr:
  """Preference rows of all files of a `meta.json`, in its order.

  A row has `id` (NAME/ID, or NAME/INDEX in a file without ids), `image` (None,
  one or a list), `question`, `chosen`, `rejected` and `data_source`, the NAME.

  An entry's `repeat_time` counts as in InternVL: under 1 it is the share of the
  rows, from the first, that are taken; a whole number is how often all rows
  come, one time after the other. The ids of the second time are NAME#2/ID.

  Attributes:
    parts: the entries.
    root: the folder that the entries' `root`s are in.
  """

  kind = "preference"

  def __init__(
    self,
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    image_spec: images.ImageSpec = images.AS_THEY_ARE,
    *,
    as_released: bool = False,
    repeated: bool = True,
    flawed: bool = False,
  ):
    """Open the files that a `meta.json` names; index those never seen before.

    Annotations are looked for beside `meta.json`, then beside its folder (the
    published paths start with the folder's name), then by their name alone in
    `annotations/`: some were published with the path of another machine. They
    lie in the folder of `meta.json`, whatever links lead to.

    Args:
      image_root: the folder that holds each entry's `root`; if not given,
        `meta.json`'s own or the one above, whichever has one of them; then
        they all lie in the folder of `meta.json`.
      as_released: as in the released script, `image` alone is read, and a
        `.gif` as the `.jpg` beside it, but no `.GIF`; otherwise `images`, too,
        and as `.jpg` only one that is not there.
      repeated: whether `repeat_time` counts; otherwise each row comes once.
      flawed: lines that are no records are an error only when they are read.
    """
    self.path = pathlib.Path(path)
    entries = _read_meta(self.path)
    self.parts = _open_parts(
      self.path, entries, repeated=repeated, flawed=flawed
    )
    self._begins = [part.begin for part in self.parts]
    self._size = sum(part.size for part in self.parts)
    self._as_released = as_released
    roots = [part.root for part in self.parts]
    self._pictures = images.Pictures(
      _image_root(self.path, roots) if image_root is None else image_root,
      image_spec,
    )
    self.root = self._pictures.root

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> Row:
    row = self.text(index)
    with records.located(self.name(index)):
      row["image"] = self._pictures.read_row(row["image"])
    return row

  def text(self, index: int) -> Row:
    """Return the row with paths, relative to `root`, in place of pixels."""
    part, number = self._at(index)
    time = (index - part.begin) // part.rows + 1
    named = part.name if time == 1 else f"{part.name}#{time}"
    with records.located(part.file.name(number)):
      record = part.file.record(number)
      found = records.image_paths(self._used(record))
      if isinstance(found, list):
        image = [self._relative(part, path) for path in found]
      else:
        image = None if found is None else self._relative(part, found)
      own = part.file.id(record, number) if part.has_ids else number
      return {
        "id": f"{named}/{own}",
        "image": image,
        "question": records.question(record),
        "chosen": records.text(record, "chosen"),
        "rejected": records.text(record, "rejected"),
        "data_source": part.name,
      }

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the bytes of the row's image files."""
    paths = records.listed(self.text(index)["image"])
    with records.located(self.name(index)):
      return self._pictures.read_files(paths)

  def check_row(self, index: int) -> None:
    """Raise for a wrong field, or an image that is not in place."""
    for path in records.listed(self.text(index)["image"]):
      with records.located(self.name(index)):
        images.resolve(self.root, path)

  @property
  def paths(self) -> list[pathlib.Path]:
    """The files that hold the rows, in the order of the entries."""
    return [part.file.path for part in self.parts]

  def stamp(self) -> str:
    """Return a digest of the files' contents and of how often rows come."""
    stamps = [json_index.stamp(part.file.path) for part in self.parts]
    counts = [(part.rows, part.times) for part in self.parts]
    if counts != [(len(part.file), 1) for part in self.parts]:
      stamps.append(f"{zlib.crc32(str(counts).encode()):08x}")
    return " ".join(stamps)

  def name(self, index: int) -> str:
    """Return `file:line`."""
    part, number = self._at(index)
    return part.file.name(number)

  def place(self, index: int) -> tuple[int, int]:
    """Return (entry of `meta.json`, row of its file), both from 0."""
    if not 0 <= index < self._size:
      raise IndexError(index)
    entry = bisect.bisect_right(self._begins, index) - 1
    return entry, (int(index) - self._begins[entry]) % self.parts[entry].rows

  def _at(self, index: int) -> tuple[Part, int]:
    entry, number = self.place(index)
    return self.parts[entry], number

  def _used(self, record: records.Record) -> records.Record:
    if not self._as_released:
      return record
    return {key: value for key, value in record.items() if key != "images"}

  def _relative(self, part: Part, path: str) -> str:
    path = posixpath.join(part.root, path)
    stem, suffix = posixpath.splitext(path)
    if self._as_released:
      # The released script knows suffixes in lower case alone.
      return f"{stem}.jpg" if suffix == ".gif" else path
    there = suffix.lower() != ".gif" or (self.root / path).is_file()
    return path if there else f"{stem}.jpg"


def check_entry(path: str, fields: Iterable[str]) -> None:
  """Raise if the fields of a config's entry choose some of the rows."""
  found = [name for name in _CHOOSING if name in fields]
  if found:
    raise InputError(
      f"{path}: {found[0]}: a source does not choose rows; write the set once,"
      f" `python -m pivot_jax.data select-mmpr {path} --set=NAME"
      " --tokenizer=ADDRESS --to=DIR`, and read its list with kind 'preference'"
    )


def _read_meta(path: pathlib.Path) -> Mapping[str, Mapping[str, Any]]:
  """Return the entries of a `meta.json`, checked for what is used of them."""
  if not os.path.lexists(path):
    raise InputError(f"{path}: no such file")
  entries = files.read_object(path, largest=LARGEST)
  if not entries:
    raise InputError(f"{path}: lists no annotations")
  for name, entry in entries.items():
    with records.located(f"{path}: {name}"):
      if not isinstance(entry, dict):
        raise InputError("must have the keys root and annotation")
      records.text(entry, "root")
      if not records.text(entry, "annotation").endswith(".jsonl"):
        raise InputError("annotation: must be a file of JSON lines, .jsonl")
  return entries


def _open_parts(
  meta: pathlib.Path,
  entries: Mapping[str, Mapping[str, Any]],
  *,
  repeated: bool,
  flawed: bool,
) -> tuple[Part, ...]:
  folder = meta.parent
  paths: dict[str, pathlib.Path] = {}
  missing = []
  for name, entry in entries.items():
    with records.located(f"{meta}: {name}"):
      found = _annotation(folder, entry["annotation"])
    if found is None:
      missing.append(entry["annotation"])
    else:
      paths[name] = found
  if missing:
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    raise InputError(
      f"{folder / 'meta.json'}: {len(missing)} of {len(entries)} annotations are"
      f" not there, as {', '.join(missing[:3])}{more}: put them into"
      f" {folder / 'annotations'}"
    )
  parts, begin = [], 0
  for name, path in paths.items():
    file = json_index.File(path)
    if file.flaws and not flawed:
      index, why = file.flaws[0]
      raise InputError(f"{file.name(index)}: {why}")
    length = entries[name].get("length", len(file))
    if length != len(file):
      LOG.warning("%s: %d rows, %s in meta.json", path, len(file), length)
    rows, times = len(file), 1
    if repeated:
      with records.located(f"{meta}: {name}"):
        rows, times = _repeat(entries[name].get("repeat_time", 1), rows)
        _check_apart(name, times, entries)
    root = entries[name]["root"]
    part = Part(name, root, file, begin, _has_ids(file), rows, times)
    parts.append(part)
    begin += part.size
  return tuple(parts)


def _repeat(asked: object, rows: int) -> tuple[int, int]:
  """Return how many rows of a file are taken, and how often."""
  if (
    isinstance(asked, bool)
    or not isinstance(asked, (int, float))
    or not 0 < asked <= _MOST
    or (asked > 1 and asked % 1)
  ):
    raise InputError(
      f"repeat_time: must be a whole number up to {_MOST}, or a share between"
      f" 0 and 1, not {asked!r}"
    )
  if asked >= 1:
    return rows, int(asked)
  # Rounded as in InternVL, in floats.
  taken = int(rows * asked)
  if rows and not taken:
    raise InputError(
      f"repeat_time: {asked} of {rows} rows is none; remove the entry"
    )
  return taken, 1


def _check_apart(name: str, times: int, entries: Iterable[str]) -> None:
  """Raise if the ids of a later time are those of another entry."""
  for other in entries:
    start, mark, number = other.rpartition("#")
    if mark and start == name and number.isdecimal() and int(number) <= times:
      raise InputError(
        f"repeat_time: the ids of time {number} are those of the entry {other};"
        " rename it"
      )


def _annotation(folder: pathlib.Path, path: str) -> pathlib.Path | None:
  """Return an annotation's file, None if there is none."""
  name = posixpath.basename(path)
  places = (folder / path, folder.parent / path, folder / "annotations" / name)
  there = [place for place in places if os.path.isfile(place)]
  inside = [place for place in there if files.is_inside(place, folder)]
  if there and not inside:
    raise InputError(
      f"annotation: {path} is not below {folder}; put the file into"
      f" {folder / 'annotations'}"
    )
  return inside[0] if inside else None


def _has_ids(file: json_index.File) -> bool:
  """Return whether the first record has an id; then all are taken to have."""
  if not len(file) or any(flaw.index == 0 for flaw in file.flaws):
    return False
  return "id" in file.record(0)


def _image_root(meta: pathlib.Path, roots: Iterable[str]) -> pathlib.Path:
  """Return the folder that roots are in; raise for one outside of meta's."""
  folder = meta.parent
  for place in (folder, folder.parent):
    there = [root for root in roots if os.path.isdir(place / root)]
    for root in there:
      if not files.is_inside(place / root, folder):
        raise InputError(
          f"{meta}: root: {root} is not below {folder}; if its images are to be"
          " read, name the folder that it is in as image_root (--images)"
        )
    if there:
      return place
  return folder
