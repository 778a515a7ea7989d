"""Rows of parquet files by index, as plain dicts of the columns asked for.

A set is one file, or shards in order of name. Opening reads footers only, and
reading keeps a few row groups, so that no file is ever in memory. What the
columns mean is `parquet.py`'s.
"""

import collections
import contextlib
import os
import pathlib
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pivot_jax.errors import InputError

# Row groups are kept up to so many bytes. Of images, with 100 rows or more, one
# may have a tenth of that, or more than all.
CACHED = 2**27
# train-00000-of-00020, dev-00000-of-00001-75b6649fb044d38b
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(-[0-9a-f]+)?")


class Place(NamedTuple):
  """Where a row is: its file, and the row in that file, from 0."""

  path: pathlib.Path
  row: int

  def __str__(self) -> str:
    return f"{self.path}:{self.row}"

  @property
  def id(self) -> str:
    """What a row without an id is called."""
    return f"{self.path.stem}-{self.row}"


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
    """Return columns of a row group, which is counted over all files."""
    file = int(self._file[group])
    leaves = [_leaf(self._footers[file].schema, column) for column in columns]
    with _reading(), self._open(file) as opened:
      # Other threads of the caller decode other groups meanwhile.
      return opened.read_row_group(
        int(self._group[group]), columns=leaves, use_threads=False
      )

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


def is_list(found: Any) -> bool:
  """Return whether the values of an Arrow type are lists."""
  types = pyarrow().types
  tests = (types.is_list, types.is_large_list, types.is_fixed_size_list)
  return any(test(found) for test in tests)


def pyarrow() -> Any:
  """Return the package; raises InputError if it is not installed."""
  try:
    import pyarrow.compute
    import pyarrow.parquet
  except ImportError as error:
    raise InputError(
      'parquet files need pyarrow: pip install "pivot_jax[parquet]"'
    ) from error
  return pyarrow


@contextlib.contextmanager
def _reading(place: str = "") -> Iterator[None]:
  """Turn pyarrow's errors into an InputError that starts with `place`."""
  try:
    yield
  # pyarrow opens no file whose name is not UTF-8.
  except (OSError, UnicodeEncodeError, pyarrow().ArrowException) as error:
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


def _joined(schema: Any, other: Any, path, first: pathlib.Path) -> Any:
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
    both = _common(one.type, two.type)
    if both is None:
      raise InputError(
        f"{path}: {one.name}: is of type {two.type}, but {one.type} in"
        f" {first.name}"
      )
    fields.append(arrow.field(one.name, both))
  return arrow.schema(fields)


def _common(one: Any, other: Any) -> Any:
  """Return an Arrow type for the values of both, None if they differ.

  Types whose values are the same in Python, as texts however long, are one.
  """
  arrow = pyarrow()
  types = arrow.types
  if types.is_dictionary(one):
    return _common(one.value_type, other)
  if types.is_dictionary(other):
    return _common(one, other.value_type)
  if types.is_null(one) or types.is_null(other):
    return other if types.is_null(one) else one
  if is_list(one) and is_list(other):
    inner = _common(one.value_type, other.value_type)
    return None if inner is None else arrow.list_(inner)
  if types.is_struct(one) and types.is_struct(other):
    return _common_struct(one, other)
  tests = (
    (types.is_string, types.is_large_string),
    (types.is_binary, types.is_large_binary),
    (types.is_integer,),
    (types.is_floating,),
  )
  alike = any(
    all(any(test(found) for test in kind) for found in (one, other))
    for kind in tests
  )
  return one if alike or one.equals(other) else None


def _common_struct(one: Any, other: Any) -> Any:
  arrow = pyarrow()
  types = [
    {field.name: field.type for field in found} for found in (one, other)
  ]
  if set(types[0]) != set(types[1]):
    return None
  both = {name: _common(types[0][name], types[1][name]) for name in types[0]}
  return None if None in both.values() else arrow.struct(list(both.items()))


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
