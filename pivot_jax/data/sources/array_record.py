"""A set as ArrayRecord files: every row at one read, in any order.

A folder holds shards and, written last, `dataset.json`, which names them. A
record of `rows-*` is a row in msgpack: {"row": the fields but for the pixels,
"images": the image files, byte for byte as they came}; of a segment row the
label map's file follows the picture's. `texts-*` repeats the fields alone,
{"row": ..., "images": their number}, so that what reads only texts (lengths,
packing) does not read all images. `data convert` is the command that writes.
"""

import functools
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np
from PIL import Image

from pivot_jax import files
from pivot_jax.data import images, rows
from pivot_jax.data.sources import records
from pivot_jax.errors import InputError

NAME = "dataset.json"
FORMAT, VERSION = "pivot_jax rows in ArrayRecord", 1
KINDS = ("conversation", "preference", "eval", "classify", "segment")
PARTS = ("rows", "texts")
# One record a group, so that a random read decompresses no other.
_OPTIONS = "group_size:1"


class Shard(NamedTuple):
  """The number of rows of a shard, and the bytes of its files by name."""

  rows: int
  sizes: Mapping[str, int]


class Described(NamedTuple):
  """The used content of `dataset.json`: one of `KINDS`, and the shards."""

  kind: str
  shards: tuple[Shard, ...]


class Written(NamedTuple):
  """The outcome of `write`: rows, bytes, and the reason of each skipped row."""

  rows: int
  size: int
  skipped: tuple[str, ...]


class ArrayRecord:
  """Rows of a folder that `write` made, in the order of their source.

  Threads may read at once; opening reads `dataset.json` and the shards' counts.
  `name` is SHARD:ROW, counted from 0 in the shard.

  Attributes:
    path: the folder.
    kind: one of `KINDS`.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    image_spec: images.ImageSpec = images.AS_THEY_ARE,
  ):
    """Open a folder.

    Raises:
      InputError: no such folder, one that was written in part or by a later
        version, or a shard that is missing, cut or of another number of rows.
    """
    self.path = pathlib.Path(path)
    self._pictures = images.Pictures(self.path, image_spec)
    self.kind, shards = read_description(self.path)
    self._rows = _opened(self.path, "rows", shards)
    self._texts = _opened(self.path, "texts", shards)
    self._starts = np.cumsum([0, *(shard.rows for shard in shards)])

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, index: int) -> rows.Row:
    row, files = self._record("rows", index)
    with records.located(self.name(index)):
      if self.kind != "segment":
        return _row(row, self._pictures.decode_row(files))
      if len(files) != 2:
        raise InputError(f"image: {len(files)} files, but 2 are needed")
      labels = images.decode_labels(
        files[1], name="labels", max_pixels=self._pictures.spec.max_pixels
      )
      whole = self._pictures.decode_native(files[0], name="image")
      image, labels = self._pictures.fit_labeled(whole, labels, name="labels")
      return _row(row, image) | {"labels": labels}

  def text(self, index: int) -> rows.Row:
    """Return the row with True in the place of its pixels."""
    row, count = self._record("texts", index)
    if self.kind == "segment":
      return _row(row, True) | {"labels": True}
    return _row(row, records.placeholders(count))

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the row's image files as they came; last that of its labels."""
    return tuple(self._record("rows", index)[1])

  def check_row(self, index: int) -> None:
    """Raise for a row that cannot be read; its images are inside."""
    self.text(index)

  def stamp(self) -> str:
    """Return `dataset.json`, which names the shards and their sizes."""
    return (self.path / NAME).read_text("utf-8")

  def name(self, index: int) -> str:
    """Return SHARD:ROW, counted from 0 in the shard."""
    return self._name("rows", index)

  def _name(self, part: str, index: int) -> str:
    if not 0 <= index < len(self):
      raise IndexError(index)
    shard = int(np.searchsorted(self._starts, index, "right")) - 1
    file = file_name(part, shard, len(self._starts) - 1)
    return f"{self.path / file}:{index - int(self._starts[shard])}"

  def _record(self, part: str, index: int) -> tuple[rows.Row, Any]:
    name = self._name(part, index)
    kept = self._rows if part == "rows" else self._texts
    try:
      found = msgpack.unpackb(kept[index])
      row, held = {**found["row"]}, found["images"]
      records.check_packed(row, held, self.kind, whole=part == "rows")
      return row, held
    # What array_record and msgpack raise; TypeError is for another content.
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
      why = " ".join(str(error).split())
      raise InputError(
        f"{name}: the record cannot be unpacked ({why}); convert the data again"
      ) from None


class _Instruction(NamedTuple):
  """A FileInstruction of array_record, which then counts no file's rows."""

  filename: str
  skip: int
  take: int
  examples_in_shard: int


def count(path: pathlib.Path) -> int:
  """Return how many records a shard says it has; raise InputError if damaged."""
  from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
  )

  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    held = reader.num_records()
    reader.close()
  except RuntimeError as error:
    raise InputError(f"{path}: cannot be read: {error}") from None
  return held


def _opened(folder: pathlib.Path, part: str, shards: Sequence[Shard]) -> Any:
  # Only where such files are read or written: sources of other formats do
  # without. The module is compiled and has no stubs.
  from array_record.python import array_record_data_source

  name = functools.partial(file_name, part)
  for number, shard in enumerate(shards):
    path = folder / name(number, len(shards))
    rows = count(path)
    if rows != shard.rows:
      raise InputError(
        f"{path}: has {rows} rows, but {NAME} says {shard.rows}; convert the"
        " data again"
      )
  # It reads the fields of a FileInstruction and asks for no class of its own.
  files: Any = [
    _Instruction(
      str(folder / name(number, len(shards))), 0, shard.rows, shard.rows
    )
    for number, shard in enumerate(shards)
  ]
  return array_record_data_source.ArrayRecordDataSource(files)


def write(
  source: rows.Source,
  folder: str | os.PathLike,
  *,
  kind: str,
  shards: int,
  origin: str,
  max_bad: float = 0.0,
  progress: Callable[[range], Iterable[int]] = iter,
) -> Written:
  """Write a source's rows, their images undecoded, into a new folder.

  Of an image only the header is looked at. The fields are those of `text`.

  Args:
    kind: the kind of the rows, one of `KINDS`.
    shards: the number of files, at most one a row.
    origin: the data that the rows were made from, for people to read.
    max_bad: the share of rows that may be skipped because they cannot be read.
    progress: wraps the row numbers, as tqdm does.

  Raises:
    InputError: a folder with something in it, no rows, too many bad ones (the
      first five named), or no room on the disk.
  """
  folder = pathlib.Path(folder)
  check_name(folder)
  if kind not in KINDS:
    raise InputError(
      f"kind {kind!r} cannot be written; only {', '.join(KINDS)}"
    )
  if not 1 <= shards <= 99_999:
    raise InputError(f"shards={shards}: give 1 to 99999")
  if not 0 <= max_bad <= 1:
    raise InputError(f"max_bad={max_bad}: give a share of 0 to 1")
  if not len(source):
    raise InputError(f"{origin}: no rows to write")
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f"{folder}: exists and is not an empty folder")
  folder.mkdir(parents=True, exist_ok=True)
  writer = _Writer(folder, min(shards, len(source)))
  bad = _write_rows(source, writer, kind, max_bad, progress)
  writer.close()
  if not sum(writer.rows):
    raise InputError(f"all {len(source)} rows are bad: {bad[0]}")
  sizes = [writer.sizes(number) for number in range(writer.count)]
  made = tuple(map(Shard, writer.rows, sizes))
  write_description(
    folder, Described(kind, made), {"origin": origin, "left_out": bad}
  )
  total = sum(sum(size.values()) for size in sizes)
  return Written(sum(writer.rows), total, tuple(bad))


def _write_rows(
  source: rows.Source,
  writer: "_Writer",
  kind: str,
  max_bad: float,
  progress: Callable[[range], Iterable[int]],
) -> list[str]:
  """Write the rows; return a message for each that is skipped."""
  total, bad = len(source), []
  for index in progress(range(total)):
    writer.begin(index * writer.count // total)
    try:
      row, encoded = _checked(source, index, kind)
    except InputError as error:
      bad.append(str(error))
      if len(bad) > max_bad * total:
        raise InputError(
          f"{len(bad)} of {total} rows are bad, allowed is a share of"
          f" {max_bad:g}: {'; '.join(bad[:5])}"
        ) from None
      continue
    writer.write(row, encoded)
  return bad


class _Writer:
  """The shards of a folder, of which one after the other is written.

  Attributes:
    count: how many shards there are to be.
    rows: the rows of each.
  """

  def __init__(self, folder: pathlib.Path, count: int):
    self.count, self.rows = count, [0] * count
    self._folder, self._number = folder, -1
    self._open: dict[pathlib.Path, Any] = {}

  def begin(self, number: int) -> None:
    """Make the shard of this number the one that is written."""
    if number == self._number:
      return
    # Here as in `_opened`. It is compiled and has no stubs.
    from array_record.python import (
      array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
    )

    self.close()
    self._number = number
    for name in self._names(number):
      path = self._folder / name
      aside = str(path.with_suffix(".tmp"))
      self._open[path] = _written(
        self._folder, array_record_module.ArrayRecordWriter, aside, _OPTIONS
      )

  def write(self, row: rows.Row, encoded: Sequence[bytes]) -> None:
    """Add a row to the shard."""
    whole = {"row": row, "images": list(encoded)}
    for writer, found in zip(
      self._open.values(), (whole, {"row": row, "images": len(encoded)})
    ):
      _written(self._folder, writer.write, msgpack.packb(found))
    self.rows[self._number] += 1

  def close(self) -> None:
    """End the shard, which gets its name then."""
    for path, writer in self._open.items():
      _written(self._folder, writer.close)
      path.with_suffix(".tmp").rename(path)
    self._open = {}

  def sizes(self, number: int) -> dict[str, int]:
    """Return the bytes of each file of a shard."""
    names = self._names(number)
    return {name: (self._folder / name).stat().st_size for name in names}

  def _names(self, number: int) -> list[str]:
    return [file_name(part, number, self.count) for part in PARTS]


def _written(path: pathlib.Path, call: Callable, *arguments: Any) -> Any:
  try:
    return call(*arguments)
  except RuntimeError as error:
    raise InputError(f"{path}: cannot be written: {error}") from None


def _checked(
  source: rows.Source, index: int, kind: str
) -> tuple[rows.Row, tuple[bytes, ...]]:
  """Return a row without image, and its files, whose headers are sound."""
  row, encoded = dict(source.text(index)), source.encoded(index)
  with records.located(source.name(index)):
    count = len(records.listed(row.pop("image"))) + (kind == "segment")
    row.pop("labels", None)
    if len(encoded) != count:
      raise InputError(f"image: {len(encoded)} files, but {count} are needed")
    for place, data in enumerate(encoded):
      labels = kind == "segment" and place == 1
      name = "labels" if labels else f"image[{place}]" if place else "image"
      images.check_header(data, name=name, labels=labels)
    if kind == "segment":
      picture, labels = map(_size, encoded)
      images.check_same_size(labels, picture, name="labels")
    _check_packs(row)
  return row, encoded


def _size(data: bytes) -> tuple[int, int]:
  """Return (W, H) of an image whose header is sound."""
  return Image.open(io.BytesIO(data), formats=images.FORMATS).size


def _check_packs(row: rows.Row) -> None:
  """Raise for a row that msgpack cannot hold, and say which field."""
  for field, value in row.items():
    try:
      msgpack.packb(value)
    except UnicodeEncodeError:
      raise InputError(
        f"{field}: has characters that are no UTF-8; if it is the name of a"
        " file, rename that",
        kind="lone_surrogate",
      ) from None
    # An integer of over 64 bits, another type.
    except (OverflowError, ValueError, TypeError) as error:
      raise InputError(
        f"{field}: cannot be written: {images.reason(error)}"
      ) from None


def _row(row: rows.Row, image: Any) -> rows.Row:
  return {"id": row["id"], "image": image} | row


def file_name(part: str, number: int, count: int) -> str:
  """Return the name of the file of one of `PARTS` of a shard."""
  return f"{part}-{number:05d}-of-{count:05d}.array_record"


def check_name(folder: pathlib.Path) -> None:
  """Raise for a name that is not UTF-8, which the library cannot open."""
  try:
    str(folder).encode("utf-8")
  except UnicodeEncodeError:
    raise InputError(f"{folder}: the name is not UTF-8; give another") from None


def write_description(
  folder: pathlib.Path, described: Described, more: Mapping[str, Any]
) -> None:
  """Write `dataset.json`, last of all: a folder without it is incomplete."""
  said = {
    "format": FORMAT,
    "version": VERSION,
    "kind": described.kind,
    "rows": sum(shard.rows for shard in described.shards),
    **more,
    "shards": [
      {"rows": shard.rows, "bytes": dict(shard.sizes)}
      for shard in described.shards
    ],
  }
  files.write_json(folder / NAME, said, sort_keys=False)


def read_description(folder: pathlib.Path) -> Described:
  """Read and check `dataset.json`; look at the sizes of the files.

  Raises:
    InputError: no such folder, one that was written in part or by a later
      version, a shard that is missing or cut, or as `check_name`.
  """
  check_name(folder)
  path = folder / NAME
  said = _read(path)
  if said.get("kind") not in KINDS:
    raise InputError(
      f"{path}: kind: must be one of {', '.join(KINDS)}, not"
      f" {said.get('kind')!r}; convert the data again"
    )
  found = said.get("shards")
  if not isinstance(found, list) or not found:
    raise InputError(
      f"{path}: shards: must be a list of them; convert the data again"
    )
  shards = tuple(
    _shard(one, f"{path}: shards[{number}]", number, len(found))
    for number, one in enumerate(found)
  )
  for shard in shards:
    for name, size in shard.sizes.items():
      _check_file(folder / name, size)
  return Described(said["kind"], shards)


def _read(path: pathlib.Path) -> Mapping[str, Any]:
  folder = path.parent
  if not path.is_file():
    if not folder.is_dir():
      raise InputError(f"{folder}: no such folder")
    if any(folder.glob("rows-*")):
      raise InputError(
        f"{folder}: was written only in part, it has no {NAME}; remove it and"
        " convert again"
      )
    raise InputError(f"{folder}: no {NAME} in it; make it by converting")
  said = files.read_object(path)
  found = said.get("format"), said.get("version")
  if found != (FORMAT, VERSION):
    raise InputError(
      f"{path}: is {found[0]}, version {found[1]}, not {FORMAT}, version"
      f" {VERSION}; convert the data again"
    )
  return said


def _shard(found: Any, where: str, number: int, count: int) -> Shard:
  names = [file_name(part, number, count) for part in PARTS]
  said = found if isinstance(found, dict) else {}
  size, sizes = said.get("rows"), said.get("bytes")
  if not isinstance(size, int):
    size = -1
  if isinstance(sizes, dict) and sorted(sizes) == sorted(names):
    if all(map(_is_count, (size, *sizes.values()))):
      return Shard(size, sizes)
  raise InputError(
    f"{where}: must say rows, and the bytes of {' and '.join(names)}; convert"
    " the data again"
  )


def _is_count(found: Any) -> bool:
  return isinstance(found, int) and not isinstance(found, bool) and found >= 0


def _check_file(path: pathlib.Path, size: int) -> None:
  if not path.is_file():
    raise InputError(f"{path}: the shard is missing; convert the data again")
  found = path.stat().st_size
  if found != size:
    raise InputError(
      f"{path}: {found} bytes instead of {size}; copy or convert it again"
    )
