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


class Files:
  """The rows of one parquet file, or of a folder's in order of name.

  Threads may read at once. Attributes:
    paths: the files in order.
    schema: the Arrow schema they have in common.
    leaves: the dotted paths of what is stored, as `image.bytes`.
  """

  def __init__(self, path: str | os.PathLike):
    """Reads the footers of a file, of a folder, or of FOLDER/PATTERN.

    Raises:
      InputError: no pyarrow, no such file, no parquet, a shard that is
        missing, shards of several splits, or different columns.
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
      elif schema.names != self.schema.names:
        raise InputError(
          f"{file}: has the columns {', '.join(schema.names)}, but"
          f" {self.paths[0].name} {', '.join(self.schema.names)}"
        )
    first = self._footers[0].schema
    self.leaves = tuple(first.column(i).path for i in range(len(first)))
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
    """Returns the file of a row and its row there."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    file = int(self.files_of(np.array(index)))
    return Place(self.paths[file], index - int(self._starts[file]))

  def record(self, index: int, columns: tuple[str, ...]) -> dict[str, Any]:
    """Returns a row's columns, each by its name or a leaf's dotted path.

    Raises:
      InputError: the row group cannot be read; it names no row.
    """
    group = int(np.searchsorted(self._ends, index, "right"))
    begin = int(self._ends[group - 1]) if group else 0
    table = self._kept(group, columns).table()
    return {
      name: table.column(name)[index - begin].as_py()
      for name in table.column_names
    }

  def column(self, name: str, file: int) -> list[str | None]:
    """Returns a column of one of the files as text; for short ones.

    Raises:
      InputError: it is neither text nor whole numbers, or cannot be read.
    """
    arrow = pyarrow()
    with _reading(f"{self.paths[file]}: "), self._open(file) as opened:
      read = opened.read(columns=[name]).column(name)
      return read.cast(arrow.large_string()).to_pylist()

  def files_of(self, rows: np.ndarray) -> np.ndarray:
    """Returns the numbers of the files that rows are in."""
    return np.searchsorted(self._starts, rows, "right") - 1

  def start(self, file: int) -> int:
    """Returns the index of a file's first row."""
    return int(self._starts[file])

  def _kept(self, group: int, columns: tuple[str, ...]) -> "_Group":
    key = (group, columns)
    with self._lock:
      if key not in self._cache:
        while sum(one.size for one in self._cache.values()) > CACHED:
          self._cache.popitem(last=False)
        self._cache[key] = _Group(self, group, columns)
      self._cache.move_to_end(key)
      return self._cache[key]

  def read_group(self, group: int, columns: Sequence[str]) -> Any:
    """Returns columns of a row group, which is counted over all files."""
    with _reading(), self._open(self._file[group]) as opened:
      # Other threads of the caller decode other groups meanwhile.
      return opened.read_row_group(
        int(self._group[group]), columns=list(columns), use_threads=False
      )

  def _open(self, file: int) -> Any:
    return pyarrow().parquet.ParquetFile(
      self.paths[file], metadata=self._footers[file]
    )


class _Group:
  """Some columns of a row group, read when they are first asked for."""

  def __init__(self, files: Files, group: int, columns: Sequence[str]):
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


def pyarrow() -> Any:
  """Returns the package; raises InputError if it is not installed."""
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
  """Turns pyarrow's errors into an InputError that starts with `place`."""
  try:
    yield
  except (OSError, pyarrow().ArrowException) as error:
    why = " ".join(str(error).split())
    raise InputError(f"{place}parquet that cannot be read: {why}") from None


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
  """Raises unless the shards are all those of one split."""
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
