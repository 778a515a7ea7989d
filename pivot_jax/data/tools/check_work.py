"""Shares out rows among processes, and gives what they find in order."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from pivot_jax.data.sources import parquet, parquet_files
from pivot_jax.data.tools import check_rows
from pivot_jax.errors import InputError

_CHUNK = 200
# Of a parquet file one process takes whole row groups, since reading a row
# decodes its group; a longer group is one of short rows.
_LONGEST = 10_000


class Task(NamedTuple):
  """Rows of one of the targets."""

  number: int
  rows: range


def tasks(targets: Sequence[check_rows.Target | None]) -> list[Task]:
  """Return the rows of all targets in order, None having none."""
  return [
    Task(number, rows)
    for number, target in enumerate(targets)
    if target
    for rows in _chunks(target.source)
  ]


def parts(
  targets: Sequence[check_rows.Target | None],
  settings: check_rows.Settings,
  shared: Sequence[Task],
  workers: int,
) -> Iterator[check_rows.Part]:
  """Yield what other processes find of the rows of each task, in order."""
  pool = futures.ProcessPoolExecutor(
    min(workers, len(shared)),
    # Not forked: this process has threads.
    multiprocessing.get_context("spawn"),
    _start,
    (targets, settings),
  )
  try:
    yield from pool.map(_part, shared)
  except futures.process.BrokenProcessPool:
    raise InputError(
      "a process that looked at rows ended at once; if there was too little"
      " memory, give fewer --workers"
    ) from None
  finally:
    pool.shutdown(cancel_futures=True)


def _chunks(source: Any) -> list[range]:
  """Return all rows of a source in pieces."""
  if not isinstance(source, parquet.Parquet):
    return _cut(range(len(source)), _CHUNK)
  pieces, begin = [], 0
  ends = _group_ends(source)
  for end in ends:
    # Of small groups several make a piece.
    if end - begin >= _CHUNK or end == ends[-1]:
      pieces += _cut(range(begin, end), _LONGEST)
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


_given: list[Any] = []


def _start(targets, settings) -> None:
  _given[:] = check_rows.Checker(settings), targets


def _part(task: Task) -> check_rows.Part:
  checker, targets = _given
  return checker.part(targets[task.number], task.rows)
