"""The package knows no arm, no stage and no toy: configs name them."""

import ast
import re

import pytest

from pivot_jax.configs import pivot
from pivot_jax.recipe import plan
from pivot_jax.training import objectives
from tests.fixtures import programs

PACKAGE = programs.ROOT / "pivot_jax"
# The embedded data, and the weights that were made of it.
TOY = ("data/scenes/", "recipe/shipped.py")
# Where objectives and the losses of gradient maps are named, as some arms are.
OBJECTIVES = (
  *("training/objectives.py", "evals/gradients.py", "report/page.py"),
  "data/sources/mmpr_selection.py",
)
VARIANTS = ("", "debug", "from_scratch", "sweep", "files")


def forbidden():
  """Return the names of all recipes' arms and stages, but those of kinds."""
  configs = [pivot.get_config(name) for name in VARIANTS]
  names = {name for c in configs for name in c.order}
  names |= {arm["name"] for c in configs for arm in c.arms}
  ends = tuple(f"_{arm['name']}" for c in configs for arm in c.arms)
  names |= {x[: -len(end)] for x in names for end in ends if x.endswith(end)}
  # What a score stage writes is a reference wherever it is named.
  return names - set(plan.KINDS) - {"reference"}


def literals(path):
  """Return the (line, text) of strings of a file that are no docstrings."""
  tree = ast.parse(path.read_text("utf-8"))
  docs = {
    id(node.body[0].value)
    for node in ast.walk(tree)
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    and node.body
    and isinstance(node.body[0], ast.Expr)
  }
  return [
    (node.lineno, node.value)
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant)
    and isinstance(node.value, str)
    and id(node) not in docs
  ]


def wrong(text, names, allowed):
  if text in allowed:
    return False
  toy = re.search(r"\btoy\b|stage\d", text)
  return bool(toy) or text.strip("_") in names


def test_no_arm_stage_or_toy_is_a_literal_of_the_package():
  names, found = forbidden(), []
  assert {"dpo", "stage2_dpo", "linear_probe_stage1"} <= names
  for path in sorted(PACKAGE.rglob("*.py")):
    place = path.relative_to(PACKAGE).as_posix()
    if place.startswith(TOY):
      continue
    allowed = set(objectives.TABLE) if place in OBJECTIVES else set()
    found += [
      f"{place}:{line}: {text!r}"
      for line, text in literals(path)
      if wrong(text, names, allowed)
    ]
  assert not found, "\n".join(found)


@pytest.mark.parametrize(
  ("code", "bad"),
  [
    ('x = "dpo"', True),
    ('x = f"stage2_{y}"', True),
    ('x = "package:toy:llm"', True),
    ('x = f"evaluate_pivot_{y}"', True),
    ('x = {"vqa": "pivot_full"}', True),
    ('def f():\n  """Return stage1_full of the toy."""', False),
    ('x = "losses/total"', False),
  ],
)
def test_the_rule_sees_what_it_should(code, bad, tmp_path):
  path = tmp_path / "a.py"
  path.write_text(code, encoding="utf-8")
  names = forbidden()
  assert any(wrong(text, names, ()) for _, text in literals(path)) == bad
