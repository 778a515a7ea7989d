"""The rules that hold for every file of the tree (`tests/house.py` reads them)."""

import pytest

from tests import house


def test_no_docstring_begins_with_a_question_word():
  assert house.asking_docstrings(house.ROOT, *house.FOLDERS) == []


def test_every_parameter_of_a_public_function_has_a_type():
  assert house.untyped_parameters(house.ROOT, "pivot_jax") == []


def test_no_module_only_exports_names_of_others():
  assert house.exporting_modules(house.ROOT, *house.FOLDERS) == []


@pytest.mark.parametrize("name", ["pivot_jax", "configs", "bench"])
def test_no_function_is_longer_than_a_screen_and_a_half(name):
  long = [d for d in house.functions(house.ROOT, name) if house.length(d) > 60]
  assert not long, [f"{d}: {house.length(d)} lines" for d in long]


@pytest.fixture
def tree(tmp_path):
  """Return a function that writes a module of a small tree."""

  def write(text: str):
    folder = tmp_path / "pivot_jax"
    folder.mkdir(exist_ok=True)
    (folder / "one.py").write_text(text, encoding="utf-8")
    return tmp_path

  return write


@pytest.mark.parametrize("text", [
  '"""What is here."""', 'def f():\n  """Returns what is."""',
  'class A:\n  """Whether so."""',
])  # fmt: skip
def test_a_docstring_that_asks_is_found(tree, text):
  assert len(house.asking_docstrings(tree(text), "pivot_jax")) == 1


@pytest.mark.parametrize("text, found", [
  ("def f(a, b: int): ...", 1), ("def f(a: Any, *b, **c): ...", 3),
  ("class A:\n  def __init__(self, a): ...", 1), ("def _f(a): ...", 0),
  ("class _A:\n  def f(self, a): ...", 0), ("def f(a: 'Any | int'): ...", 0),
])  # fmt: skip
def test_open_parameters_are_found(tree, text, found):
  assert len(house.untyped_parameters(tree(text), "pivot_jax")) == found


def test_a_module_of_other_names_alone_is_found(tree):
  root = tree("from os import path\nimport sys\n\njoin = path.join\n")
  assert house.exporting_modules(root, "pivot_jax") == ["pivot_jax/one.py"]
  root = tree(
    "from os import path\n\n\ndef join(a: str): return path.join(a)\n"
  )
  assert house.exporting_modules(root, "pivot_jax") == []
