"""The page of moved names is true, and names are found as it is told."""

import re

import pytest

from tests import moved

TODAY = moved.read(moved.ROOT)
PAGE = moved.PAGE.read_text("utf-8")
ROWS = [
  [cell.strip() for cell in line.strip("|").split("|")]
  for line in PAGE.splitlines()
  if re.match(r"\| (pivot_jax|bench|configs)\b", line)
]
PATHS = {path: module for module, path in TODAY.paths.items()}


def places(cell):
  return [one.partition(":")[::2] for one in re.findall(r"`([^`]+)`", cell)]


def test_the_page_has_a_place_or_a_reason_for_everything():
  assert len(ROWS) > 100
  wrong = [
    row[0] for row in ROWS if not places(row[1]) and len(row[1].split()) < 2
  ]
  assert wrong == []


def test_every_new_place_of_the_page_is_there():
  wrong = []
  for was, now, *along in ROWS:
    for path, name in places(now):
      names = [x for x in ", ".join([name, *along]).split(", ") if x]
      there = TODAY.modules.get(PATHS.get(path, ""))
      wrong += [
        f"{was}: {path}:{x}"
        for x in names or [""]
        if there is None or (x and x.split(".")[0] not in there)
      ]
  assert wrong == []


def write(root, files):
  for path, text in files.items():
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
  return moved.read(root)


@pytest.fixture
def trees(tmp_path):
  """Return a tree and what became of it."""
  old = {
    "pivot_jax/a.py": "def stays(): ...\nclass Goes: ...\nONE = 1\n_own = 2\n",
    "pivot_jax/b.py": "def joins(): ...\ndef renamed(): ...\n",
    "pivot_jax/c.py": "def same(): ...\ndef leaves(): ...\ndef ends(): ...\n",
    "bench/x.py": "def leaves(): ...\n",
  }
  new = {
    "pivot_jax/a.py": "def stays(): ...\nONE = 1\n",
    "pivot_jax/deep/ab.py": "class Goes: ...\ndef joins(): ...\ndef now(): ...",
    "pivot_jax/deep/c.py": "def same(): ...\n",
    "bench/x.py": "",
  }
  return write(tmp_path / "old", old), write(tmp_path / "new", new)


def test_names_are_found_by_table_module_and_being_the_only_one(trees):
  known = moved.table(
    [
      "# a remark -> of no meaning",
      "b.renamed -> pivot_jax.deep.gone_again",
      "deep.gone_again -> deep.ab.now  (a remark)",
      "`pivot_jax.c` -> `pivot_jax.deep.c`",
      "pivot_jax.c.ends, other -> nobody called it",
      "pivot_jax.a.stays -> pivot_jax.never.there",
    ]
  )
  old, new = trees
  found = dict(moved.find(old, new, known))
  assert found == {
    "pivot_jax.a": "pivot_jax.a",
    "pivot_jax.a.stays": "pivot_jax.a.stays",
    "pivot_jax.a.ONE": "pivot_jax.a.ONE",
    "pivot_jax.a.Goes": "pivot_jax.deep.ab.Goes",
    "pivot_jax.b": "pivot_jax.deep.ab",
    "pivot_jax.b.joins": "pivot_jax.deep.ab.joins",
    "pivot_jax.b.renamed": "pivot_jax.deep.ab.now",
    "pivot_jax.c": "pivot_jax.deep.c",
    "pivot_jax.c.same": "pivot_jax.deep.c.same",
    "pivot_jax.c.ends": "nobody called it",
    "pivot_jax.c.leaves": "",
    "bench.x": "bench.x",
    "bench.x.leaves": "",
  }


def test_names_side_by_side_have_a_place_each_or_one_reason():
  known = moved.table(
    ["a.x, y -> b.p, q", "a.z, w -> b.r", "a.u, v -> dead, as said, by none"]
  )
  assert known == {
    "pivot_jax.a.x": "pivot_jax.b.p",
    "pivot_jax.a.y": "pivot_jax.b.q",
    "pivot_jax.a.z": "pivot_jax.b.r",
    "pivot_jax.a.w": "pivot_jax.b.r",
    "pivot_jax.a.u": "dead, as said, by none",
    "pivot_jax.a.v": "dead, as said, by none",
  }


def test_the_page_lists_what_moved_and_nothing_that_stayed(trees):
  old, new = trees
  known = {
    "pivot_jax.c": "pivot_jax.deep.c",
    "bench.x.leaves": "nobody used it",
  }
  text = moved.page(old, new, moved.find(old, new, known))
  assert "| pivot_jax.c | `pivot_jax/deep/c.py` | same |" in text
  assert "| pivot_jax.b | `pivot_jax/deep/ab.py` | joins |" in text
  assert "| pivot_jax.a.Goes | `pivot_jax/deep/ab.py:Goes` |" in text
  assert "| bench.x.leaves | nobody used it |" in text
  assert "stays" not in text and "| bench.x |" not in text
