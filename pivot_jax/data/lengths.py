"""The size of each row of a source, in tokens and images, read once.

A run of millions of rows is laid out from these tables alone. Rows are read as
text, by several processes where there are many; a table of a source that is
known by a `key` is kept, so that the next run on it reads nothing.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm

from pivot_jax import files
from pivot_jax.data import coders, layouts, packing, pool, rows
from pivot_jax.data.sources import json_index
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

_FIELDS = layouts.Size._fields
# Fewer rows are read by this process: starting others takes seconds.
_FEW = 20_000
_CHUNK = 2_000
# Tables of sources of fewer rows are not worth keeping.
KEPT = 5_000
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Table:
  """Sizes of rows.

  sizes: int32 [N, 6], the fields of `layouts.Size`; zeros where there is none.
  long: rows over the limit; bad: rows that cannot be used. Both say why, by row.
  """

  sizes: np.ndarray
  long: dict[int, str]
  bad: dict[int, str]

  def kept(self) -> np.ndarray:
    """Return the indices of the rows that can be trained on."""
    fine = np.ones(len(self.sizes), bool)
    fine[[*self.long, *self.bad]] = False
    return np.flatnonzero(fine)

  def size(self, index: int) -> layouts.Size:
    return layouts.Size(*map(int, self.sizes[index]))


def measure(
  source: rows.Source, coder: coders.Coder, *, key: str = "", processes: int = 0
) -> Table:
  """Return the sizes of all rows of a source.

  Args:
    key: the source's stamp; "" keeps no table.
    processes: that read; 0 takes a process for each core.
  """
  place = _cache(key, coder) if key else None
  size = len(source)
  if place is not None and place.is_file():
    try:
      return _read(place, size)
    # Whatever the file holds, the archive and the checks raise one of these.
    except (
      OSError, EOFError, ValueError, TypeError, LookupError,
      NotImplementedError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
      LOG.warning(
        "%s: the kept lengths are not sound and made again (%s)", place, error
      )
  workers = processes or os.cpu_count() or 1
  chunks = [range(i, min(i + _CHUNK, size)) for i in range(0, size, _CHUNK)]
  sizes = np.zeros((size, len(_FIELDS)), np.int32)
  long: dict[int, str] = {}
  bad: dict[int, str] = {}
  bar = tqdm.tqdm(
    total=size, desc="measuring rows", disable=None if size > _FEW else True
  )
  with bar:
    for chunk, found in _measured(source, coder, chunks, workers):
      sizes[chunk.start : chunk.stop] = found.sizes
      long.update({chunk.start + i: why for i, why in found.long.items()})
      bad.update({chunk.start + i: why for i, why in found.bad.items()})
      bar.update(len(chunk))
  table = Table(sizes, long, bad)
  if place is not None and files.writes:
    _write(place, table)
  return table


def _measured(
  source: rows.Source,
  coder: coders.Coder,
  chunks: Sequence[range],
  workers: int,
) -> Iterator[tuple[range, Table]]:
  if workers == 1 or sum(map(len, chunks)) <= _FEW:
    for chunk in chunks:
      yield chunk, part(source, coder, chunk)
    return
  found = pool.results(
    _part,
    (source, coder),
    chunks,
    processes=workers,
    broken=f"{source.name(0)}: a process that measured rows was killed, for "
    "lack of memory perhaps: run again with more, or on fewer cores",
  )
  yield from zip(chunks, found)


def _part(held: tuple[rows.Source, coders.Coder], chunk: range) -> Table:
  return part(*held, chunk)


def part(
  source: rows.Source, coder: coders.Coder, indices: Sequence[int]
) -> Table:
  """Return the sizes of some rows, numbered from 0."""
  sizes = np.zeros((len(indices), len(_FIELDS)), np.int32)
  long, bad = {}, {}
  for place, index in enumerate(indices):
    try:
      example = coder.example(source.text(index), pixels=False)
      sizes[place] = packing.size(example, coder.patches)
    except coders.TooLongError as error:
      long[place] = f"{source.name(index)}: {error}"
    except InputError as error:
      bad[place] = _located(source.name(index), error)
  return Table(sizes, long, bad)


def _located(name: str, error: InputError) -> str:
  text = str(error)
  return text if text.startswith(name) else f"{name}: {text}"


def _cache(key: str, coder: coders.Coder) -> pathlib.Path:
  fields = {
    field.name: str(coder.tokenizer.fingerprint)
    if field.name == "tokenizer"
    else coder.__dict__[field.name]
    for field in dataclasses.fields(coder)
    if field.name not in ("image_size", "resample", "framed")
  }
  text = json.dumps([key, fields, _VERSION], sort_keys=True)
  name = hashlib.sha256(text.encode()).hexdigest()[:24]
  return json_index.cache_folder() / "lengths" / f"{name}.npz"


def _write(place: pathlib.Path, table: Table) -> None:
  said = json.dumps([list(table.long.items()), list(table.bad.items())])
  with json_index.keeping(place) as file:
    np.savez(file, sizes=table.sizes, said=np.frombuffer(said.encode(), "u1"))


def _read(place: pathlib.Path, size: int) -> Table:
  """Return a kept table; raise unless it is whole and of so many rows."""
  with zipfile.ZipFile(place) as archive:
    # It has a CRC of each part, and numpy believes a header before its CRC.
    damaged = archive.testzip()
  if damaged:
    raise ValueError(f"{damaged} has another CRC")
  with np.load(place, allow_pickle=False) as found:
    sizes = found["sizes"]
    long, bad = map(dict, json.loads(found["said"].tobytes()))
  if sizes.dtype != np.int32 or sizes.shape != (size, len(_FIELDS)):
    raise ValueError(f"a table of {sizes.dtype}, {sizes.shape}")
  rows = range(size)
  said = [*long.items(), *bad.items()]
  kinds = {(type(i), type(why)) for i, why in said}
  if not kinds <= {(int, str)} or not all(i in rows for i, _ in said):
    raise ValueError("reasons of no rows")
  if (sizes < 0).any():
    raise ValueError("sizes under 0")
  return Table(sizes, long, bad)
