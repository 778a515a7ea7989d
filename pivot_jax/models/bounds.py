"""Fields of a configuration that may be foreign: type, finiteness and range.

A number is looked at before anything is sized by it. The bounds lie far beyond
any published model; what they keep out takes all time or memory, or gives NaN.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from pivot_jax import texts
from pivot_jax.errors import InputError

# A value of a file, or of a configuration that was made from one.
Json = None | bool | int | float | str | Sequence[Any] | Mapping[str, Any]

BLOCKS = 1000
WIDTH = 2**20
PIXELS = 2**14  # of a side
VOCABULARY = 2**24


def whole(name: str, value: Json, most: int, *, least: int = 1) -> int:
  """Return a whole number from `least` to `most`; True is none."""
  if not is_whole(value) or not least <= value <= most:
    raise InputError(
      f"{name} is {told(value)}; it must be a whole number from {least} to {most}"
    )
  return value


def real(name: str, value: Json, least: float, most: float) -> float:
  """Return a finite number from `least` to `most` as it is."""
  if not is_real(value) or not least <= value <= most:
    raise InputError(
      f"{name} is {told(value)}; it must be a number from {least:g} to {most:g}"
    )
  return value


def truth(name: str, value: Json) -> bool:
  """Return true or false."""
  if not isinstance(value, bool):
    raise InputError(f"{name} is {told(value)}; it must be true or false")
  return value


def word(name: str, value: Json, choices: Iterable[str]) -> str:
  """Return one of the words."""
  if not isinstance(value, str) or value not in choices:
    raise InputError(
      f"{name} is {told(value)}; it can be {', '.join(sorted(choices))}"
    )
  return value


def channels(
  name: str, value: Json, least: float, most: float
) -> tuple[float, ...]:
  """Return a number for each of the three colours."""
  found = value if isinstance(value, (list, tuple)) else ()
  if len(found) != 3 or not all(map(is_real, found)):
    raise InputError(f"{name} is {told(value)}; it must be three numbers")
  return tuple(real(name, x, least, most) for x in found)


def mean(name: str, value: Json) -> tuple[float, ...]:
  """Return the means of the colours."""
  return channels(name, value, -1e6, 1e6)


def std(name: str, value: Json) -> tuple[float, ...]:
  """Return the standard deviations of the colours, by which is divided."""
  return channels(name, value, 1e-6, 1e6)


def section(name: str, value: Json) -> dict[str, Any]:
  """Return an object of JSON; null is an empty one."""
  if value is None:
    return {}
  if not isinstance(value, dict):
    raise InputError(f"{name} is {told(value)}; it must be a JSON object")
  return value


def is_whole(value: Json) -> TypeGuard[int]:
  """Return whether a value is a whole number; True is none."""
  return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: Json) -> TypeGuard[float]:
  """Return whether a value is a finite number; True is none."""
  if is_whole(value):
    return True
  return isinstance(value, float) and math.isfinite(value)


def told(value: Json) -> str:
  """Return a value as a message tells it, at a length that can be read."""
  # Python refuses to spell a longer number.
  huge = isinstance(value, int) and value.bit_length() > 10_000
  return "a huge number" if huge else texts.shown(repr(value), longest=100)
