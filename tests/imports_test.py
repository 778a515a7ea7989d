"""Keeps the order in which the modules may import one another."""

import ast
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

_BASE = r"trees|texts|losses|optim|sharding|metrics|models\..+|data\..+"
_TOOLS = (
  _BASE
  + r"|objectives|generate|logistic|segmentation|convert\..+"
  + r"|files|addresses|artifacts|speed|flops|memory"
)
# What a module of pivot_jax may import of it, beside `errors`; the first match
# counts, and a module without a match needs a line here.
MAY_IMPORT = (
  (r"errors|trees|texts", r""),
  (r"losses|optim|sharding|metrics", r"trees"),
  (r"models\.(layers|sequences)", r""),
  (r"models\.attention", r"models\.layers"),
  (r"models\.(vit|qwen2|heads)", r"models\.(layers|attention|sequences)"),
  (r"models\.mllm", r"models\.(layers|attention|sequences|vit|qwen2|heads)"),
  (r"data\.(tokens|framing|records|fitting|drawing|decoders|places)", r""),
  (r"data\.packing", r"data\.fitting"),
  (r"data\.images", r"data\.(framing|decoders|places)"),
  (r"data\.indexed", r"data\.records"),
  (r"data\.work", r"data\.packing"),
  (r"data\.layout", r"data\.drawing"),
  (r"data\.questions", r"data\.(drawing|layout)"),
  (r"data\.misnaming", r"data\.(drawing|layout|questions)"),
  (r"data\.scenes", r"data\.(drawing|layout|questions|misnaming)"),
  (r"data\.chat", r"data\.tokens"),
  (r"data\.sources", r"texts|data\.(images|records|indexed)"),
  (r"data\.(showing.*|checking.*)", _BASE + r"|html|addresses|files"),
  (r"data\.(converting|train_tokenizer)", _BASE + r"|files"),
  (r"data\..+|objectives|generate|logistic|segmentation", _BASE),
  (r"files|addresses|speed", r""),
  (r"flops", r"models\..+|data\.work"),
  (r"memory", r"trees|models\.mllm"),
  (r"convert\..+", _BASE + r"|addresses|convert\..+"),
  (r"artifacts", r"trees|files"),
  (r"checkpoint", _TOOLS),
  (r"html|model_card", r"files"),
  (r"train|reference|rundir|compare|assembly", _TOOLS + r"|checkpoint"),
  (r"export", _TOOLS + r"|checkpoint|model_card"),
  (r"pretrained", _TOOLS + r"|checkpoint|export"),
  (r"", r"pretrained|models\.layers"),
  (
    r"stages\..+",
    _TOOLS + r"|checkpoint|train|reference|compare|html|assembly",
  ),
  (r"recipe", _TOOLS + r"|checkpoint|rundir|train|stages\..+"),
  (
    r"main|dry_run|ship|checks",
    _TOOLS
    + r"|checkpoint|rundir|train|stages\..+|recipe|dry_run|checks|assembly",
  ),
)
# Where a package may be imported, by path; elsewhere it may not.
ONLY_IN = {
  "transformers": r"pivot_jax/(convert/hf|data/tokens)\.py|(tests|bench)/.+",
  "torch": r"(tests/parity|bench)/.+",
  "sklearn": r"(tests|bench)/.+",
  "simplejpeg": r"pivot_jax/data/decoders\.py|(tests|bench)/.+",
  "tensorflow": r"",
}


def imported(path: pathlib.Path) -> set[str]:
  """Returns the dotted names a file imports, at its top or in a function."""
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
  """Returns the module of pivot_jax that an imported name is or lies in."""
  name = name.removeprefix("pivot_jax").removeprefix(".")
  parent = name.rpartition(".")[0]
  in_file = ROOT / "pivot_jax" / f"{parent.replace('.', '/')}.py"
  return parent if parent and in_file.is_file() else name


def test_modules_import_only_what_comes_before_them():
  wrong = []
  for path in files("pivot_jax"):
    relative = path.relative_to(ROOT / "pivot_jax").with_suffix("")
    module = ".".join(relative.parts).removesuffix("__init__").strip(".")
    found = {n for n in imported(path) if n.split(".")[0] == "pivot_jax"}
    rules = [may for name, may in MAY_IMPORT if re.fullmatch(name, module)]
    if found and not rules:
      wrong.append(f"{module} has no place in MAY_IMPORT")
    wrong += [
      f"{module} imports {name}"
      for name in sorted(found)
      if rules and not re.fullmatch(f"errors|{rules[0]}", module_of(name))
    ]
  assert not wrong, wrong


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
    if name.split(".")[0] not in ("ml_collections", "configs")
  ]
  assert not wrong, wrong


def test_the_library_does_not_import_its_tests_or_configs():
  wrong = [
    f"{path.name} imports {name}"
    for path in files("pivot_jax")
    for name in imported(path)
    if name.split(".")[0] in ("tests", "configs", "bench")
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
  feed = "pivot_jax.data.pipeline"
  names = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in files("pivot_jax/data")
    if path.stem not in ("__init__", "__main__")
  ]
  names.remove(feed)
  found = loaded(names)
  assert set(names) <= found
  assert not found & (HEAVY | {feed, "pivot_jax.trees"})
  # `check` and its like read configs, and no source needs what those do.
  assert "yaml" not in loaded(["pivot_jax.data.registry"])
