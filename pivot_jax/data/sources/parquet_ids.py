"""Which rows of parquet files have an id that an earlier row has.

Of millions of ids none is held: of each there is a hash while they are counted,
and one number a row afterwards. That two different ids have one hash is next to
impossible, and only numbers a row that needed no number.
"""

import array
import re
from collections.abc import Iterator

import numpy as np
import tqdm
from jaxtyping import Int32, Int64

from pivot_jax.data.sources import parquet_files
from pivot_jax.errors import InputError

# Reading so many ids takes a moment; then there is a bar.
LARGE = 200_000
_SLICE = 2**16  # Ids that are Python objects at once.
_NUMBERED = re.compile(rb"(.*)#([1-9]\d{0,8})", re.DOTALL)


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


def uses(files: parquet_files.Files, column: str) -> Int32[np.ndarray, "N"]:
  """Return which use of its id each row is: 0 for the first, then 2, 3, ...

  Numbers that would make the id of another row are left out. A row without an
  id has that of its place. Rows that cannot be read are not counted: reading
  one of them says what is wrong.
  """
  hashes = np.zeros(len(files), np.int64)
  numbered = _Numbered()
  bar = tqdm.tqdm(
    total=len(files),
    desc=f"reading {column}",
    unit="row",
    disable=None if len(files) >= LARGE else True,
  )
  with bar:
    for begin, ids in _read(files, column):
      end = begin + len(ids)
      hashes[begin:end] = np.fromiter(map(hash, ids), np.int64, len(ids))
      numbered.add(ids)
      bar.update(len(ids))
  return _count(hashes, numbered)


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


def _read(files, column: str) -> Iterator[tuple[int, np.ndarray]]:
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
