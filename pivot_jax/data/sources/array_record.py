"""A set as ArrayRecord files: every row at one read, in any order.

A folder holds shards and, written last, `dataset.json`, which names them. A
record of `rows-*` is a row in msgpack: {"row": the fields but for the pixels,
"images": the image files, byte for byte as they came}; of a segment row the
label map's file follows the picture's. `texts-*` repeats the fields alone,
{"row": ..., "images": their number}, so that what reads only texts (lengths,
packing) does not read all images. `converting.py` is the command that writes.
"""

import functools
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import msgpack
import numpy as np
from PIL import Image

from pivot_jax.data import images
from pivot_jax.data.sources import (
  array_record_folder,
  embedded,
  places,
  records,
)
from pivot_jax.errors import InputError

NAME, KINDS = array_record_folder.NAME, array_record_folder.KINDS
# One record a group, so that a random read decompresses no other.
_OPTIONS = "group_size:1"

Row = dict[str, Any]


@runtime_checkable
class Source(Protocol):
  """What `write` needs of a source; all of `sources.py` have it."""

  def __len__(self) -> int: ...

  def text(self, index: int) -> Row: ...

  def name(self, index: int) -> str: ...

  def encoded(self, index: int) -> tuple[bytes, ...]: ...


class Written(NamedTuple):
  """What `write` wrote: rows, bytes, and why rows were left out."""

  rows: int
  size: int
  left_out: tuple[str, ...]


class ArrayRecord:
  """Rows of a folder that `write` made, in the order of their source.

  Threads may read at once; opening reads `dataset.json` alone. `name` is
  SHARD:ROW, counted from 0 in the shard.

  Attributes:
    path: the folder.
    kind: one of `KINDS`.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    image_size: int | None = None,
    resample: str = "bicubic",
    max_pixels: int = images.MAX_PIXELS,
    decoder: str = "pil",
  ):
    """Open a folder.

    Raises:
      InputError: no such folder, one that was written in part or by a later
        version, or a shard that is missing or cut.
    """
    self.path = pathlib.Path(folder)
    self._pictures = images.Pictures(
      self.path,
      image_size=image_size,
      resample=resample,
      max_pixels=max_pixels,
      decoder=decoder,
    )
    self.kind, shards = array_record_folder.read(self.path)
    self._rows = _opened(self.path, "rows", shards)
    self._texts = _opened(self.path, "texts", shards)
    rows = [shard.rows for shard in shards]
    self._starts = np.cumsum([0, *rows])

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, index: int) -> Row:
    row, files = self._record("rows", index)
    with records.located(self.name(index)):
      if self.kind != "segment":
        return _row(row, embedded.pixels(self._pictures, files))
      if len(files) != 2:
        raise InputError(f"image: {len(files)} files, but 2 are needed")
      labels = images.decode_labels(
        files[1], name="labels", max_pixels=self._pictures.max_pixels
      )
      image, labels = embedded.picture_and_labels(
        self._pictures, files[0], labels, name="labels"
      )
      return _row(row, image) | {"labels": labels}

  def text(self, index: int) -> Row:
    """Return the row with True in the place of its pixels."""
    row, count = self._record("texts", index)
    if self.kind == "segment":
      return _row(row, True) | {"labels": True}
    return _row(row, embedded.present(count))

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the row's image files as they came; last that of its labels."""
    return tuple(self._record("rows", index)[1])

  def check_row(self, index: int) -> None:
    """Raise for a row that cannot be read; its images are inside."""
    self.text(index)

  def stamp(self) -> str:
    """Return what tells the shards' contents, as they were written."""
    return (self.path / NAME).read_text("utf-8")

  def name(self, index: int) -> str:
    """Return SHARD:ROW, counted from 0 in the shard."""
    return self._name("rows", index)

  def _name(self, part: str, index: int) -> str:
    if not 0 <= index < len(self):
      raise IndexError(index)
    shard = int(np.searchsorted(self._starts, index, "right")) - 1
    file = array_record_folder.file_name(part, shard, len(self._starts) - 1)
    return f"{self.path / file}:{index - int(self._starts[shard])}"

  def _record(self, part: str, index: int) -> tuple[Row, Any]:
    name = self._name(part, index)
    kept = self._rows if part == "rows" else self._texts
    try:
      found = msgpack.unpackb(kept[index])
      return {**found["row"]}, found["images"]
    # What array_record and msgpack raise; TypeError is for another content.
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
      why = " ".join(str(error).split())
      raise InputError(
        f"{name}: the record cannot be unpacked ({why}); convert the data again"
      ) from None


class _Shard(NamedTuple):
  """What array_record calls a FileInstruction; it counts no file then."""

  filename: str
  skip: int
  take: int
  examples_in_shard: int


def _opened(
  folder: pathlib.Path, part: str, shards: Sequence[array_record_folder.Shard]
) -> Any:
  # Only where such files are read or written: sources of other formats do
  # without.
  from array_record.python import array_record_data_source

  name = functools.partial(array_record_folder.file_name, part)
  # It reads the fields of a FileInstruction and asks for no class of its own.
  files: Any = [
    _Shard(str(folder / name(number, len(shards))), 0, shard.rows, shard.rows)
    for number, shard in enumerate(shards)
  ]
  return array_record_data_source.ArrayRecordDataSource(files)


def write(
  source: Source,
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
    origin: what the rows were made from, for people to read.
    max_bad: the share of rows that may be left out because they cannot be read.
    progress: wraps the row numbers, as tqdm does.

  Raises:
    InputError: a folder with something in it, no rows, too many bad ones (the
      first five named), or no room on the disk.
  """
  folder = pathlib.Path(folder)
  array_record_folder.check_name(folder)
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
  made = tuple(map(array_record_folder.Shard, writer.rows, sizes))
  array_record_folder.write(
    folder,
    array_record_folder.Described(kind, made),
    {"origin": origin, "left_out": bad},
  )
  total = sum(sum(size.values()) for size in sizes)
  return Written(sum(writer.rows), total, tuple(bad))


def _write_rows(source, writer, kind, max_bad, progress) -> list[str]:
  """Write the rows; returns a message for each that is left out."""
  total, bad = len(source), []
  for index in progress(range(total)):
    writer.begin(index * writer.count // total)
    try:
      row, files = _checked(source, index, kind)
    except InputError as error:
      bad.append(str(error))
      if len(bad) > max_bad * total:
        raise InputError(
          f"{len(bad)} of {total} rows are bad, allowed is a share of"
          f" {max_bad:g}: {'; '.join(bad[:5])}"
        ) from None
      continue
    writer.write(row, files)
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

  def write(self, row: Row, files: Sequence[bytes]) -> None:
    """Add a row to the shard."""
    whole = {"row": row, "images": list(files)}
    for writer, found in zip(
      self._open.values(), (whole, {"row": row, "images": len(files)})
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
    name = array_record_folder.file_name
    return [name(p, number, self.count) for p in array_record_folder.PARTS]


def _written(path: pathlib.Path, call: Callable, *given) -> Any:
  try:
    return call(*given)
  except RuntimeError as error:
    raise InputError(f"{path}: cannot be written: {error}") from None


def _checked(
  source: Source, index: int, kind: str
) -> tuple[Row, tuple[bytes, ...]]:
  """Return a row without image, and its files, whose headers are sound."""
  row, files = dict(source.text(index)), source.encoded(index)
  with records.located(source.name(index)):
    count = len(records.listed(row.pop("image"))) + (kind == "segment")
    row.pop("labels", None)
    if len(files) != count:
      raise InputError(f"image: {len(files)} files, but {count} are needed")
    for place, data in enumerate(files):
      labels = kind == "segment" and place == 1
      name = "labels" if labels else f"image[{place}]" if place else "image"
      images.check_header(data, name=name, labels=labels)
    if kind == "segment":
      picture, labels = map(_size, files)
      embedded.check_sizes(labels, picture, name="labels")
    _check_packs(row)
  return row, files


def _size(data: bytes) -> tuple[int, int]:
  """Return (W, H) of an image whose header is sound."""
  return Image.open(io.BytesIO(data), formats=images.FORMATS).size


def _check_packs(row: Row) -> None:
  """Raise for a row that msgpack cannot hold, and says which field."""
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
        f"{field}: cannot be written: {places.reason(error)}"
      ) from None


def _row(row: Row, image: Any) -> Row:
  return {"id": row["id"], "image": image} | row
