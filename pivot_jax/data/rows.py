"""Rows and their sources: the interface that all data share.

A source is a random-access sequence of rows. A row is a plain dict with `id`,
`image` and the fields of its kind; its image is uint8 [H, W, 3], a list of
several, or None for text alone. An unusable row raises an `InputError` that
names file, row and field when it is read; nothing is skipped. A view of a
source is an index into it. This file opens nothing and knows no kind by name.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from pivot_jax.errors import InputError

Row = dict[str, Any]
# Bytes of the image files of a row, and its pixels in images of the largest size
# allowed. All of a row are held at once.
BYTES = 2**30
IMAGES = 4
_Part = TypeVar("_Part")
_NAME = re.compile(r"(.+)([:#])(\d+)", re.DOTALL)


@runtime_checkable
class Source(Protocol):
  """A random-access sequence of rows of one kind.

  kind: "conversation", "preference", "eval", "classify" or "segment".
  """

  @property
  def kind(self) -> str: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Row: ...

  def text(self, index: int) -> Row:
    """Return the row without decoding: paths or True in place of pixels."""
    ...

  def name(self, index: int) -> str:
    """Return the place of a row, for messages."""
    ...

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the bytes of the row's image files, then of its label map."""
    ...

  def check_row(self, index: int) -> None:
    """Raise for a wrong field, or an image that is not in place."""
    ...

  def stamp(self) -> str:
    """Return a text that changes with the rows; "" if none is known."""
    ...


class Made:
  """A source whose rows a function makes, one by one, each time the same.

  What a source of your own needs (CONTRIBUTING.md): no file is behind it.
  """

  def __init__(
    self, kind: str, make: Callable[[int], Row], *, size: int, name: str
  ):
    """Make a source.

    Args:
      kind: as of `Source`.
      make: index -> row, with its pixels.
      size: the number of rows.
      name: what messages call the source.
    """
    self._kind, self._make, self._size, self._name = kind, make, size, name

  @property
  def kind(self) -> str:
    return self._kind

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> Row:
    if not 0 <= index < self._size:
      raise IndexError(index)
    return self._make(index)

  def text(self, index: int) -> Row:
    """Return the row with True in place of each image."""
    row = self[index]
    image = row["image"]
    several = isinstance(image, list)
    held = [True] * len(image) if several else None if image is None else True
    return row | {"image": held}

  def name(self, index: int) -> str:
    """Return the source's name and the row's number, from 1 on."""
    return f"{self._name}:{index + 1}"

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return no bytes: the images are in no files."""
    return ()

  def check_row(self, index: int) -> None:
    """Make the row, which raises for one that cannot be made."""
    self[index]

  def stamp(self) -> str:
    """Return "": other rows are not noticed but by the code that makes them."""
    return ""


class Derived:
  """A source whose rows lie in other sources; subclasses say where."""

  def at(self, index: int) -> tuple[Source, int]:
    """Return the source that holds a row, and its index there."""
    raise NotImplementedError

  def __getitem__(self, index: int) -> Row:
    source, own = self.at(index)
    return source[own]

  def text(self, index: int) -> Row:
    """Return the row without decoding its image."""
    source, own = self.at(index)
    return source.text(own)

  def name(self, index: int) -> str:
    """Return the place of the row in its file."""
    source, own = self.at(index)
    return source.name(own)

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the bytes of the row's image files."""
    source, own = self.at(index)
    return source.encoded(own)

  def check_row(self, index: int) -> None:
    """Raise for a wrong field, or an image that is not in place."""
    source, own = self.at(index)
    source.check_row(own)


class View(Derived):
  """Rows of a source by their indices; names stay the source's.

  Attributes:
    source: the source that holds the rows.
    indices: the index there of each row of the view.
  """

  def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
    self.source, self.indices = source, indices

  def __len__(self) -> int:
    return len(self.indices)

  @property
  def kind(self) -> str:
    return self.source.kind

  def at(self, index: int) -> tuple[Source, int]:
    """Return the source, and the row's index there."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    return self.source, int(self.indices[index])

  def stamp(self) -> str:
    """Return the source's stamp with a CRC32 of the indices."""
    inner = self.source.stamp()
    if not inner:
      return ""
    return (
      f"{inner} {zlib.crc32(np.asarray(self.indices, np.int64).tobytes()):08x}"
    )


class RowName(NamedTuple):
  """A file and the index of a row in it, from 0."""

  file: str
  row: int


def parse_name(name: str) -> RowName:
  """Read the name of a row: FILE:LINE, FILE#INDEX or FILE:ROW.

  Raises:
    ValueError: the name of something else, as of a scene.
  """
  found = _NAME.fullmatch(name)
  if not found:
    raise ValueError(f"{name} is not the name of a row")
  file, mark, number = found[1], found[2], int(found[3])
  lines = mark == ":" and file.endswith(".jsonl")
  return RowName(file, number - 1 if lines else number)


def bounded(
  parts: Iterable[_Part], size: Callable[[_Part], int], most: int, unit: str
) -> list[_Part]:
  """Return the parts of a row; raise for more than `most` bytes or pixels."""
  found, total = [], 0
  for part in parts:
    total += size(part)
    if total > most:
      raise InputError(
        f"image: {len(found) + 1} images of the row have more than {most}"
        f" {unit} together; make it several rows, or shrink them",
        kind="too_many_pixels",
      )
    found.append(part)
  return found


def unreadable(
  source: Source, *, max_bad: float = 0.0
) -> list[tuple[int, str]]:
  """Read every row, images included; return the bad ones, each with why.

  Args:
    max_bad: the share of rows that may be bad, as 0.001 for one in a thousand.

  Raises:
    InputError: no rows, or more bad ones than allowed, the first five named.
  """
  if not len(source):
    raise InputError("a data source has no rows")
  bad = []
  for index in range(len(source)):
    try:
      source[index]
    except InputError as error:
      bad.append((index, str(error)))
  if len(bad) > max_bad * len(source):
    first = "; ".join(message for _, message in bad[:5])
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise InputError(
      f"{len(bad)} of {len(source)} rows are bad, allowed is a share of"
      f" {max_bad:g}: {first}{more}"
    )
  return bad
