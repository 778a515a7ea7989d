"""Names of a config that stand for code: a table's own, or a user's.

A user's own is `module:function`, of a module that Python finds, or
`path/to/file.py:function`. So an objective, a kind of stage, a metric writer or
a source needs no edit of this package (CONTRIBUTING.md has one of each).
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TypeVar

from pivot_jax.errors import InputError, raised_by

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


def check_call(
  who: str, called: Callable, given: Sequence[str], fields: Iterable[str] = ()
) -> None:
  """Raise InputError unless a user's function takes what it is called with.

  An error inside of the function keeps its traceback: somebody debugs it.

  Args:
    who: the setting and its value, which begin the message.
    called: the function.
    given: names of the arguments by place.
    fields: names of the arguments by name.
  """
  try:
    signature = inspect.signature(called)
  except (TypeError, ValueError):
    # A function of C may not tell what it takes.
    return
  try:
    signature.bind(*given, **dict.fromkeys(fields))
  except TypeError as error:
    raise InputError(
      f"{who}: takes {signature}, but is called with "
      f"({', '.join((*given, *fields))}): {error}"
    ) from None


def file_of(name: str) -> pathlib.Path:
  """Return the file that a name of a user's own lies in."""
  place = name.rpartition(":")[0]
  if place.endswith(".py"):
    return pathlib.Path(place)
  return pathlib.Path(str(_module(place, name).__file__))


def is_own(name: str) -> bool:
  """Return whether a name is that of a user's own code."""
  return ":" in name


@functools.cache
def _module(place: str, what: str) -> ModuleType:
  in_file = place.endswith(".py")
  if in_file and not pathlib.Path(place).is_file():
    raise InputError(f"{what}: {place}: no such file")
  try:
    found = _from_file(place) if in_file else importlib.import_module(place)
  # A user's module is a program, may raise anything and end the process.
  except (Exception, SystemExit) as error:
    file = str(pathlib.Path(place).resolve()) if in_file else place
    said = raised_by(error, file)
    raise InputError(f"{what}: cannot be imported: {said}") from error
  if not vars(found).get("__file__"):
    # A stage is made again where the file of its code has changed.
    raise InputError(f"{what}: {place} is in no file; name code of a file")
  return found


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
