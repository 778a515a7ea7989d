"""Bytes that columns of a parquet row group decode to, told before reading.

A file of 47 kB may hold 60 GB: a dictionary has a text once, however many
values it has, and pages are compressed. The footer says how large pages are
and how many values a column has, the header of the first page how large the
dictionary is. Where that may be too much, the values are counted without being
decoded. A footer that lies about pages behind the first is not found out.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pivot_jax.errors import InputError

# Bytes that the columns of a row group that are read at once may take, decoded;
# more only if the disk holds a fair share of them, as it does of pictures.
LARGEST = 2**30
FAIR = 32
# Rows of a file, for each byte of it and at least; those with ids take more.
_ROWS_A_BYTE, _ROWS = 8, 2**20
_DICTIONARY_PAGE = 2
_HEADER = 64  # Bytes that begin a page's header.


class Footer(Protocol):
  """The metadata of a file of pyarrow's, which may not be installed."""

  num_rows: int
  num_row_groups: int

  def row_group(self, i: int) -> Any: ...


class ParquetFile(Protocol):
  """An open file of pyarrow's; its metadata is a `Footer`."""

  metadata: Any

  def read_row_group(self, i: int) -> Any: ...


def check_rows(path: pathlib.Path, footer: Footer) -> None:
  """Raise for more rows than a file of that size can have."""
  groups = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
  most = _ROWS_A_BYTE * path.stat().st_size + _ROWS
  if min(groups, default=0) < 0 or sum(groups) != footer.num_rows:
    raise InputError(
      f"{path}: parquet of {footer.num_rows} rows, but {sum(groups)} in its row"
      " groups"
    )
  if sum(groups) > most:
    raise InputError(
      f"{path}: says that it has {sum(groups)} rows; a file of its size has"
      f" {most} at most"
    )


def check_group(
  path: pathlib.Path, opened: ParquetFile, group: int, columns: Sequence[str]
) -> None:
  """Raise unless columns of a row group, by their paths, can be decoded.

  Raises:
    InputError: they would take more than `LARGEST` bytes, and `FAIR` times what
      the disk has of them; it names no file.
  """
  schema, footer = opened.metadata.schema, opened.metadata.row_group(group)
  begins = tuple(f"{name}." for name in columns)
  bounds: dict[str, int] = {}
  stored = 0
  for place in range(footer.num_columns):
    chunk, leaf = footer.column(place), schema.column(place)
    if leaf.path in columns or leaf.path.startswith(begins):
      bounds[leaf.path] = _bound(path, chunk, leaf)
      stored += chunk.total_compressed_size
  if sum(bounds.values()) <= LARGEST:
    return
  state = path.stat()
  # A hole in a file is not on the disk.
  stored = min(stored, state.st_size, 512 * state.st_blocks)
  sizes = _counted(path, opened, group, bounds)
  if sum(sizes.values()) > max(LARGEST, FAIR * stored):
    worst = max(sizes, key=lambda name: sizes[name])
    raise InputError(
      f"{worst}: row group {group} takes {sizes[worst]} bytes decoded, of"
      f" {stored} on the disk; only {LARGEST} are read: write the file with"
      " smaller row groups"
    )


def _bound(path: pathlib.Path, chunk: Any, leaf: Any) -> int:
  """Return the most bytes that a column of a row group may decode to."""
  plain = max(chunk.total_uncompressed_size, 8 * chunk.num_values)
  if chunk.physical_type == "FIXED_LEN_BYTE_ARRAY":
    return max(plain, leaf.length * chunk.num_values)
  if chunk.physical_type != "BYTE_ARRAY":
    return plain
  repeated = _dictionary(path, chunk)
  if "DELTA_BYTE_ARRAY" in chunk.encodings:
    # Each value may begin with all of the one before.
    repeated = max(repeated, chunk.total_uncompressed_size)
  return plain + repeated * chunk.num_values


def _counted(
  path: pathlib.Path,
  opened: ParquetFile,
  group: int,
  bounds: Mapping[str, int],
) -> dict[str, int]:
  """Return bounds, those of dictionaries replaced by what values take."""
  from pyarrow import parquet

  footer, sizes = opened.metadata.row_group(group), dict(bounds)
  chunks = (footer.column(i) for i in range(footer.num_columns))
  for chunk in chunks:
    name = chunk.path_in_schema
    plain = max(chunk.total_uncompressed_size, 8 * chunk.num_values)
    dictionary = chunk.physical_type == "BYTE_ARRAY"
    # Of what is decoded on the way to a dictionary, nothing is saved.
    if "DELTA_BYTE_ARRAY" in chunk.encodings or plain > LARGEST:
      dictionary = False
    if name in bounds and dictionary and bounds[name] > plain:
      with parquet.ParquetFile(
        path, metadata=opened.metadata, read_dictionary=[name]
      ) as file:
        table = file.read_row_group(group, columns=[name], use_threads=False)
      sizes[name] = plain + sum(
        _size(part) for column in table.columns for part in column.chunks
      )
  return sizes


def _size(found: Any) -> int:
  """Return the bytes of the texts of an Arrow array of dictionaries."""
  import pyarrow.compute

  # It makes its functions when it is loaded, and has no stubs.
  compute: Any = pyarrow.compute
  types = pyarrow.types
  if types.is_dictionary(found.type):
    lengths = compute.binary_length(found.dictionary).cast("int64")
    return compute.sum(lengths.take(found.indices)).as_py() or 0
  if types.is_struct(found.type):
    return sum(_size(found.field(i)) for i in range(found.type.num_fields))
  lists = (
    types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_map,
  )  # fmt: skip
  listed = any(test(found.type) for test in lists)
  return _size(found.flatten()) if listed else 0


def _dictionary(path: pathlib.Path, chunk: Any) -> int:
  """Return the bytes of a column's dictionary, 0 if there is none."""
  begin = chunk.data_page_offset
  if chunk.has_dictionary_page and chunk.dictionary_page_offset:
    begin = min(begin, chunk.dictionary_page_offset)
  with path.open("rb") as file:
    data = os.pread(file.fileno(), _HEADER, max(0, begin))
  # Thrift's compact protocol; a header begins with its type and its size.
  kind, data = _number(data)
  size, _ = _number(data)
  return size if kind == _DICTIONARY_PAGE else 0


def _number(data: bytes) -> tuple[int, bytes]:
  """Return a field of 32 bits and what follows; -1 if there is none."""
  if data[:1] != b"\x15":
    return -1, b""
  value = 0
  for place, byte in enumerate(data[1:6]):
    value |= (byte & 127) << 7 * place
    if byte < 128:
      return value >> 1 ^ -(value & 1), data[place + 2 :]
  return -1, b""
