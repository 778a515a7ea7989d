"""docs/where.md: its answers and its reading path lead to what is there."""

import ast
import re

import pytest

from tests import house

TEXT = (house.ROOT / "docs" / "where.md").read_text("utf-8")
ANSWERS = dict(re.findall(r"^\| (\d+) \| `([^`]+)` \|$", TEXT, re.MULTILINE))
PATH = re.findall(r"^\d+\. `([^`]+)`", TEXT, re.MULTILINE)
LINES = 2500


def defined(path):
  """Return the names at the top of a file, and those of methods."""
  nodes = ast.parse((house.ROOT / path).read_text("utf-8")).body
  kinds = (ast.FunctionDef, ast.ClassDef)
  found = {node.name for node in nodes if isinstance(node, kinds)}
  for owner in (node for node in nodes if isinstance(node, ast.ClassDef)):
    inside = [x for x in owner.body if isinstance(x, ast.FunctionDef)]
    found |= {f"{owner.name}.{method.name}" for method in inside}
  return found


def test_every_question_has_an_answer():
  questions = TEXT.partition("\n## ")[0]
  numbers = re.findall(r"^(\d+)\. ", questions, re.MULTILINE)
  assert numbers == list(ANSWERS) == [str(i + 1) for i in range(20)]


@pytest.mark.parametrize("answer", ANSWERS.values())
def test_an_answer_names_a_file_and_what_stands_in_it(answer):
  path, _, name = answer.partition(":")
  assert name in defined(path)


def test_the_reading_path_is_eight_files_for_an_hour():
  texts = [(house.ROOT / path).read_text("utf-8") for path in PATH]
  assert len(set(PATH)) == len(PATH) == 8
  assert sum(text.count("\n") for text in texts) <= LINES
