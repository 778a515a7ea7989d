"""Looks for label maps whose numbers have a gap, as 255 beside few classes.

Such a number usually marks pixels of no class (borders in VOC), and counts as
one unless it is ignored. Only numbers are looked at, not what they stand for.
"""

from collections.abc import Iterable

import numpy as np

from pivot_jax.data.sources import json_records

# Maps that are read before a run; the probe itself looks at all.
LOOKED_AT = 32
# What marks pixels of no class in maps of 8 and of 16 bits.
_MARKS = (255, 65535)


def gap(labels: Iterable[int], ignore: int | str) -> str:
  """Return what is odd about the labels of some maps, "" if nothing is.

  Odd is a label 255 or 65535 without the one before it, and a gap of more
  than ten numbers that is wider than the labels below it are many. `ignore` is
  a label, or -1 or "none".
  """
  found = sorted({*map(int, labels)} - {ignore})
  for count, (low, high) in enumerate(zip(found, found[1:]), 1):
    missing = high - low - 1
    if missing > max(10, count) or (missing and high in _MARKS):
      above = found[count:]
      said = f"labels {_span(found[:count])} and {_span(above)}"
      if len(above) > 1:
        return f"{said}: number the classes from 0 without a gap"
      return (
        f"{said}: is {high} to be ignored? --config.files.segment_ignore={high}"
        "; if it is a class, number the classes from 0 without a gap"
      )
  return ""


def look(source: json_records.Source, ignore: int | str) -> str:
  """Return `gap` of at most `LOOKED_AT` maps of a source, and how many."""
  places = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int))
  found: set[int] = set()
  for index in places.tolist():
    found |= {*np.unique(source[index]["labels"]).tolist()}
  odd = gap(found, ignore)
  return odd and f"in {len(places)} of {len(source)} label maps: {odd}"


def _span(labels: list[int]) -> str:
  """Return the lowest and the highest label, or the one that there is."""
  if len(labels) == 1:
    return str(labels[0])
  return f"{labels[0]} to {labels[-1]}"
