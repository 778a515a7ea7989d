"""How the stages of a config read their sources: texts, limits, and images.

What `stages/*` do with a section is repeated here in words, as they cannot be
imported by what looks at data.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from pivot_jax.data import chat, coders, images, opener
from pivot_jax.data.tools import check_rows
from pivot_jax.errors import InputError

# The side of an image where the encoder's is not known.
_SIDE = 384


class Stage(NamedTuple):
  """The sources that a stage reads, and how; its images if it sees them."""

  sources: tuple[str, ...]
  reading: check_rows.Reading
  frame: check_rows.Frame | None


def read(config: str, found: ConfigDict, *, side: int | None) -> list[Stage]:
  """Return the stages of a config that read data.

  Args:
    config: what it is called, for messages.
    side: pixels of the side of an image as the encoder reads it, if known.

  Raises:
    InputError: a setting that no row could be read by.
  """
  stages = []
  for name, section in _running(found):
    where = f"{config}: {name}"
    data = _names(section)
    reading = _reading(where, section, found, data)
    how = section.get("resample") or found.get("resample") or "bicubic"
    stages.append(Stage(data, reading, _frame(where, how, side)))
    blind = section.get("blind")
    if blind:
      # The baseline reads the texts, and the model never does.
      alone = stages[-1].reading._replace(max_length=0)
      stages.append(Stage((blind,), alone, None))
  return stages


def _running(found: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
  """Yield the stages with data, but for those whose result is not used."""
  sections = [
    (name, found[name])
    for name in found.get("order") or found.keys()
    if isinstance(found.get(name), ConfigDict)
  ]
  used = {
    str(edge)[1:].partition(":")[0]
    for _, section in sections
    for edge in (section.get("inputs") or {}).values()
    if str(edge).startswith("@")
  }
  for name, section in sections:
    unused = section.get("only_if_used") and name not in used
    if section.get("data") and not unused:
      yield name, section


def _names(section: ConfigDict) -> tuple[str, ...]:
  """Return the sources of a stage, which are one, or several by weight."""
  data = section.data
  return (data,) if isinstance(data, str) else tuple(name for name, _ in data)


def _reading(
  where: str, section: ConfigDict, found: ConfigDict, data: Sequence[str]
) -> check_rows.Reading:
  specs = [
    found.sources[name].to_dict() for name in data if _given(found, name)
  ]
  long = section.get("long", "error")
  return check_rows.Reading(
    template=_choice(
      where, "template", section.get("template", "qwen_1_5"), chat.TEMPLATES
    ),
    mask=_choice(where, "mask", section.get("mask", "paper"), chat.MASKS),
    # Other stages than training score both answers.
    pairs=section.get("objective", "dpo") == "dpo",
    max_length=section.get("max_length", 0),
    long=_choice(where, "long", opener.long_rows(long, specs), coders.LONG),
  )


def _given(found: ConfigDict, name: str) -> bool:
  """Return whether a source is there, its path given if it is of files."""
  spec: Any = found.sources.get(name)
  return spec is not None and (spec.get("path") or "path" not in spec)


def _choice(where: str, field: str, value: str, known: Sequence[str]) -> str:
  if value not in known:
    raise InputError(
      f"{where}.{field}={value!r}: choose one of {', '.join(known)}"
    )
  return value


def _frame(where: str, how: str, side: int | None) -> check_rows.Frame:
  try:
    size = side or images.parse_resample(how).edge or _SIDE
    # What is wrong with any image is no fault of one of them.
    images.resize(np.zeros((1, 1, 3), np.uint8), size, resample=how)
  except InputError as error:
    raise InputError(f"{where}: {error}") from None
  return check_rows.Frame(size, how)
