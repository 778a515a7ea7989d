"""Read commands, settings and snippets in Markdown; parse them, run nothing.

A text is split into code fences and inline code. What a command line says is
checked by the command itself: it is started in this process, and stopped where
its flags are parsed.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import operator
import os
import pathlib
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence

from absl import app, flags

ROOT = pathlib.Path(__file__).parents[1]
RECIPE, FILES = "configs/pivot.py", "configs/pivot.py:files"
# Stand for a value of any kind, so that the setting alone is checked.
_OPEN = re.compile(r"…|\.\.\.|[A-Z]+|")
_SETTING = re.compile(r"--config\.([\w.]+)")
_DOTTED = re.compile(r"([A-Za-z]\w*(?:\.\w+)+)(?:=(\S*))?")
_FILE = re.compile(r".*\.(py|json|jsonl|md|npz|safetensors|yaml)")
_SHELL = ("python ", "python3 ", "pip ", "pivot-jax ")
# Files of a reader's own, and what takes their place.
_OWN = {
  f"--config={own}": f"--config={RECIPE}"
  for own in ("mine.py", "mine/config.py")
}
# An answer to a command that is named without all that it needs.
_LACKS = re.compile(r"are required|is missing")


class Parsed(Exception):
  """A command has accepted its flags; what would come next is running it."""


class Refused(Exception):
  """A command or recipe does not accept a spelling; the text is its answer."""


@dataclasses.dataclass(frozen=True)
class Command:
  """A command line; one in inline code may name a part of it only."""

  line: str
  whole: bool


@dataclasses.dataclass(frozen=True)
class Fence:
  """A code block and the language that it names."""

  language: str
  text: str


def fences(text: str) -> list[Fence]:
  """Return the code blocks of a text in order."""
  found = re.findall(r"^```(\S*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
  return [Fence(language, body) for language, body in found]


def inline(text: str) -> list[str]:
  """Return the inline code of a text, line breaks as spaces."""
  prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
  found = []
  for paragraph in re.split(r"\n\s*\n", prose):
    found += re.findall(r"`([^`]+)`", paragraph)
  return [" ".join(one.split()) for one in found]


def commands(text: str) -> list[Command]:
  """Return the commands of a text: a line each, continuations joined."""
  # Commands may also be an indented block.
  blocks = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
  for fence in fences(text):
    if fence.language in ("", "bash", "sh", "shell", "console"):
      blocks += re.sub(r"\\\n\s*", "", fence.text).splitlines()
  found = []
  for lines, whole in ((inline(text), False), (blocks, True)):
    for part in (part for line in lines for part in line.split("&&")):
      # An optional part, [--flag=x], is one that has to be accepted.
      line = re.sub(r"\[(--[^\]]*)\]", r"\1", part.strip())
      if line.startswith(_SHELL):
        found.append(Command(line, whole))
  return _unique(found)


def settings(text: str) -> list[str]:
  """Return the settings that a text names outside commands, as `key=value`.

  `--config.key=value` anywhere, and `key.key=value` alone in inline code where
  it begins like a recipe; STAGE stands for each training stage.
  """
  found = []
  for one in inline(text):
    if one.startswith("--config."):
      found.append(one.removeprefix("--config."))
    elif _DOTTED.fullmatch(one) and not _FILE.fullmatch(one.split("=")[0]):
      if _begins_a_setting(one.split(".")[0]):
        found.append(one)
  return _unique(found)


def recipes(text: str) -> list[str]:
  """Return the recipes of `configs/pivot.py` that a text names."""
  return _unique(re.findall(r"configs/pivot\.py(?::\w+)?", text))


def snippets(text: str) -> list[str]:
  """Return the Python code of a text: blocks, and names in inline code."""
  found = [one.text for one in fences(text) if one.language == "python"]
  for one in inline(text):
    begins = re.match(r"(pivot_jax|encoder|model)\.[a-z_]+", one)
    if begins and not _FILE.fullmatch(one):
      found.append(one.replace("…", "..."))
  return _unique(found)


def check_command(command: Command) -> None:
  """Raise Refused unless a command line of a text would be accepted."""
  words = _words(command.line)
  if words[0] == "pip":
    return _check_extras(command.line)
  if words[0] == "pivot-jax":
    return _check_script()
  named = any("STAGE" in word for word in words)
  for name in training_stages() if named else [""]:
    module, argv = _module([word.replace("STAGE", name) for word in words])
    try:
      _check_module(module, argv)
    except Refused as refused:
      if command.whole or not _LACKS.search(str(refused)):
        raise


def check_setting(setting: str) -> None:
  """Raise Refused unless a recipe has a setting and takes its value."""
  key, _, value = setting.partition("=")
  value = value.strip("'")
  recipe = FILES if key.startswith("files.") else RECIPE
  root = key.split(".")[0]
  if root not in config(recipe) and root != "STAGE":
    # Named as a field of the stages that have it: `pack.row`.
    key = f"STAGE.{key}"
  for name in training_stages() if key.startswith("STAGE.") else [""]:
    full = key.replace("STAGE", name, 1) if name else key
    if _OPEN.fullmatch(value):
      _check_key(recipe, full)
    else:
      parse("pivot_jax.main", _flags(recipe, f"--config.{full}={value}"))


def check_recipe(spelling: str) -> None:
  """Raise Refused unless the command takes a recipe."""
  parse("pivot_jax.main", _flags(spelling))


def config(recipe: str) -> Mapping:
  """Return the values of a recipe, as the command reads them."""
  path, _, name = recipe.partition(":")
  module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
  return module.get_config(name)


def training_stages() -> list[str]:
  """Return the training stages of the default recipe."""
  c = config(RECIPE)
  return [name for name in c.order if c[name].kind == "train"]


def parse(module: str, argv: Sequence[str]) -> None:
  """Start `python -m MODULE ARGV` here and stop it where it has parsed.

  One that only helps ends by itself.

  Raises:
    Refused: it does not accept the flags, or has no parser.
  """
  said = io.StringIO()
  with (
    started(argv),
    contextlib.redirect_stderr(said),
    warnings.catch_warnings(),
  ):
    # It may be imported already; as a command it is another module.
    warnings.filterwarnings("ignore", ".* found in sys.modules after import")
    try:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Parsed:
      return
    except SystemExit as error:
      if not error.code:
        return
      raise Refused(f"{said.getvalue() or error}") from None
  raise Refused(f"python -m {module}: parses no flags")


def check_snippet(code: str, objects: Mapping[str, object]) -> int:
  """Check the project's names in a Python snippet; return how many there are.

  `objects` are stand-ins for what the snippet's variables hold. A call of a
  function of the project has to fit its signature.

  Raises:
    Refused: a module, attribute or argument that is not there.
  """
  tree, known = ast.parse(code), dict(objects)
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for name in node.names:
        known |= _imported(name.name, "", name.asname or name.name)
    if isinstance(node, ast.ImportFrom):
      for name in node.names:
        known |= _imported(node.module, name.name, name.asname or name.name)
  found = 0
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      found += _resolve(node, known) is not None
    if isinstance(node, ast.Call):
      called = _resolve(node.func, known)
      if callable(called):
        _check_call(called, node)
  return found


def _check_module(module: str, argv: Sequence[str]) -> None:
  """Raise Refused unless `python -m MODULE` takes arguments."""
  found = importlib.util.find_spec(module)
  if found is None or found.origin is None:
    raise Refused(f"python -m {module}: no such module")
  top = module.split(".")[0]
  if top not in ("pivot_jax", "bench", "tests"):
    return
  if found.submodule_search_locations:
    found = importlib.util.find_spec(f"{module}.__main__")
  source = pathlib.Path(found.origin).read_text("utf-8")
  if '__name__ == "__main__"' not in source:
    raise Refused(f"python -m {module}: runs nothing")
  if argv:
    parse(module, argv)
  elif top == "pivot_jax":
    parse(module, ["--help"])


def _words(line: str) -> list[str]:
  """Return the words of a command, without redirections and environment."""
  words = shlex.split(line.replace("…", "X"), comments=True)
  if ">" in words:
    words = words[: words.index(">")]
  return [_OWN.get(word, word) for word in words]


def _module(words: Sequence[str]) -> tuple[str, list[str]]:
  """Return the module and arguments of a `python` command."""
  if words[1] == "-m":
    return words[2], list(words[3:])
  if not (ROOT / words[1]).is_file():
    raise Refused(f"{words[1]}: no such file")
  return words[1].removesuffix(".py").replace("/", "."), list(words[2:])


def _check_extras(line: str) -> None:
  packages = (ROOT / "setup.py").read_text("utf-8")
  packages += (ROOT / "pyproject.toml").read_text("utf-8")
  for names in re.findall(r"\[([\w,-]+)\]", line):
    for name in names.split(","):
      if not re.search(rf'^\s*"?{name}"?\s*[:=]\s*\[', packages, re.MULTILINE):
        raise Refused(f"{line}: there is no extra {name!r}")


def _check_script() -> None:
  if "pivot-jax" not in (ROOT / "setup.py").read_text("utf-8"):
    raise Refused("pivot-jax: no such command")


def _check_key(recipe: str, key: str) -> None:
  node = config(recipe)
  for part in key.split("."):
    if not isinstance(node, Mapping) and "ConfigDict" not in str(type(node)):
      raise Refused(f"{recipe}: {key}: {part!r} is inside no section")
    if part not in node:
      raise Refused(f"{recipe}: has no {key}")
    node = node[part]


def _begins_a_setting(root: str) -> bool:
  stage = config(RECIPE)[training_stages()[0]]
  return root in ("STAGE", "files") or root in config(RECIPE) or root in stage


def _flags(recipe: str, *more: str) -> list[str]:
  return [f"--config={recipe}", "--workdir=W", *more]


@contextlib.contextmanager
def started(argv: Sequence[str]) -> Iterator[None]:
  """Make the process look like a new one that was started with arguments."""
  before = sys.argv, pathlib.Path.cwd(), app.run
  methods = argparse.ArgumentParser.parse_args
  known = argparse.ArgumentParser.parse_known_args
  sys.argv = ["command", *argv]
  os.chdir(ROOT)
  app.run = _stop_before_running
  argparse.ArgumentParser.parse_args = _stopping(methods)
  argparse.ArgumentParser.parse_known_args = _stopping(known)
  try:
    with _no_flags():
      yield
  finally:
    argparse.ArgumentParser.parse_args = methods
    argparse.ArgumentParser.parse_known_args = known
    sys.argv, app.run = before[0], before[2]
    os.chdir(before[1])


@contextlib.contextmanager
def _no_flags() -> Iterator[None]:
  """Have no flags defined, whatever else this process has imported."""
  kept = dict(vars(flags.FLAGS))
  _set(flags.FLAGS, vars(flags.FlagValues()))
  try:
    yield
  finally:
    _set(flags.FLAGS, kept)


def _set(values: flags.FlagValues, state: Mapping) -> None:
  vars(values).clear()
  vars(values).update(state)


def _stopping(method):
  """Return a method of a parser that stops once the outermost has parsed."""
  depth = []

  def parse_and_stop(self, *args, **kwargs):
    depth.append(None)
    try:
      found = method(self, *args, **kwargs)
    finally:
      depth.pop()
    # `parse_args` calls `parse_known_args`, and judges what that left.
    caller = inspect.stack()[1]
    if depth or caller.filename == argparse.__file__:
      return found
    raise Parsed

  return parse_and_stop


def _stop_before_running(main, argv=None, flags_parser=None) -> None:
  parser = flags_parser or flags.FLAGS
  parser(list(argv or sys.argv))
  raise Parsed


def _imported(module: str, name: str, bound: str) -> dict[str, object]:
  """Return what an import of the project binds; others are left alone."""
  if module.split(".")[0] not in ("pivot_jax", "configs", "tests", "bench"):
    return {}
  try:
    found = importlib.import_module(module)
    if not name:
      return {bound: found}
    if importlib.util.find_spec(f"{module}.{name}"):
      return {bound: importlib.import_module(f"{module}.{name}")}
    return {bound: operator.attrgetter(name)(found)}
  except (ImportError, AttributeError) as error:
    raise Refused(f"import of {module} {name}: {error}") from None


def _resolve(node: ast.AST, known: Mapping[str, object]) -> object | None:
  """Return what a dotted name stands for; None if it is not the project's."""
  if isinstance(node, ast.Name):
    return known.get(node.id)
  if not isinstance(node, ast.Attribute):
    return None
  owner = _resolve(node.value, known)
  if owner is None:
    return None
  if node.attr not in dir(owner):
    raise Refused(f"{ast.unparse(node)}: no such name")
  return operator.attrgetter(node.attr)(owner)


def _check_call(called, node: ast.Call) -> None:
  signature = inspect.signature(called)
  names = {word.arg: None for word in node.keywords if word.arg}
  try:
    signature.bind(*[None] * len(node.args), **names)
  except TypeError as error:
    raise Refused(f"{ast.unparse(node)}: {error}") from None


def _unique(found) -> list[str]:
  return list(dict.fromkeys(found))
