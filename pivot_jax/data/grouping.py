"""Preference pairs that share image and question, as one row with all answers.

Such a group is one example: its image and prompt are computed once for all its
pairs. It takes one place in an update, whose composition it changes, so it is
asked for.
"""

import zlib

import numpy as np

from pivot_jax import texts
from pivot_jax.data import rows
from pivot_jax.data.sources import records
from pivot_jax.errors import InputError


class Grouped(rows.View):
  """A preference source by groups: a view of their first pairs, joined.

  `chosen` and `rejected` are lists, and `pair_ids` what each pair is called. A
  group of more than `most` pairs is cut into several.
  """

  def __init__(self, source: rows.Source, most: int = 4):
    """Read every row once, as text.

    Raises:
      InputError: rows that are no preference pairs, or a `most` below 1.
    """
    if most < 1:
      raise InputError(f"group: {most} pairs at most; give 1 or more")
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
    super().__init__(source, self._rows[self._starts[:-1]])

  def __getitem__(self, index: int) -> rows.Row:
    """Return a group with the image of its first pair."""
    return self._joined(index, super().__getitem__(index))

  def text(self, index: int) -> rows.Row:
    """Return a group without decoding its image."""
    return self._joined(index, super().text(index))

  def check_row(self, index: int) -> None:
    """Raise for a pair with a wrong field, or an image not in place."""
    for member in self._members(index):
      self.source.check_row(member)

  def stamp(self) -> str:
    """Return the source's stamp with a CRC32 of the groups."""
    inner = self.source.stamp()
    groups = zlib.crc32(self._rows.tobytes() + self._starts.tobytes())
    return inner and f"{inner} {groups:08x}"

  def _members(self, index: int) -> list[int]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    return self._rows[self._starts[index] : self._starts[index + 1]].tolist()

  def _joined(self, index: int, first: rows.Row) -> rows.Row:
    pairs = [first, *map(self.source.text, self._members(index)[1:])]
    return first | {
      "chosen": [pair["chosen"] for pair in pairs],
      "rejected": [pair["rejected"] for pair in pairs],
      "pair_ids": [pair["id"] for pair in pairs],
    }


def _key(source: rows.Source, index: int) -> tuple[int | None, rows.Row]:
  """Return a hash of image and question, None for a pair that stays alone."""
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


def _shared(one: rows.Row, other: rows.Row) -> bool:
  # Images are paths that are opened, and so are compared as they are.
  asked = [texts.canonical(row["question"]) for row in (one, other)]
  return one["image"] == other["image"] and asked[0] == asked[1]
