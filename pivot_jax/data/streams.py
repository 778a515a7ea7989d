"""Sources -> an endless, seeded, random-access order of examples.

The example at a position depends on the seed and the position alone: not on who
reads, how many do, or where reading began. Rows that cannot be trained on are
skipped before the order is made, counted and named; an image that turns out
unreadable takes its place without any weight, up to a number that is allowed.
"""

import dataclasses
import logging
import threading
import zlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from pivot_jax.data import layouts, lengths, opener, packing
from pivot_jax.data.coders import Coder, Reference, crc, with_reference
from pivot_jax.data.rows import Row, Source
from pivot_jax.data.sources import records
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

# The remedy for a row that cannot be read.
REMEDY = (
  "`python -m pivot_jax.data check` finds all such rows, and `bad` (files.bad) "
  "skips them"
)
# Examples that are read ahead by each thread.
_AHEAD = 4


def open_stream(
  specs: Sequence[tuple[Mapping[str, Any], float]],
  coder: Coder,
  *,
  seed: int,
  reference: Reference | None = None,
) -> "Stream":
  """Return the stream of (entry, weight) pairs; see `Stream`.

  The rows that a mixture takes of each file go to the log.

  Images of files are brought to the coder's size where they are decoded, which
  is where several are padded and a decoder may decode smaller.
  """
  how = dict(image_size=coder.image_size, resample=coder.resample)
  framed = [spec["kind"] in opener.TEXTS for spec, _ in specs]
  opened = [
    opener.open_source(dict(spec) | how if inside else spec, logged=True)
    for (spec, _), inside in zip(specs, framed, strict=True)
  ]
  return Stream(
    [(one, weight) for one, (_, weight) in zip(opened, specs, strict=True)],
    coder,
    seed=seed,
    reference=reference,
    max_bad=[spec.get("max_bad", 0.0) for spec, _ in specs],
    framed=framed,
  )


class Stream:
  """Examples by position.

  Each epoch of each source has its own permutation; several sources are mixed
  by weight, deterministically.
  """

  def __init__(
    self,
    parts: Sequence[tuple[Source, float]],
    coder: Coder,
    *,
    seed: int,
    reference: Reference | None = None,
    max_bad: Sequence[float] = (),
    framed: Sequence[bool] = (),
  ):
    """Make a stream of (source, weight) parts.

    Args:
      max_bad: of each source, the share of rows that may be unusable or have an
        image that cannot be read, as 0.001; 0: the first one is an error.
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
    self.max_bad = list(max_bad) or [0.0] * len(parts)
    self._tables: list[lengths.Table | None] = [None] * len(parts)
    self._kept: list[np.ndarray | None] = [None] * len(parts)
    self._sizes: dict[tuple[int, int], layouts.Size] = {}
    self._bad: list[dict[int, str]] = [{} for _ in parts]
    self._lock = threading.Lock()
    for part, share in enumerate(self.max_bad):
      if share or coder.long == "drop":
        self._skip_unusable(part)
    # Here and not above: grain loads jax, 150 MB that a process which only
    # measures rows has no use for.
    import grain

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
    """Return how many rows of a source are trained on."""
    kept = self._kept[part]
    return len(self._sources[part]) if kept is None else len(kept)

  @property
  def counts(self) -> list[int]:
    """The number of rows of each source that are trained on."""
    return [self.rows(part) for part in range(len(self._sources))]

  def place(self, position: int) -> tuple[int, int]:
    """Return (source number, row index) at a position of the stream."""
    found = self._order[position]
    assert found is not None  # Only a filter would take some away.
    part, index = found
    kept = self._kept[part]
    return part, index if kept is None else int(kept[index])

  def size(self, position: int) -> layouts.Size:
    """Return what the example at a position takes in a row."""
    return self.size_of(self.place(position))

  def size_of(self, place: tuple[int, int]) -> layouts.Size:
    """Return what a (source number, row index) takes in a row."""
    table = self._tables[place[0]]
    if table is not None:
      why = table.bad.get(place[1]) or table.long.get(place[1])
      if why:
        raise InputError(why)
      return table.size(place[1])
    if place not in self._sizes:
      found = self.read(place, pixels=False)
      self._sizes[place] = packing.size(found, self._coder.patches)
    return self._sizes[place]

  def digest(self) -> int:
    """Return a CRC32 of the tokens of a few rows of each source."""
    code = 0
    for source in self._sources:
      for index in (0, len(source) // 2, len(source) - 1):
        try:
          found = self._coder.example(source.text(index), pixels=False)
          text = crc(found.prompt, *found.answers)
        except InputError as error:
          text = str(error)
        code = zlib.crc32(text.encode(), code)
    return code

  def measure(self, count: int) -> None:
    """Measure whole sources at once where `count` examples read most of them."""
    if count < sum(self.counts) // 2:
      return
    for part, source in enumerate(self._sources):
      if self._tables[part] is None and len(source) >= lengths.KEPT:
        self._measure(part)

  def example(self, position: int, *, pixels: bool = True) -> packing.Example:
    """Return the example at a position; without pixels, stand-ins.

    Raises:
      InputError: a row that cannot be used, by its file and place.
    """
    return self.read(self.place(position), pixels=pixels)

  def every(self) -> list[tuple[int, int]]:
    """Return all (source number, row index) that are trained on, in order."""
    return [
      (part, int(index))
      for part, kept in enumerate(self._kept)
      for index in (range(self.rows(part)) if kept is None else kept)
    ]

  def read(
    self, place: tuple[int, int], *, pixels: bool = True
  ) -> packing.Example:
    """Return the example of a (source number, row index); see `example`."""
    part, index = place
    source = self._sources[part]
    if not pixels:
      return self._encode(part, index, source.text(index))
    try:
      row = source[index]
      with records.located(source.name(index)):
        shown = self._coders[part].pixels(row["image"])
    except InputError as error:
      if not self.max_bad[part]:
        raise InputError(f"{error}; {REMEDY}") from None
      self._count(part, index, str(error))
      return self._void(part, index)
    found = self._encode(part, index, row)
    return dataclasses.replace(found, images=shown)

  def examples(
    self, positions: Sequence[int], *, threads: int = 0
  ) -> Generator[packing.Example, None, None]:
    """Yield the examples at positions, in their order; see `read_all`."""
    return self.read_all(_Places(self, positions), threads=threads)

  def read_all(
    self, places: Sequence[tuple[int, int]], *, threads: int = 0
  ) -> Generator[packing.Example, None, None]:
    """Yield the examples of (source number, row index) pairs, in their order.

    `threads` read at once, a few examples ahead; with 0 nothing is ahead.
    """
    import grain  # Loads jax, see `__init__`.

    found = grain.MapDataset.source(_Reader(self, places))
    options = grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=_AHEAD * threads
    )
    yield from found.to_iter_dataset(options)

  def _encode(self, part: int, index: int, row: Row) -> packing.Example:
    name = self._sources[part].name(index)
    with records.located(name):
      found = self._coder.example(row, pixels=False)
    if self._reference is None:
      return found
    return with_reference(found, self._reference, name)

  def _void(self, part: int, index: int) -> packing.Example:
    """Return a row whose image cannot be read: black, and without weight."""
    source, side = self._sources[part], self._coder.image_size
    with records.located(source.name(index)):
      found = self._coder.example(source.text(index), pixels=False)
    black = np.zeros((side, side, 3), np.uint8)
    return dataclasses.replace(
      found, images=(black,) * len(found.images), void=True
    )

  def _count(self, part: int, index: int, why: str) -> None:
    """Note an unreadable row; raise where there are too many."""
    with self._lock:
      bad = self._bad[part]
      if index in bad:
        return
      bad[index] = why
    LOG.warning("has no weight: %s", why)
    self._check_bad(part)

  def bad_rows(self) -> list[list[int]]:
    """Return of each source the rows found to be bad so far."""
    with self._lock:
      return [sorted(bad) for bad in self._bad]

  def add_bad(self, rows: Sequence[Sequence[int]]) -> None:
    """Add bad rows that other processes found, by source.

    Raises InputError where there are more than allowed.
    """
    for part, found in enumerate(rows):
      with self._lock:
        for index in found:
          name = self._sources[part].name(index)
          self._bad[part].setdefault(index, f"{name}: as another process found")
      if found:
        self._check_bad(part)

  def _check_bad(self, part: int) -> None:
    bad, size = list(self._bad[part].values()), len(self._sources[part])
    if len(bad) > self.max_bad[part] * size:
      raise InputError(
        f"{len(bad)} of {size} rows are bad, allowed is a share of "
        f"{self.max_bad[part]:g}: {_first(bad)}; `python -m pivot_jax.data "
        "check` finds them all"
      )

  def _measure(self, part: int) -> lengths.Table:
    source = self._sources[part]
    key = source.stamp() if len(source) >= lengths.KEPT else ""
    table = lengths.measure(source, self._coder, key=key)
    self._tables[part] = table
    return table

  def _skip_unusable(self, part: int) -> None:
    """Measure all rows, and skip those that cannot be trained on."""
    source, table = self._sources[part], self._measure(part)
    self._kept[part] = table.kept()
    if table.long and self._coder.long == "drop":
      LOG.warning(
        "%d of %d rows are over max_length=%d and skipped: %s",
        len(table.long),
        len(source),
        self._coder.max_length,
        _first(list(table.long.values())),
      )
      bad = table.bad
    else:
      bad = table.bad | table.long
    for why in bad.values():
      LOG.warning("skipped: %s", why)
    self._bad[part] = dict(bad)
    if bad:
      self._check_bad(part)
    if not self.rows(part):
      raise InputError(f"{source.name(0)}: no row is left to train on")


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
class _Places(Sequence):
  """The places of positions of a stream."""

  stream: Stream
  positions: Sequence[int]

  def __len__(self) -> int:
    return len(self.positions)

  def __getitem__(self, index: int) -> tuple[int, int]:
    return self.stream.place(self.positions[index])


@dataclasses.dataclass(frozen=True)
class _Reader:
  """The examples of places, for grain to read."""

  stream: Stream
  places: Sequence[tuple[int, int]]

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, index: int) -> packing.Example:
    return self.stream.read(self.places[index])
