"""Writes docs/moved.md: where modules and names of an older tree are today.

  python -m tests.moved OLD_ROOT [--also FILE ...]

Both trees are read as text. A module is found by the table below or in its old
place, a name by the table, in the new place of its module, or by being the only
one of its name and kind. The table is `tests/fixtures/moved.txt`: lines `old ->
new`, of modules or names with dots, or `old -> reason` in words for what is
gone; the last line of a name counts, and one that leads nowhere today does not.
`--also` appends the lines of other files first. Names that are found nowhere
are printed, and the command then returns 1.
"""

import argparse
import ast
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
TABLE = ROOT / "tests" / "fixtures" / "moved.txt"
PAGE = ROOT / "docs" / "moved.md"
FOLDERS = ("pivot_jax", "bench", "configs")
_DOTTED = re.compile(r"[A-Za-z]\w*(\.\w+)+")
_PLACES = re.compile(rf"{_DOTTED.pattern}(, \w+)+")


class Tree(NamedTuple):
  """The modules of a tree: the kind of each public name, by module."""

  modules: dict[str, dict[str, str]]
  paths: dict[str, str]

  def split(self, dotted: str) -> tuple[str, str]:
    """Return module and name of a dotted name; "" where there is no module."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
      if (module := ".".join(parts[:count])) in self.modules:
        return module, ".".join(parts[count:])
    return "", dotted

  def has(self, dotted: str) -> bool:
    """Return whether a dotted name is a module or a name at its top."""
    module, name = self.split(dotted)
    top = name.split(".")[0]
    return bool(module) and (not top or top in self.modules[module])

  def shown(self, dotted: str) -> str:
    """Return a dotted name as `path` or `path:name`."""
    module, name = self.split(dotted)
    return f"{self.paths[module]}:{name}".removesuffix(":")


class Moved(NamedTuple):
  """A name, where it was and where it is; in words if it is gone."""

  old: str
  new: str


def read(root: pathlib.Path) -> Tree:
  """Read the modules of the package and the benchmarks below a root."""
  modules, paths = {}, {}
  for folder in FOLDERS:
    for path in sorted((root / folder).glob("**/*.py")):
      relative = path.relative_to(root)
      parts = relative.with_suffix("").parts
      dotted = ".".join(parts).removesuffix(".__init__")
      modules[dotted] = dict(_names(ast.parse(path.read_text("utf-8"))))
      paths[dotted] = relative.as_posix()
  return Tree(modules, paths)


def _names(tree: ast.Module) -> Iterator[tuple[str, str]]:
  """Yield the public names at the top of a module and their kinds."""
  for node in tree.body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      found = [(node.name, type(node).__name__)]
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
      targets = node.targets if isinstance(node, ast.Assign) else [node.target]
      leaves = (leaf for target in targets for leaf in ast.walk(target))
      found = [(x.id, "value") for x in leaves if isinstance(x, ast.Name)]
    else:
      continue
    yield from ((name, kind) for name, kind in found if name[0] != "_")


def table(lines: Iterable[str]) -> dict[str, str]:
  """Read lines `old -> new`; the last one of an old name counts."""
  found = {}
  for line in lines:
    old, arrow, new = line.partition("->")
    if not arrow or line.startswith("#"):
      continue
    # `module.one, other -> reason` is of two names of a module, and each has a
    # place of its own in `module.one, other -> new.uno, otra`.
    names, places = _beside(old.strip(" `\n")), [new.strip(" `\n")]
    if _PLACES.fullmatch(places[0]):
      places = _beside(places[0])
    if len(places) != len(names):
      places = places[:1] * len(names)
    for name, place in zip(names, places, strict=True):
      found[_full(name)] = _full(place)
  return found


def _beside(names: str) -> list[str]:
  """Return the dotted names of `module.one, other`."""
  first, *others = names.split(", ")
  return [first, *(f"{first.rpartition('.')[0]}.{name}" for name in others)]


def _full(name: str) -> str:
  """Return a dotted name with its package; words stay as they are."""
  first = re.match(r"[\w.]+", name)
  if not first or not _DOTTED.fullmatch(first[0]):
    return name
  # A remark behind a dotted name is no part of it.
  top = first[0].split(".")[0]
  known = (*FOLDERS, "tests")
  return first[0] if top in known else f"pivot_jax.{first[0]}"


def follow(name: str, known: Mapping[str, str], new: Tree) -> str:
  """Return the end of a chain of moves; "" if that is no longer there."""
  seen = {name}
  found = known.get(name, "")
  while found in known and found not in seen and not new.has(found):
    seen.add(found)
    found = known[found]
  return "" if _DOTTED.fullmatch(found) and not new.has(found) else found


def find(old: Tree, new: Tree, known: Mapping[str, str]) -> list[Moved]:
  """Return where each module and each public name of a tree is today.

  Those that stay are left as they are; `new` is "" where nothing is found.
  """
  homes: dict[tuple[str, str], list[str]] = {}
  for module, names in new.modules.items():
    for name, kind in names.items():
      homes.setdefault((name, kind), []).append(module)
  found = []
  for module, names in old.modules.items():
    home = _home(module, known, new)
    inside = [
      Moved(
        f"{module}.{name}",
        _place(f"{module}.{name}", name, home, known, new)
        or _only(module, name, homes.get((name, kind), [])),
      )
      for name, kind in names.items()
    ]
    if not home:
      # It was taken apart: the files that hold its names.
      parts = dict.fromkeys(new.split(x.new)[0] for x in inside)
      home = ", ".join(part for part in parts if part)
      if not home and all(one.new for one in inside):
        home = "gone, as are its names"
    found += [Moved(module, home), *inside]
  listed = {one.old for one in found}
  # Methods, and fields of classes.
  more = [x for x in sorted(known) if old.has(x) and x not in listed]
  return found + [Moved(x, follow(x, known, new)) for x in more]


def _home(module: str, known: Mapping[str, str], new: Tree) -> str:
  if module in known:
    return follow(module, known, new)
  return module if module in new.modules else ""


def _place(
  dotted: str, name: str, home: str, known: Mapping[str, str], new: Tree
) -> str:
  """Return the new dotted name by the table or by the module's new place."""
  if found := follow(dotted, known, new):
    return found
  if home in new.modules and name in new.modules[home]:
    return f"{home}.{name}"
  return ""


def _only(module: str, name: str, others: list[str]) -> str:
  """Return the one other place of a name in the same top folder."""
  top = module.split(".")[0]
  found = [x for x in others if x.split(".")[0] == top]
  return f"{found[0]}.{name}" if len(found) == 1 else ""


def page(old: Tree, new: Tree, found: list[Moved]) -> str:
  """Return docs/moved.md."""
  modules = [one for one in found if one.old in old.modules]
  homes = {one.old: one.new for one in modules}
  along: dict[str, list[str]] = {}
  apart = []
  for one in found:
    module, name = old.split(one.old)
    if not name:
      continue
    if one.new != f"{homes[module]}.{name}":
      apart.append(f"| {one.old} | {_cell(one.new, new)} |")
    elif homes[module] != module:
      along.setdefault(module, []).append(name)
  rows = []
  for one in (one for one in modules if one.new != one.old):
    names = ", ".join(along.get(one.old, []))
    rows.append(f"| {one.old} | {_cell(one.new, new)} | {names} |")
  return _PAGE.format(modules="\n".join(rows), names="\n".join(sorted(apart)))


def _cell(found: str, new: Tree) -> str:
  """Return a cell of new places as code, or the words of what is gone."""
  names = found.split(", ")
  if found and all(new.has(name) for name in names):
    return ", ".join(f"`{new.shown(name)}`" for name in names)
  return found


_PAGE = """\
# Where things moved

From the released version to this one; written by `python -m tests.moved`, which
explains itself. Modules and names that stayed are not listed.

## Modules, and the public names that went with them

| was | is | with it |
|---|---|---|
{modules}

## Names that went elsewhere, changed or are gone

| was | is |
|---|---|
{names}
"""


def main() -> int:
  """Write the page; return 1 if a name is found nowhere."""
  parser = argparse.ArgumentParser(
    prog="python -m tests.moved",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("old", type=pathlib.Path, metavar="OLD_ROOT")
  parser.add_argument("--also", type=pathlib.Path, nargs="*", default=[])
  asked = parser.parse_args()
  if asked.also:
    lines = [x for path in asked.also for x in path.read_text().splitlines()]
    with TABLE.open("a", encoding="utf-8") as file:
      file.writelines(f"{line}\n" for line in lines if "->" in line)
  old, new = read(asked.old), read(ROOT)
  known = table(TABLE.read_text("utf-8").splitlines())
  found = find(old, new, known)
  PAGE.write_text(page(old, new, found), encoding="utf-8")
  lost = [one.old for one in found if not one.new]
  for name in lost:
    sys.stderr.write(f"{name} -> ?\n")
  return 1 if lost else 0


if __name__ == "__main__":
  sys.exit(main())
