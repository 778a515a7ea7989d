"""Sources -> an endless, seeded, random-access order of examples.

What lies at a position depends on the seed and the position alone: not on who
reads, how many do, or where reading began. Rows that cannot be trained on are
left out before the order is made, counted and named; an image that turns out
unreadable takes its place without any weight, up to a number that is allowed.
"""

import dataclasses
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from pivot_jax.data import examples, fitting, lengths, packing, records
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

# Examples that are read ahead by each thread.
_AHEAD = 4


class Stream:
  """Examples by position.

  Each epoch of each source has its own permutation; several sources are mixed
  by weight, deterministically.
  """

  def __init__(
    self,
    parts: Sequence[tuple[Any, float]],
    coder: examples.Coder,
    *,
    seed: int,
    reference: examples.Reference | None = None,
    max_bad: float = 0.0,
    framed: Sequence[bool] = (),
  ):
    """Makes a stream of (source, weight) parts.

    Args:
      max_bad: the share of rows that may be unusable, or have an image that
        cannot be read, as 0.001; 0: the first one is an error.
      framed: of each source, whether it gives images as the coder would.

    Raises:
      InputError: more bad rows than allowed, or none that is left.
    """
    self._coder, self._reference = coder, reference
    self._coders = [
      dataclasses.replace(coder, framed=one)
      for one in framed or [False] * len(parts)
    ]
    self._sources = [source for source, _ in parts]
    self.max_bad = max_bad
    self._allowed = int(max_bad * sum(map(len, self._sources)))
    self._tables: list[lengths.Table | None] = [None] * len(parts)
    self._kept: list[np.ndarray | None] = [None] * len(parts)
    self._sizes: dict[tuple[int, int], fitting.Size] = {}
    self._unread: dict[tuple[int, int], str] = {}
    self._lock = threading.Lock()
    if max_bad or coder.long == "drop":
      self._leave_out()
    positions = [
      grain.MapDataset.source(_Positions(k, self.rows(k)))
      .shuffle(seed=seed + k)
      .repeat()
      for k in range(len(parts))
    ]
    self._order = (
      positions[0]
      if len(parts) == 1
      else grain.MapDataset.mix(positions, weights=[w for _, w in parts])
    )

  def rows(self, part: int) -> int:
    """Returns how many rows of a source are trained on."""
    kept = self._kept[part]
    return len(self._sources[part]) if kept is None else len(kept)

  @property
  def counts(self) -> list[int]:
    """How many rows of each source are trained on."""
    return [self.rows(part) for part in range(len(self._sources))]

  def place(self, position: int) -> tuple[int, int]:
    """Returns (source number, row index) at a position of the stream."""
    part, index = self._order[position]
    kept = self._kept[part]
    return part, index if kept is None else int(kept[index])

  def at(self, position: int) -> tuple[Any, int]:
    """Returns (source, row index) at a position of the stream."""
    part, index = self.place(position)
    return self._sources[part], index

  def size(self, position: int) -> fitting.Size:
    """Returns what the example at a position takes in a row."""
    place = self.place(position)
    if place not in self._sizes:
      table = self._tables[place[0]]
      if table is not None:
        return table.size(place[1])
      found = self.example(position, pixels=False)
      self._sizes[place] = packing.size(found, self._coder.patches)
    return self._sizes[place]

  def example(self, position: int, *, pixels: bool = True) -> packing.Example:
    """Returns the example at a position; without pixels, stand-ins.

    Raises:
      InputError: a row that cannot be used, by its file and place.
    """
    return self.read(self.place(position), pixels=pixels)

  def every(self) -> list[tuple[int, int]]:
    """Returns all (source number, row index) that are trained on, in order."""
    return [
      (part, int(index))
      for part, kept in enumerate(self._kept)
      for index in (range(self.rows(part)) if kept is None else kept)
    ]

  def read(
    self, place: tuple[int, int], *, pixels: bool = True
  ) -> packing.Example:
    """Returns the example of a (source number, row index); see `example`."""
    part, index = place
    source = self._sources[part]
    if not pixels:
      return self._encode(part, index, source.text(index))
    try:
      row = source[index]
      with records.located(source.name(index)):
        shown = self._coders[part].pixels(row["image"])
    except InputError as error:
      if not self.max_bad:
        raise
      self._count(place, str(error))
      return self._void(part, index)
    found = self._encode(part, index, row)
    return dataclasses.replace(found, images=shown)

  def examples(
    self, positions: Sequence[int], *, threads: int = 0
  ) -> Iterator[packing.Example]:
    """Yields the examples at positions, in their order.

    `threads` read at once, a few examples ahead; with 0 nothing is ahead.
    """
    found = grain.MapDataset.source(_Reader(self, positions))
    options = grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=_AHEAD * threads
    )
    yield from found.to_iter_dataset(options)

  def _encode(self, part: int, index: int, row: Any) -> packing.Example:
    name = self._sources[part].name(index)
    with records.located(name):
      found = self._coder.example(row, pixels=False)
    if self._reference is None:
      return found
    return examples.with_reference(found, self._reference, name)

  def _void(self, part: int, index: int) -> packing.Example:
    """Returns a row whose image cannot be read: black, and without weight."""
    found = self._encode(part, index, self._sources[part].text(index))
    side = self._coder.image_size
    black = np.zeros((side, side, 3), np.uint8)
    return dataclasses.replace(
      found, images=(black,) * len(found.images), void=True
    )

  def _count(self, place: tuple[int, int], why: str) -> None:
    """Notes an unreadable row, and stops where there are too many."""
    with self._lock:
      if place in self._unread:
        return
      self._unread[place] = why
      found = [*self._unread.values()]
    LOG.warning("has no weight: %s", why)
    if len(found) > self._allowed:
      raise InputError(
        f"{len(found)} rows cannot be read, of {self._rows()} a share of "
        f"{self.max_bad:g} is allowed: {_first(found)}; `python -m "
        "pivot_jax.data check` finds them all"
      )

  def _rows(self) -> int:
    return sum(map(len, self._sources))

  def _leave_out(self) -> None:
    """Measures all rows, and leaves out those that cannot be trained on."""
    bad: list[str] = []
    for part, source in enumerate(self._sources):
      kept = len(source) >= lengths.KEPT
      key = source.stamp() if kept else ""
      table = lengths.measure(source, self._coder, key=key)
      self._tables[part], self._kept[part] = table, table.kept()
      bad += table.bad.values()
      if table.long and self._coder.long == "drop":
        LOG.warning(
          "%d of %d rows are over max_length=%d and left out: %s",
          len(table.long),
          len(source),
          self._coder.max_length,
          _first(list(table.long.values())),
        )
      elif table.long:
        raise InputError(next(iter(table.long.values())))
      if not self.rows(part):
        raise InputError(f"{source.name(0)}: no row is left to train on")
    for why in bad:
      LOG.warning("left out: %s", why)
    if len(bad) > self._allowed:
      raise InputError(
        f"{len(bad)} of {self._rows()} rows are bad, allowed is a share of "
        f"{self.max_bad:g}: {_first(bad)}"
      )


def _first(found: Sequence[str]) -> str:
  more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
  return "; ".join(found[:5]) + more


@dataclasses.dataclass(frozen=True)
class _Positions:
  """The (source number, index) pairs of one source, for grain to shuffle."""

  part: int
  size: int

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> tuple[int, int]:
    return self.part, int(index)


@dataclasses.dataclass(frozen=True)
class _Reader:
  """The examples at positions, for grain to read."""

  stream: Stream
  positions: Sequence[int]

  def __len__(self) -> int:
    return len(self.positions)

  def __getitem__(self, index: int) -> packing.Example:
    return self.stream.example(self.positions[index])
