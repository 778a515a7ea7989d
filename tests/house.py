"""Measures the tree: sizes, and the rules that hold everywhere.

  python -m tests.house [ROOT]

Reads sources as text and syntax trees, and imports nothing of the package.
"""

import ast
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("pivot_jax", "configs", "bench", "tests", "launch")
# A docstring that asks, or that says "Returns what" and leaves it open.
_QUESTION = re.compile(
  r"(what|which|who|whose|where|when|why|how|whether)\b|returns what\b",
  re.IGNORECASE,
)


class Definition(NamedTuple):
  """A function, class or module and where it stands."""

  path: str
  name: str
  node: ast.AST

  def __str__(self) -> str:
    return f"{self.path}:{self.name}"


def sources(root: pathlib.Path, *folders: str) -> list[pathlib.Path]:
  """Return the Python files below folders of a tree, in order."""
  return [p for name in folders for p in sorted(root.glob(f"{name}/**/*.py"))]


def definitions(root: pathlib.Path, *folders: str) -> Iterator[Definition]:
  """Yield each module, class and function below folders of a tree."""
  for path in sources(root, *folders):
    shown = path.relative_to(root).as_posix()
    tree = ast.parse(path.read_text("utf-8"))
    yield Definition(shown, "", tree)
    yield from _inside(shown, "", tree)


def _inside(path: str, outer: str, node: ast.AST) -> Iterator[Definition]:
  kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
  for child in ast.iter_child_nodes(node):
    if isinstance(child, kinds):
      name = f"{outer}.{child.name}".strip(".")
      yield Definition(path, name, child)
      yield from _inside(path, name, child)
    else:
      yield from _inside(path, outer, child)


def functions(root: pathlib.Path, *folders: str) -> list[Definition]:
  """Return the functions and methods below folders of a tree."""
  kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
  return [d for d in definitions(root, *folders) if isinstance(d.node, kinds)]


def length(definition: Definition) -> int:
  """Return the lines of a definition, decorators apart."""
  return definition.node.end_lineno - definition.node.lineno + 1


def asking_docstrings(root: pathlib.Path, *folders: str) -> list[str]:
  """Return the docstrings that begin with a question word, by place."""
  return [
    f"{one}: {text.splitlines()[0]}"
    for one in definitions(root, *folders)
    if (text := ast.get_docstring(one.node)) and _QUESTION.match(text)
  ]


def untyped_parameters(root: pathlib.Path, *folders: str) -> list[str]:
  """Return the parameters of public functions without a type, or of `Any`."""
  found = []
  for one in functions(root, *folders):
    if any(part.startswith("_") for part in one.name.split(".")):
      # Of special methods the constructor alone is called with arguments.
      if not one.name.endswith(".__init__") or "._" in f".{one.name[:-9]}":
        continue
    given = one.node.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    named += [a for a in (given.vararg, given.kwarg) if a]
    found += [
      f"{one}({argument.arg})"
      for argument in named
      if argument.arg not in ("self", "cls") and _is_open(argument.annotation)
    ]
  return found


def _is_open(annotation: ast.expr | None) -> bool:
  if annotation is None:
    return True
  return ast.unparse(annotation) in ("Any", "typing.Any", "object")


def exporting_modules(root: pathlib.Path, *folders: str) -> list[str]:
  """Return the modules that import and define nothing of their own."""
  found = []
  for path in sources(root, *folders):
    body = ast.parse(path.read_text("utf-8")).body
    imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
    others = [n for n in body if not _is_plain(n)]
    if imports and not others:
      found.append(path.relative_to(root).as_posix())
  return found


def _is_plain(node: ast.stmt) -> bool:
  """Return whether a statement imports, documents or renames."""
  if isinstance(node, (ast.Import, ast.ImportFrom)):
    return True
  if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
    return True
  named = isinstance(node, ast.Assign) and isinstance(
    node.value, (ast.Name, ast.Attribute, ast.List, ast.Tuple)
  )
  return named


def tests(root: pathlib.Path) -> list[Definition]:
  """Return the test functions of a tree, each counted once."""
  return [
    one
    for one in functions(root, "tests")
    if one.name.rpartition(".")[2].startswith("test_")
    and one.path.endswith("_test.py")
  ]


def report(root: pathlib.Path) -> str:
  """Return the measures of a tree as lines of Markdown."""
  lines = ["| folder | files | lines |", "|---|---|---|"]
  folders = sorted(
    {p.parent for p in sources(root, *FOLDERS)}, key=lambda p: p.as_posix()
  )
  for folder in folders:
    inside = sorted(folder.glob("*.py"))
    lines.append(_row(folder.relative_to(root).as_posix(), inside))
  for name in FOLDERS:
    inside = sources(root, name)
    if inside:
      lines.append(_row(f"**{name}, whole**", inside))
  texts = [*root.glob("*.md"), *root.glob("docs/*.md")]
  words = sum(len(p.read_text("utf-8").split()) for p in texts)
  package = ("pivot_jax",)
  files = sources(root, *package)
  longest = max(files, key=_lines)
  slow = max(functions(root, *package), key=length)
  lines += [
    "",
    f"- words of README and docs: {words}",
    f"- longest file: {longest.relative_to(root)}, {_lines(longest)} lines",
    f"- longest function: {slow}, {length(slow)} lines",
    "- docstrings that begin with a question word: "
    f"{len(asking_docstrings(root, *FOLDERS))}",
    "- parameters of public functions untyped or `Any`: "
    f"{len(untyped_parameters(root, *package))}",
    f"- modules that only re-export: {len(exporting_modules(root, *FOLDERS))}",
    f"- test functions: {len(tests(root))}",
  ]
  return "\n".join(lines)


def _row(name: str, files: list[pathlib.Path]) -> str:
  return f"| {name} | {len(files)} | {sum(map(_lines, files))} |"


def _lines(path: pathlib.Path) -> int:
  return len(path.read_text("utf-8").splitlines())


if __name__ == "__main__":
  sys.stdout.write(
    report(pathlib.Path(sys.argv[1]) if sys.argv[1:] else ROOT) + "\n"
  )
