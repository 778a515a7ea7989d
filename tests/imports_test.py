"""Keeps the order in which the modules may import one another."""

import ast
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

# A module may import what stands in an earlier line, beside its own folder where
# its line names that with a star. A module without a line needs one here.
ORDER = (
  ("errors", "texts"),
  ("names", "output"),
  ("command_line", "recipes"),
  ("trees", "files", "addresses", "cluster"),
  ("coordination", "goodput"),
  ("watchdog",),
  ("processes",),
  ("sharding", "metrics"),
  ("models.*",),
  (
    "data.tokenizer",
    "data.framing",
    "data.wholeness",
    "data.layouts",
    "data.rows",
  ),
  ("data.pool", "data.sources.records"),
  ("data.chat", "data.images", "data.packing"),
  ("data.sources.*", "data.scenes.*"),
  ("data.coders",),
  ("data.grouping", "data.lengths"),
  ("data.opener",),
  ("data.streams",),
  ("data.feed",),
  ("weights.*", "weights.convert.*"),
  ("training.*",),
  ("evals.*",),
  ("report.*",),
  ("stages.*",),
  ("recipe.*",),
  ("data.tools.*",),
  ("", "main", "export", "data.__main__"),
  ("cli",),
)
# Where a package may be imported, by path; elsewhere it may not.
ONLY_IN = {
  "transformers": r"pivot_jax/(weights/convert/hf|data/tokenizer)\.py|(tests|bench)/.+",
  "torch": r"(tests/parity|bench)/.+",
  "sklearn": r"(tests|bench)/.+",
  "tensorflow": r"",
}


def imported(path: pathlib.Path) -> set[str]:
  """Return the dotted names a file imports, at its top or in a function."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: a relative import"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def files(*folders: str) -> list[pathlib.Path]:
  return [
    path for name in folders for path in sorted(ROOT.glob(f"{name}/**/*.py"))
  ]


def module_of(name: str) -> str:
  """Return the module of pivot_jax that an imported name is or lies in."""
  name = name.removeprefix("pivot_jax").removeprefix(".")
  parent = name.rpartition(".")[0]
  in_file = ROOT / "pivot_jax" / f"{parent.replace('.', '/')}.py"
  return parent if parent and in_file.is_file() else name


def line_of(module: str) -> int | None:
  """Return the line of a module in `ORDER`, by its name or its folder's."""
  folder = f"{module.rpartition('.')[0]}.*"
  for name in (module, folder):
    for number, line in enumerate(ORDER):
      if name in line:
        return number
  return None


def may_import(module: str, name: str) -> bool:
  own, other = line_of(module), line_of(name)
  if own is None or other is None or other > own:
    return False
  return other < own or any(entry.endswith(".*") for entry in ORDER[own])


def test_modules_import_only_what_comes_before_them():
  wrong = []
  for path in files("pivot_jax"):
    relative = path.relative_to(ROOT / "pivot_jax").with_suffix("")
    module = ".".join(relative.parts).removesuffix("__init__").strip(".")
    wrong += [
      f"{module} imports {name}"
      for name in sorted(imported(path))
      if name.split(".")[0] == "pivot_jax"
      and not may_import(module, module_of(name))
    ]
  assert not wrong, wrong


def test_every_line_of_the_order_names_a_module():
  modules = {
    ".".join(p.relative_to(ROOT / "pivot_jax").with_suffix("").parts)
    for p in files("pivot_jax")
  }
  folders = {f"{name.rpartition('.')[0]}.*" for name in modules}
  named = {name for line in ORDER for name in line if name}
  assert named <= modules | folders


# In code and in scripts that stand in strings, of one line or in parentheses.
_WRITTEN = re.compile(
  r"\bfrom (pivot_jax[\w.]*) import (?:\(([^()]+)\)|([\w, ]+))"
)


def written(text: str) -> list[tuple[str, str]]:
  """Return the (module, name) pairs that a text imports from pivot_jax."""
  return [
    (module, one.split()[0])
    for module, inside, line in _WRITTEN.findall(text)
    for one in re.sub(r"#.*", "", inside or line).split(",")
    if one.split()
  ]


def defined(path: pathlib.Path) -> set[str]:
  """Return the names that a module defines at its top."""
  names = set()
  for node in ast.parse(path.read_text("utf-8")).body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      names.add(node.name)
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
      names |= {
        inner.id
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
      }
  return names


def is_there(module: str, name: str) -> bool:
  """Return whether a name of pivot_jax is a module or defined in one."""
  # The recipes lie beside the package.
  module = module.removeprefix("pivot_jax.") if ".configs" in module else module
  place = ROOT / module.replace(".", "/")
  if (place / name).is_dir() or (place / f"{name}.py").is_file():
    return True
  own = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
  return own.is_file() and name in defined(own)


def test_every_name_imported_in_code_or_a_string_is_there():
  wrong = [
    f"{path.relative_to(ROOT)} imports {name} from {module}"
    for path in files("pivot_jax", "tests", "bench")
    for module, name in written(path.read_text("utf-8"))
    if not is_there(module, name)
  ]
  assert not wrong, wrong


def test_imports_are_read_in_strings_and_in_parentheses():
  package = "pivot_jax"
  text = f"""x = 'from {package} import a; b'
from {package}.c import (
  d as e,  # A note, with a comma.
  f,
)
"""
  assert written(text) == [
    (package, "a"),
    (f"{package}.c", "d"),
    (f"{package}.c", "f"),
  ]
  assert is_there(f"{package}.data", "feed")
  assert is_there(f"{package}.data.feed", "Share")
  assert not is_there(f"{package}.data", "no_such_module")
  assert not is_there(f"{package}.data.feed", "jax")


def test_foreign_packages_stay_where_they_are_allowed():
  wrong = [
    f"{path.relative_to(ROOT)} imports {name}"
    for path in files("pivot_jax", "configs", "tests", "bench", "launch")
    for name in sorted(imported(path))
    for package, where in ONLY_IN.items()
    if name.split(".")[0] == package
    and not re.fullmatch(where, path.relative_to(ROOT).as_posix())
  ]
  assert not wrong, wrong


def test_configs_load_with_ml_collections_alone():
  wrong = [
    f"{path.name} imports {name}"
    for path in files("configs")
    for name in imported(path)
    if not name.startswith(("ml_collections", "pivot_jax.configs."))
  ]
  assert not wrong, wrong


def test_the_library_does_not_import_its_tests_or_configs():
  wrong = [
    f"{path.name} imports {name}"
    for path in files("pivot_jax")
    for name in imported(path)
    if name.startswith(("tests", "configs", "bench", "pivot_jax.configs"))
  ]
  assert not wrong, wrong


# Loaded where a file asks for them, and by no import of `data` before the feed.
HEAVY = {"jax", "flax", "grain", "pyarrow", "array_record", "transformers"}
_LOADED = """
import importlib, json, sys
for name in sys.argv[1:]:
  importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""


def loaded(names: list[str]) -> set[str]:
  """Return the modules of a fresh interpreter that imported some."""
  command = [sys.executable, "-c", _LOADED, *names]
  said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
  return set(json.loads(said.stdout))


def test_data_before_the_feed_loads_no_jax():
  feed = "pivot_jax.data.feed"
  names = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in files("pivot_jax/data")
    if path.stem not in ("__init__", "__main__") and path.parent.name != "tools"
  ]
  names.remove(feed)
  found = loaded(names)
  assert set(names) <= found
  assert not found & (HEAVY | {feed, "pivot_jax.trees"})
  # `check` and its like read configs, and no source needs what those do.
  assert "yaml" not in loaded(["pivot_jax.data.opener"])
