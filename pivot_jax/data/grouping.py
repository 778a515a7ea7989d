"""Preference pairs that share image and question, as one row with all answers.

Such a group is one example: its image and prompt are computed once for all its
pairs. It takes one place in an update, whose composition it changes, so it is
asked for.
"""

import zlib
from typing import Any

import numpy as np

from pivot_jax import texts
from pivot_jax.data.sources import records
from pivot_jax.errors import InputError


class Grouped:
  """A preference source by groups, in the order of their first pairs.

  `chosen` and `rejected` are lists, and `pair_ids` what each pair is called. A
  group of more than `most` pairs is cut into several.
  """

  kind = "preference"

  def __init__(self, source: Any, most: int = 4):
    """Read every row once, as text.

    Raises:
      InputError: rows that are no preference pairs, or a `most` below 1.
    """
    if most < 1:
      raise InputError(f"group: {most} pairs at most; give 1 or more")
    self._source = source
    found: dict[int, list[list[int]]] = {}
    groups: list[list[int]] = []
    if source.kind != "preference":
      raise InputError(
        f"{source.name(0)}: {source.kind} rows; group=True is for preference "
        "pairs"
      )
    for index in range(len(source)):
      key, row = _key(source, index)
      same = [] if key is None else found.setdefault(key, [])
      for group in same:
        if len(group) < most and _shared(source.text(group[0]), row):
          group.append(index)
          break
      else:
        group = [index]
        same.append(group)
        groups.append(group)
    self._starts = np.cumsum([0, *map(len, groups)])
    self._rows = np.concatenate(groups)

  def __len__(self) -> int:
    return len(self._starts) - 1

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Return a group with the image of its first pair."""
    return self._joined(index, self._source[self._members(index)[0]])

  def text(self, index: int) -> dict[str, Any]:
    """Return a group without decoding its image."""
    return self._joined(index, self._source.text(self._members(index)[0]))

  def name(self, index: int) -> str:
    """Return where the first pair of a group stands."""
    return self._source.name(self._members(index)[0])

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the bytes of a group's image files."""
    return self._source.encoded(self._members(index)[0])

  def check_row(self, index: int) -> None:
    """Raise for a pair with a wrong field, or an image not in place."""
    for member in self._members(index):
      self._source.check_row(member)

  def stamp(self) -> str:
    """Return what tells the source and how it is grouped."""
    inner = self._source.stamp()
    groups = zlib.crc32(self._rows.tobytes() + self._starts.tobytes())
    return inner and f"{inner} {groups:08x}"

  def _members(self, index: int) -> list[int]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    return self._rows[self._starts[index] : self._starts[index + 1]].tolist()

  def _joined(self, index: int, first: dict[str, Any]) -> dict[str, Any]:
    rows = [first, *map(self._source.text, self._members(index)[1:])]
    return first | {
      "chosen": [row["chosen"] for row in rows],
      "rejected": [row["rejected"] for row in rows],
      "pair_ids": [row["id"] for row in rows],
    }


def _key(source: Any, index: int) -> tuple[int | None, dict[str, Any]]:
  """Return a hash of what a pair shares, None for one that is left alone."""
  try:
    row = source.text(index)
  except InputError:
    # What is wrong with it is said where it is read.
    return None, {}
  if True in records.listed(row["image"]):
    raise InputError(
      f"{source.name(index)}: images without names cannot be told to be one; "
      "group=True is for .json, .jsonl and MMPR"
    )
  if texts.canonical(row["chosen"]) == texts.canonical(row["rejected"]):
    # It cannot be learnt, and takes none of the others with it.
    return None, row
  return hash((str(row["image"]), texts.canonical(row["question"]))), row


def _shared(one: dict[str, Any], other: dict[str, Any]) -> bool:
  # Images are paths that are opened, and so are compared as they are.
  asked = [texts.canonical(row["question"]) for row in (one, other)]
  return one["image"] == other["image"] and asked[0] == asked[1]
