"""Code of the user's own: what does not fit is a line that names it."""

import pathlib

import numpy as np
import pytest

from pivot_jax import metrics, names
from pivot_jax.configs import common, pivot
from pivot_jax.data import opener
from pivot_jax.errors import InputError
from pivot_jax.recipe import plan, preflight


@pytest.fixture
def own(tmp_path, monkeypatch):
  """Return fn(text) -> the name of what `f` a file of one's own holds."""
  monkeypatch.chdir(tmp_path)
  # Modules are kept by their place, which is the test's own.
  return lambda text: write(tmp_path / "own.py", text)


def write(path: pathlib.Path, text: str) -> str:
  path.write_text(text, encoding="utf-8")
  return f"{path}:f"


@pytest.mark.parametrize("text, says", [
  ("raise ValueError('no')", "own.py:1: ValueError: no"),
  ("import sys\nsys.exit('bye')", "own.py:2: SystemExit: bye"),
  ("def f(:", "own.py:1: SyntaxError"),
  ("import absent", "own.py:1: ModuleNotFoundError: No module named 'absent'"),
  ("f = 3", "f cannot be called"),
  ("g = print", "has no 'f'"),
])  # fmt: skip
def test_a_module_that_cannot_be_used_is_named_with_the_line(own, text, says):
  with pytest.raises(InputError) as error:
    names.named(own(text), {}, "a.kind")
  assert str(error.value).startswith("a.kind") and says in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["builtins:print", "sys:exit"])
def test_code_that_is_in_no_file_is_refused(name):
  with pytest.raises(
    InputError, match=f"a.kind: {name.split(':')[0]} is in no"
  ):
    names.named(name, {}, "a.kind")


@pytest.mark.parametrize("parameters, says", [
  ("", "too many positional"), ("config, inputs", "too many positional"),
  ("config, inputs, out, more", "missing a required argument: 'more'"),
])  # fmt: skip
def test_a_kind_of_stage_takes_what_it_is_called_with(
  own, tmp_path, parameters, says
):
  config = pivot.get_config()
  config.first = common.stage(own(f"def f({parameters}):\n  return {{}}\n"))
  config.order = ("first",)
  with pytest.raises(InputError, match=rf"first.kind='.*own.py:f': .*{says}"):
    plan.expand(config, tmp_path / "w")


@pytest.mark.parametrize("returned, says", [
  ("{'a': {'b': np.ones(3)}}", r"'a/b' is a ndarray of shape \(3,\)"),
  ("{'a': [1, object()]}", "'a' is a object; return numbers"),
  ("{'a': 1, 2: 3}", "the key 2 is no text"),
  ("{'a': {('x', 'y'): 3}}", r"the key \('x', 'y'\) in 'a' is no text"),
  ("None", "returned NoneType, not a mapping"),
])  # fmt: skip
def test_numbers_of_a_stage_that_are_no_json_are_named_by_key(
  own, tmp_path, returned, says
):
  text = (
    f"import numpy as np\ndef f(config, inputs, out):\n  return {returned}\n"
  )
  config = pivot.get_config()
  config.first = common.stage(own(text))
  config.order = ("first",)
  planned = plan.expand(config, tmp_path / "w")
  with pytest.raises(InputError, match=f"first.kind='.*own.py:f': {says}"):
    plan.run(planned, tmp_path / "w", config)


def test_numbers_of_a_stage_are_made_plain():
  found = metrics.numbers(
    {"a": np.float32(0.5), "b": (np.array(2), True, None), "c": {"d": "x"}}, ""
  )
  assert found == {"a": 0.5, "b": [2, True, None], "c": {"d": "x"}}


def test_what_a_stage_s_own_function_raises_keeps_its_traceback(own, tmp_path):
  config = pivot.get_config()
  config.first = common.stage(
    own("def f(config, inputs, out):\n  return 1 / 0")
  )
  config.order = ("first",)
  planned = plan.expand(config, tmp_path / "w")
  with pytest.raises(ZeroDivisionError):
    plan.run(planned, tmp_path / "w", config)


@pytest.mark.parametrize("text, says", [
  ("def f(count):\n  return None", "unexpected keyword argument 'size'|missing"),
  ("def f(size, more):\n  return None", "missing a required argument: 'more'"),
  ("def f(size):\n  return None", "returned NoneType, not a rows.Source"),
  ("def f(size):\n  return [{}]", "returned list, not a rows.Source"),
])  # fmt: skip
def test_a_source_that_is_none_is_named_by_its_kind(own, text, says):
  name = own(text)
  with pytest.raises(
    InputError, match=f"kind='.*own.py:f' of a source: .*{says}"
  ):
    opener.open_source(dict(kind=name, size=3))


def test_a_field_that_a_kind_of_source_does_not_take_is_named():
  spec = dict(kind="scenes", task="text", split="train", size=3, sice=4)
  with pytest.raises(InputError, match="kind='scenes' of a source: .*'sice'"):
    opener.open_source(spec)


@pytest.mark.parametrize("text, says", [
  ("def f(folder, step):\n  return None", "made a NoneType, which has no write"),
  ("class f:\n  def __init__(self, folder):\n    pass", "too many positional"),
  ("class f:\n  def __init__(self, folder, step):\n    pass\n"
   "  def write(self, step):\n    pass\n  def close(self):\n    pass",
   "its write: takes .*too many positional"),
])  # fmt: skip
def test_a_writer_that_is_none_is_named(own, tmp_path, text, says):
  with pytest.raises(InputError, match=f"writers='.*own.py:f': .*{says}"):
    metrics.Writer(tmp_path, step=0, writers=(own(text),))


def test_an_objective_that_is_a_source_is_refused_before_a_run(own, tmp_path):
  config = pivot.get_config("debug")
  config.stage1_proj.objective = own("def f(size):\n  return None\n")
  config.order = ("stage1_proj",)
  steps = plan.expand(config, tmp_path / "w").steps
  with pytest.raises(InputError, match=r"stage1_proj.objective='.*own.py:f'"):
    preflight.check(steps)
