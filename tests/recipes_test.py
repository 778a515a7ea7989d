"""Recipes by name and by file; what is wrong with one is a line."""

import pathlib

import pytest
from absl import flags

from pivot_jax import command_line, recipes
from pivot_jax.configs import common
from pivot_jax.errors import InputError

CONFIG = """
from pivot_jax.configs import common


def get_config(name="small"):
  c = common.ConfigDict(dict(name=name, part=dict(rate=0.1, names=("a",))))
  return c
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Return the folder that is worked in, which has a recipe."""
  monkeypatch.chdir(tmp_path)
  pathlib.Path("mine.py").write_text(CONFIG)
  return tmp_path


def read(recipe, *settings):
  """Return the config of a command line."""
  argv = ["command", f"--config={recipe}", *settings]
  values = flags.FlagValues()
  recipes.define("The recipe.", flag_values=values, argv=argv)
  assert command_line.read(argv, values) == []
  return values["config"].value


def test_a_recipe_is_found_by_name_and_by_file(folder):
  assert recipes.known() == ["pivot"]
  assert read("pivot:debug").stage2_dpo.steps == 4
  assert read("mine.py").name == "small"
  found = read("mine.py:other", "--config.part.rate=2", "-config.part.names=b")
  assert found.name == "other" and found.part.to_dict() == dict(
    rate=2.0, names=("b",)
  )
  assert read("mine.py", "--config.part={'rate': 3.0}").part.rate == 3.0


@pytest.mark.parametrize("text, found", [
  ("configs/pivot.py:files", True), ("configs/pivot.py", True),
  ("pivot", True), ("pivot:files", True), ("pivto:files", True),
  ("a.python/b.json", False), ("scenes:caption", False), ("rows", False),
  ("pivot.json", False), ("train.jsonl", False),
])  # fmt: skip
def test_a_word_of_data_check_is_a_recipe_or_data(folder, text, found):
  assert recipes.is_recipe(text) == found


def test_a_folder_of_a_recipe_s_name_is_data(folder):
  pathlib.Path("pivot").mkdir()
  assert not recipes.is_recipe("pivot")


@pytest.mark.parametrize("words, says", [
  (("pivto",), "pivto: no such recipe or file (did you mean 'pivot'?)"),
  (("pivto:debug",), "the package has pivot, your own is a file"),
  (("absent.py",), "absent.py: no such recipe or file"),
  (("common:x",), "common: is no recipe"),
  (("pivot:nonsense",), "no variant 'nonsense': choose one of debug, files"),
  (("mine.py", "--config.nosuch=1"), "--config.nosuch: the recipe has no 'nos"),
  (("mine.py", "--config.nosuch=1"), "it has name, part"),
  (("mine.py", "--config.part.rat=1"), "part has no 'rat' (did you mean 'rate'"),
  (("mine.py", "--noconfig.part.rat"), "part has no 'rat'"),
  (("mine.py", "--config.part.rate.x=1"), "part.rate is a float without fields"),
  (("mine.py", "--config.part=1"), "set a field of it, as --config.part.names="),
  (("mine.py", "--config.part.rate=x"), "--config.part.rate=x: could not"),
])  # fmt: skip
def test_a_wrong_spelling_is_a_line_that_says_what_there_is(
  folder, words, says
):
  with pytest.raises(InputError) as error:
    read(*words)
  said = str(error.value)
  assert says in said and "\n" not in said and said.count("'") % 2 == 0, said


@pytest.mark.parametrize("body, says", [
  ("raise ValueError('boom')", "mine.py:2: ValueError: boom"),
  ("open('gone')", "mine.py:2: FileNotFoundError: "),
  ("raise SystemExit(3)", "mine.py:2: SystemExit: 3"),
  ("return 3", "mine.py: get_config returned int, not a ConfigDict"),
  ("return nothing", "mine.py:2: NameError: name 'nothing'"),
  ("return (", "mine.py:2: SyntaxError: '(' was never closed"),
])  # fmt: skip
def test_a_recipe_that_fails_is_named_by_file_and_line(folder, body, says):
  pathlib.Path("mine.py").write_text(f"def get_config():\n  {body}\n")
  with pytest.raises(InputError) as error:
    read("mine.py")
  assert str(error.value).startswith(says)


@pytest.mark.parametrize("parameters, recipe, says", [
  ("", "mine.py:x", "takes no variant: give mine.py, without :x"),
  ("steps", "mine.py", "needs a variant: give mine.py:VARIANT"),
])  # fmt: skip
def test_a_variant_is_given_where_one_is_taken(
  folder, parameters, recipe, says
):
  text = f"def get_config({parameters}):\n  return 3\n"
  pathlib.Path("mine.py").write_text(text)
  with pytest.raises(InputError, match=says):
    read(recipe)


@pytest.mark.parametrize("kind", ["evaluat", "ok.py"])
def test_a_kind_of_stage_that_is_nobody_s_is_answered_with_the_kinds(kind):
  with pytest.raises(ValueError) as error:
    common.stage(kind)
  for part in (repr(kind), "train, score", "evaluate", '"my/file.py:function"'):
    assert part in str(error.value)
