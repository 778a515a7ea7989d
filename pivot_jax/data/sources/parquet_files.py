"""Rows of parquet files by index, as plain dicts of the columns asked for.

A set is one file, or shards in order of name. Opening reads footers only, and
reading keeps a few row groups, so that no file is ever in memory. `uses` numbers
the rows that have the id of an earlier row. `parquet.py` knows what the columns
mean.
"""

import array
import collections
import contextlib
import os
import pathlib
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import tqdm
from jaxtyping import Int32, Int64

from pivot_jax import output
from pivot_jax.data.sources import parquet_sizes
from pivot_jax.errors import InputError

# Row groups are kept up to so many bytes. Of images, with 100 rows or more, one
# may have a tenth of that, or more than all.
CACHED = 2**27
# Reading so many ids takes a moment; then there is a bar.
LARGE = 200_000
_SLICE = 2**16  # Ids that are Python objects at once.
_NUMBERED = re.compile(rb"(.*)#([1-9]\d{0,8})", re.DOTALL)
# train-00000-of-00020, dev-00000-of-00001-75b6649fb044d38b
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(-[0-9a-f]+)?")


class Place(NamedTuple):
  """The place of a row: its file, and its number in that file, from 0."""

  path: pathlib.Path
  row: int

  def __str__(self) -> str:
    return f"{self.path}:{self.row}"

  @property
  def id(self) -> str:
    """The id of a row without one."""
    return f"{self.path.stem}-{self.row}"


@runtime_checkable
class ArrowType(Protocol):
  """A type of pyarrow's, which may not be installed."""

  num_fields: int


class Column(NamedTuple):
  """A column to read; of its structs only `field`, if they have one."""

  name: str
  field: str = ""


class Files:
  """The rows of one parquet file, or of a folder's in order of name.

  Threads may read at once. Attributes:
    paths: the files in order.
    schema: the Arrow schema they have in common. A file may lack all values of
      a column, and has the type null there then.
  """

  def __init__(self, path: str | os.PathLike):
    """Read the footers of a file, of a folder, or of FOLDER/PATTERN.

    Raises:
      InputError: no pyarrow, no such file, no parquet, a shard that is
        missing, shards of several splits, or columns of different names or
        types.
    """
    self.paths = _find(pathlib.Path(path))
    self.schema: Any = None
    # Kept, as reading one again may take as long as reading a row group.
    self._footers = []
    for file in self.paths:
      with _reading(f"{file}: "), pyarrow().parquet.ParquetFile(file) as opened:
        parquet_sizes.check_rows(file, opened.metadata)
        self._footers.append(opened.metadata)
        schema = opened.schema_arrow.remove_metadata()
      if self.schema is None:
        self.schema = schema
      else:
        self.schema = _joined(self.schema, schema, file, self.paths[0])
    groups = [
      (number, group, footer.row_group(group).num_rows)
      for number, footer in enumerate(self._footers)
      for group in range(footer.num_row_groups)
    ]
    table = np.array(groups, np.int64).reshape(-1, 3)
    self._file, self._group = table[:, 0], table[:, 1]
    self._ends = np.cumsum(table[:, 2])
    rows = [footer.num_rows for footer in self._footers]
    self._starts = np.cumsum([0, *rows])
    self._cache: collections.OrderedDict[Any, _Group] = (
      collections.OrderedDict()
    )
    self._lock = threading.Lock()
    self._checked: set[tuple[int, tuple[str, ...]]] = set()

  def __len__(self) -> int:
    return int(self._starts[-1])

  def place(self, index: int) -> Place:
    """Return the file of a row and its row there."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    file = int(np.searchsorted(self._starts, index, "right")) - 1
    return Place(self.paths[file], index - int(self._starts[file]))

  def record(self, index: int, columns: tuple[Column, ...]) -> dict[str, Any]:
    """Return a row's columns by name.

    Raises:
      InputError: the row group cannot be read, or a text is no UTF-8; it names
        no row.
    """
    group = int(np.searchsorted(self._ends, index, "right"))
    begin = int(self._ends[group - 1]) if group else 0
    table = self._kept(group, columns).table()
    return {
      name: _value(table.column(name)[index - begin], name)
      for name in table.column_names
    }

  def groups(self) -> list[range]:
    """Return the rows of each row group, counted over all files."""
    ends = self._ends.tolist()
    return [range(begin, end) for begin, end in zip([0, *ends], ends)]

  def ids(self, group: int, name: str) -> Any:
    """Return a column of text or whole numbers as an Arrow array of bytes.

    Raises:
      InputError: it has another type, or the row group cannot be read.
    """
    arrow = pyarrow()
    column = self.read_group(group, (Column(name),)).column(name)
    with _reading():
      # No text is looked at, so that one that is no UTF-8 is none of the ids'.
      return column.cast(arrow.large_string()).cast(arrow.large_binary())

  def _kept(self, group: int, columns: tuple[Column, ...]) -> "_Group":
    key = (group, columns)
    with self._lock:
      if key not in self._cache:
        while sum(one.size for one in self._cache.values()) > CACHED:
          self._cache.popitem(last=False)
        self._cache[key] = _Group(self, group, columns)
      self._cache.move_to_end(key)
      return self._cache[key]

  def read_group(self, group: int, columns: Sequence[Column]) -> Any:
    """Return columns of a row group, which is counted over all files.

    Raises:
      InputError: it cannot be read, or as `parquet_sizes.check_group`.
    """
    file, own = int(self._file[group]), int(self._group[group])
    leaves = tuple(
      _leaf(self._footers[file].schema, column) for column in columns
    )
    with _reading(), self._open(file) as opened:
      if (group, leaves) not in self._checked:
        parquet_sizes.check_group(self.paths[file], opened, own, leaves)
        self._checked.add((group, leaves))
      # Other threads of the caller decode other groups meanwhile.
      found = opened.read_row_group(
        own, columns=list(leaves), use_threads=False
      )
    rows = self._footers[file].row_group(own).num_rows
    if leaves and found.num_rows != rows:
      raise InputError(
        f"parquet that cannot be read: {found.num_rows} of {rows} rows"
      )
    return found

  def _open(self, file: int) -> Any:
    return pyarrow().parquet.ParquetFile(
      self.paths[file], metadata=self._footers[file]
    )


class _Group:
  """Some columns of a row group, read when they are first asked for."""

  def __init__(self, files: Files, group: int, columns: Sequence[Column]):
    self.size = 0  # Bytes, once it is read.
    self._wanted = files, group, columns
    self._table = None
    self._lock = threading.Lock()

  def table(self) -> Any:
    files, group, columns = self._wanted
    with self._lock:
      if self._table is None:
        self._table = files.read_group(group, columns)
        self.size = self._table.nbytes
      return self._table


def uses(files: Files, column: str) -> Int32[np.ndarray, "N"]:
  """Return the use of its id that each row is: 0 for the first, then 2, 3, ...

  Of millions of ids none is held: of each there is a hash while they are
  counted, and one number a row afterwards. That two different ids have one hash
  is next to impossible, and only numbers a row that needed no number. Numbers
  that would make the id of another row are skipped. A row without an id has that
  of its place. Rows that cannot be read are not counted: reading one of them
  says what is wrong.
  """
  hashes = np.zeros(len(files), np.int64)
  numbered = _Numbered()
  bar = tqdm.tqdm(
    total=len(files),
    desc=output.label("reading", column),
    unit="row",
    disable=None if len(files) >= LARGE else True,
  )
  with bar:
    for begin, ids in _ids(files, column):
      end = begin + len(ids)
      hashes[begin:end] = np.fromiter(map(hash, ids), np.int64, len(ids))
      numbered.add(ids)
      bar.update(len(ids))
  return _count(hashes, numbered)


def is_list(found: ArrowType) -> bool:
  """Return whether the values of an Arrow type are lists."""
  types = pyarrow().types
  tests = (types.is_list, types.is_large_list, types.is_fixed_size_list)
  return any(test(found) for test in tests)


def pyarrow() -> Any:
  """Return the package; raise InputError if it is not installed."""
  try:
    import pyarrow.compute
    import pyarrow.parquet
  except ImportError as error:
    raise InputError(
      'parquet files need pyarrow: pip install "pivot_jax[parquet]"'
    ) from error
  return pyarrow


class _Numbered:
  """Ids of the form BASE#NUMBER, which uses of BASE must leave alone."""

  def __init__(self):
    self._bases, self._numbers = array.array("q"), array.array("q")

  def add(self, ids: np.ndarray) -> None:
    for one in ids:
      if b"#" in one and (found := _NUMBERED.fullmatch(one)):
        self._bases.append(hash(found[1]))
        self._numbers.append(int(found[2]))

  def of(self, hashes: np.ndarray) -> dict[int, set[int]]:
    """Return the numbers that are taken of bases with one of the hashes."""
    bases = np.array(self._bases, np.int64)
    kept = np.flatnonzero(np.isin(bases, hashes))
    taken: dict[int, set[int]] = {}
    for index in kept.tolist():
      taken.setdefault(self._bases[index], set()).add(self._numbers[index])
    return taken


def _count(hashes: Int64[np.ndarray, "N"], numbered: _Numbered) -> np.ndarray:
  order = np.argsort(hashes, kind="stable")
  ordered = hashes[order]
  again = np.r_[False, ordered[1:] == ordered[:-1]]
  places = np.arange(len(order), dtype=np.int32)
  first = np.maximum.accumulate(np.where(again, 0, places))
  found = np.zeros(len(order), np.int32)
  found[order[again]] = (places - first + 1)[again]
  for base, taken in numbered.of(ordered[again]).items():
    begin = np.searchsorted(ordered, base)
    end = np.searchsorted(ordered, base, "right")
    number = 1
    for index in order[begin + 1 : end].tolist():
      number += 1
      while number in taken:
        number += 1
      found[index] = number
  return found


def _ids(files: Files, column: str) -> Iterator[tuple[int, np.ndarray]]:
  """Yield ids as bytes, so many at once, after the row of the first."""
  for group, rows in enumerate(files.groups()):
    if not rows:
      continue
    try:
      found = files.ids(group, column)
    except InputError:
      found = None
    place = files.place(rows.start)
    for begin in range(0, len(rows), _SLICE):
      size = min(_SLICE, len(rows) - begin)
      ids = np.full(size, None, object)
      if found is not None:
        ids = found.slice(begin, size).to_numpy().copy()
      for index in np.flatnonzero([one is None for one in ids]).tolist():
        row = place._replace(row=place.row + begin + index)
        ids[index] = row.id.encode("utf-8", "surrogateescape")
      yield rows.start + begin, ids


@contextlib.contextmanager
def _reading(place: str = "") -> Iterator[None]:
  """Turn pyarrow's errors into an InputError that starts with `place`."""
  try:
    yield
  except MemoryError:
    # One of pyarrow's own, too, and no fault of a row.
    raise
  # Neither a file nor a column whose name is not UTF-8 is opened.
  except (OSError, UnicodeError, pyarrow().ArrowException) as error:
    why = " ".join(str(error).split())
    raise InputError(f"{place}parquet that cannot be read: {why}") from None


def _value(found: Any, name: str) -> Any:
  try:
    return found.as_py()
  except UnicodeDecodeError as error:
    raise InputError(
      f"{name}: invalid UTF-8 at byte {error.start + 1} of a text",
      kind="bad_utf8",
    ) from None


def _leaf(schema: Any, column: Column) -> str:
  """Return the dotted path of what a file stores of a column."""
  # What comes between (list.element, list.item) is up to who wrote the file.
  paths = (schema.column(i).path for i in range(len(schema)))
  begin, end = f"{column.name}.", f".{column.field}"
  found = (p for p in paths if p.startswith(begin) and p.endswith(end))
  return next(found, column.name) if column.field else column.name


def _joined(
  schema: Any, other: Any, path: pathlib.Path, first: pathlib.Path
) -> Any:
  """Return the schema of all files so far and of one more."""
  if other.names != schema.names:
    raise InputError(
      f"{path}: has the columns {', '.join(other.names)}, but {first.name}"
      f" {', '.join(schema.names)}"
    )
  if other.equals(schema):
    return schema
  arrow, fields = pyarrow(), []
  for one, two in zip(schema, other):
    both = [arrow.field(one.name, _widest(field.type)) for field in (one, two)]
    try:
      joined = arrow.unify_schemas([arrow.schema([field]) for field in both])
    except arrow.ArrowTypeError:
      joined = None
    if not joined or any(_lacks(f.type, joined.field(0).type) for f in both):
      raise InputError(
        f"{path}: {one.name}: is of type {two.type}, but {one.type} in"
        f" {first.name}"
      )
    fields.append(joined.field(0))
  return arrow.schema(fields)


def _widest(found: Any) -> Any:
  """Return the one Arrow type of all whose values are the same in Python.

  Whole numbers stay apart from floats, and texts from bytes, which pyarrow would
  widen to.
  """
  arrow = pyarrow()
  types = arrow.types
  if types.is_dictionary(found):
    return _widest(found.value_type)
  if is_list(found):
    return arrow.list_(_widest(found.value_type))
  if types.is_struct(found):
    parts = {field.name: _widest(field.type) for field in found}
    return arrow.struct(sorted(parts.items(), key=lambda part: part[0]))
  if types.is_large_string(found) or types.is_large_binary(found):
    return arrow.string() if types.is_large_string(found) else arrow.binary()
  if types.is_integer(found):
    return arrow.int64()
  return arrow.float64() if types.is_floating(found) else found


def _lacks(found: Any, joined: Any) -> bool:
  """Return whether a struct in a type has fewer fields than it has joined."""
  if pyarrow().types.is_null(found):
    return False
  return found.num_fields != joined.num_fields or any(
    _lacks(found.field(index).type, joined.field(index).type)
    for index in range(found.num_fields)
  )


def _find(path: pathlib.Path) -> list[pathlib.Path]:
  if path.is_file():
    return [path]
  if "*" in path.name:
    found = sorted(p for p in path.parent.glob(path.name) if p.is_file())
    if not found:
      raise InputError(f"{path}: no file is called so")
  elif path.is_dir():
    found = _of_folder(path)
  else:
    raise InputError(f"{path}: no such file or folder")
  _check_complete(path, found)
  return found


def _of_folder(path: pathlib.Path) -> list[pathlib.Path]:
  found = sorted(path.glob("*.parquet"))
  if not found:
    folders = sorted({str(p.parent) for p in path.glob("*/*.parquet")})
    hint = f"; name one of {', '.join(folders[:5])}" if folders else ""
    raise InputError(f"{path}: no .parquet file in it{hint}")
  return found


def _check_complete(path: pathlib.Path, found: list[pathlib.Path]) -> None:
  """Raise unless the shards are all those of one split."""
  named = [_SHARD.fullmatch(file.stem) for file in found]
  splits = sorted({match[1] for match in named if match})
  if len(splits) > 1:
    folder = path.parent if "*" in path.name else path
    choices = ", ".join(f"{folder / split}-*" for split in splits)
    raise InputError(f"{path}: has several splits; name one of {choices}")
  totals = {int(match[3]) for match in named if match}
  if len(totals) > 1:
    raise InputError(
      f"{path}: shards of {' and of '.join(map(str, sorted(totals)))} lie"
      " together; keep those of one"
    )
  there = {int(match[2]) for match in named if match}
  missing = sorted(set(range(max(totals, default=0))) - there)
  if missing:
    raise InputError(
      f"{path}: {len(missing)} of {max(totals)} shards are missing, the first"
      f" is {splits[0]}-{missing[0]:05d}-of-{max(totals):05d}; download them"
    )
