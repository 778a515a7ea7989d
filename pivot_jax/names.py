"""Names of a config that stand for code: a table's own, or a user's.

A user's own is `module:function`, of a module that Python finds, or
`path/to/file.py:function`. So an objective, a kind of stage, a metric writer or
a source needs no edit of this package (CONTRIBUTING.md has one of each).
"""

import functools
import hashlib
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import TypeVar

from pivot_jax.errors import InputError

T = TypeVar("T")


def named(name: str, table: Mapping[str, T], what: str) -> T:
  """Return the entry of a table, or the object of a user's own module.

  Args:
    name: a key of the table, `module:function` or `path/to/file.py:function`.
    table: the package's own.
    what: how the setting is called in an error, as `stage2.objective`.

  Raises:
    InputError: no such entry, module, file or function; or the module itself
      cannot be imported.
  """
  if name in table:
    return table[name]
  place, colon, attribute = name.rpartition(":")
  if not colon:
    raise InputError(
      f"{what}={name!r}: choose one of {', '.join(sorted(table))}, or name your "
      "own as module:function or path/to/file.py:function"
    )
  module = _module(place, what)
  if not hasattr(module, attribute):
    raise InputError(f"{what}={name!r}: {place} has no {attribute!r}")
  found = getattr(module, attribute)
  if not callable(found):
    raise InputError(f"{what}={name!r}: {attribute} cannot be called")
  return found


def file_of(name: str) -> pathlib.Path:
  """Return the file that a name of a user's own lies in."""
  place = name.rpartition(":")[0]
  if place.endswith(".py"):
    return pathlib.Path(place)
  return pathlib.Path(_module(place, name).__file__ or place)


def is_own(name: str) -> bool:
  """Return whether a name is that of a user's own code."""
  return ":" in name


@functools.cache
def _module(place: str, what: str) -> ModuleType:
  in_file = place.endswith(".py")
  if in_file and not pathlib.Path(place).is_file():
    raise InputError(f"{what}: {place}: no such file")
  try:
    return _from_file(place) if in_file else importlib.import_module(place)
  # A user's module is a program and may raise anything.
  except Exception as error:
    said = f"{type(error).__name__}: {error}"
    raise InputError(f"{what}: {place} cannot be imported ({said})") from error


def _from_file(place: str) -> ModuleType:
  """Return the module of a file, the same one however it is spelled."""
  path = pathlib.Path(place).resolve()
  mark = hashlib.sha256(str(path).encode()).hexdigest()[:8]
  name = f"{path.stem}_{mark}"
  if name not in sys.modules:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
      spec.loader.exec_module(module)
    except BaseException:
      del sys.modules[name]
      raise
  return sys.modules[name]
