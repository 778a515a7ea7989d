"""Recipes: the config that a command names, read with what its flags set.

  pivot:debug             a variant of the package's recipe `pivot`
  configs/pivot.py:debug  the same by its file
  mine.py                 a file of the user's own

A recipe's file is a program, whose `get_config` returns a ConfigDict. What is
wrong with it is one line, which names the place in the file.
"""

import contextlib
import difflib
import importlib.machinery
import importlib.util
import inspect
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from pivot_jax.errors import InputError, raised_by

FLAG = "config"
_BUILDS = re.compile(r"^def get_config\(", re.MULTILINE)
_FILE = re.compile(r".+\.py(:.*)?", re.DOTALL)
_SETTING = re.compile(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)
# Fields are named in so many letters.
_LONGEST = 200

# A flag is its command's, and not this module's.
flags.disclaim_key_flags()


def define(
  text: str,
  *,
  flag_values: flags.FlagValues = flags.FLAGS,
  argv: Sequence[str] | None = None,
) -> flags.FlagHolder:
  """Define `--config`, and `--config.KEY` for each setting of the recipe.

  Args:
    text: describes the flag.
    flag_values: the flags that it is one of.
    argv: the command line that has the settings; None: the process's.
  """
  holder = config_flags.DEFINE_config_file(
    FLAG, None, text, flag_values=flag_values, sys_argv=argv
  )
  flag_values[FLAG].parser = _Parser(argv)
  return holder


def known() -> list[str]:
  """Return the names of the package's recipes."""
  return sorted(
    path.stem
    for path in _folder().glob("*.py")
    if _BUILDS.search(path.read_text("utf-8"))
  )


def is_recipe(text: str) -> bool:
  """Return whether a word that may name data names a recipe, if misspelt."""
  if _FILE.fullmatch(text):
    return True
  name = text.partition(":")[0]
  if not name.isidentifier() or pathlib.Path(text).exists():
    return False
  return bool(_guess(name, known()))


def load(text: str) -> ConfigDict:
  """Return the locked config of a recipe.

  Raises:
    InputError: no such recipe or file, or its program fails.
  """
  name, colon, variant = text.partition(":")
  path = _path(name)
  build = _get_config(name, path)
  given = (variant,) if colon else ()
  try:
    inspect.signature(build).bind(*given)
  except TypeError:
    said = f"takes no variant: give {name}, without :{variant}"
    if not given:
      said = f"needs a variant: give {name}:VARIANT"
    raise InputError(f"{path}: get_config {said}") from None
  with _explained(path):
    found = build(*given)
  if not isinstance(found, ConfigDict):
    raise InputError(
      f"{path}: get_config returned {type(found).__name__}, not a ConfigDict: "
      "end it with `return c`"
    )
  found.lock()
  return found


class _Parser(flags.ArgumentParser):
  """Reads the value of `--config`, and looks its settings up."""

  def __init__(self, argv: Sequence[str] | None):
    self._argv = argv

  def parse(self, argument: str) -> ConfigDict:
    """Return the config that a value of the flag names."""
    found = load(argument)
    argv = sys.argv if self._argv is None else self._argv
    for key, value in _settings(argv):
      _check_setting(found, key, value)
    return found

  def flag_type(self) -> str:
    return "config object"


def _folder() -> pathlib.Path:
  spec = importlib.util.find_spec("pivot_jax.configs")
  assert spec and spec.origin
  return pathlib.Path(spec.origin).parent


def _path(name: str) -> str:
  """Return the file of a recipe, the package's where it has one of the name."""
  path = _folder() / f"{name}.py"
  if name.isidentifier() and path.is_file():
    return str(path)
  if pathlib.Path(name).is_file():
    return name
  raise InputError(
    f"{name}: no such recipe or file{_guess(name, known())}; {_choice()}"
  )


def _choice() -> str:
  return f"the package has {', '.join(known())}, your own is a file, as mine.py"


def _guess(word: str, words: Iterable[str]) -> str:
  close = difflib.get_close_matches(word, list(words), 1)
  return f" (did you mean {close[0]!r}?)" if close else ""


def _get_config(name: str, path: str) -> Callable[..., ConfigDict]:
  """Return the function that a recipe's file defines."""
  # As ml_collections names it.
  loader = importlib.machinery.SourceFileLoader(f"{FLAG}_config", path)
  spec = importlib.util.spec_from_loader(loader.name, loader)
  assert spec
  module = importlib.util.module_from_spec(spec)
  sys.modules[loader.name] = module
  with _explained(path):
    loader.exec_module(module)
  if "get_config" not in vars(module):
    raise InputError(
      f"{name}: is no recipe, as {path} has no function get_config; {_choice()}"
    )
  return vars(module)["get_config"]


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
  """Turn what a recipe's program raises into one line."""
  try:
    yield
  # It is anybody's program and may raise anything.
  except (Exception, SystemExit) as error:
    raise InputError(raised_by(error, path)) from error


def _settings(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
  """Yield the (key, value) of each `--config.KEY`; None: its value is apart."""
  for word in argv:
    found = _SETTING.fullmatch(word)
    if found:
      yield found[1], found[2]


def _check_setting(config: ConfigDict, key: str, value: str | None) -> None:
  """Raise InputError unless a config has the setting."""
  # What stands in brackets is an element, and looked up as it is set.
  if "[" in key:
    return
  node, above = config, ""
  for part in key.split("."):
    owner = above or "the recipe"
    if not isinstance(node, ConfigDict):
      raise InputError(
        f"--config.{key}: {owner} is a {type(node).__name__} without fields"
      )
    if part not in node:
      has = textwrap.shorten(", ".join(node), _LONGEST, placeholder=" ...")
      guess = _guess(part, node) or f"; it has {has}"
      raise InputError(f"--config.{key}: {owner} has no {part!r}{guess}")
    node, above = node[part], f"{above}.{part}".lstrip(".")
  whole = value is None or value.lstrip().startswith("{")
  if isinstance(node, ConfigDict) and not whole:
    raise InputError(
      f"--config.{key}={value}: {key} is a section; set a field of it, as "
      f"--config.{key}.{next(iter(node), 'KEY')}=VALUE"
    )
