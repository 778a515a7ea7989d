"""Weights that no stage makes are opened before the first stage runs."""

import collections
import shutil

import pytest

from pivot_jax.configs import common, pivot
from pivot_jax.errors import InputError
from pivot_jax.recipe import given_weights, plan, preflight
from pivot_jax.recipe.inputs import Step
from pivot_jax.weights import checkpoint

FULL = ("score", "gradcam", "evaluate")
ALL = (*FULL, "detach", "linear_probe", "segment_probe")


def one(kind, tmp_path, **inputs):
  """Return the steps of a run of a single stage."""
  config = common.ConfigDict(dict(tokenizer="package:toy"))
  return [Step("mine", kind, config, inputs, tmp_path / "mine")]


def with_arm(address, tmp_path):
  """Return the steps of the recipe with an arm that is measured alone."""
  config = pivot.get_config("debug")
  arm = common.arm("theirs", model=address, label="theirs")
  pivot.add_arm(config, arm)
  return plan.expand(config, tmp_path / "w").steps


@pytest.mark.parametrize("kind", ALL)
def test_an_address_of_nothing_is_named_with_its_stage(kind, tmp_path):
  with pytest.raises(InputError, match="^mine: hf:gone: .*no such folder"):
    given_weights.check(one(kind, tmp_path, init="hf:gone"))


@pytest.mark.parametrize("kind", ALL)
def test_a_whole_model_is_what_every_kind_needs(kind, theirs, tmp_path):
  given_weights.check(one(kind, tmp_path, init=f"hf:{theirs}"))


@pytest.mark.parametrize("kind", ALL)
def test_an_encoder_alone_is_refused_where_more_is_needed(
  kind, theirs, tmp_path
):
  address = f"hf:{theirs}:vision"
  steps = one(kind, tmp_path, init=address)
  if kind not in FULL:
    given_weights.check(steps)
    return
  with pytest.raises(InputError, match=f"mine: {address}: .*'projector'"):
    given_weights.check(steps)


@pytest.mark.parametrize("kind", ["detach", "linear_probe", "segment_probe"])
def test_a_language_model_alone_has_nothing_to_probe(kind, theirs, tmp_path):
  with pytest.raises(InputError, match="mine: .*:llm: holds no 'vision'"):
    given_weights.check(one(kind, tmp_path, init=f"hf:{theirs}:llm"))


def test_a_model_without_its_tokenizer_is_refused(theirs, tmp_path):
  folder = tmp_path / "llava"
  shutil.copytree(theirs, folder)
  for name in ("tokenizer.json", "tokenizer_config.json"):
    (folder / name).unlink()
  with pytest.raises(InputError, match=f"mine: hf:{folder}: .*no tokenizer"):
    given_weights.check(one("evaluate", tmp_path, init=f"hf:{folder}"))
  given_weights.check(one("linear_probe", tmp_path, init=f"hf:{folder}"))


def test_a_stage_without_its_model_is_refused(tmp_path):
  with pytest.raises(InputError, match="mine: has no init in inputs"):
    given_weights.check(one("gradcam", tmp_path))
  with pytest.raises(InputError, match="mine: has neither init nor vision"):
    given_weights.check(one("detach", tmp_path))


def test_a_training_is_given_the_parts_that_it_takes(theirs, tmp_path):
  (step,) = one("train", tmp_path, init=f"hf:{theirs}:vision")
  step.config.update(dict(resample="bicubic", parts=("vision", "projector")))
  with pytest.raises(InputError, match="mine: .*:vision: holds no 'projector'"):
    given_weights.check([step])
  step.config.parts = ("vision",)
  given_weights.check([step])


def test_log_probabilities_that_are_not_there_are_refused(tmp_path):
  given = dict(init="package:toy/stage1", reference="gone")
  (step,) = one("train", tmp_path, **given)
  step.config.update(dict(resample="bicubic", parts=checkpoint.PARTS))
  with pytest.raises(InputError, match="mine: gone/reference.json: not found"):
    given_weights.check([step])


def test_an_arm_that_is_measured_alone_is_looked_at_first(theirs, tmp_path):
  preflight.check(with_arm(f"hf:{theirs}", tmp_path))
  address = f"hf:{theirs}:vision"
  with pytest.raises(InputError, match=f"gradcam_theirs: {address}: holds no"):
    preflight.check(with_arm(address, tmp_path))
  with pytest.raises(InputError, match="detach_theirs: .*has no model.json"):
    preflight.check(with_arm(str(tmp_path), tmp_path))


def test_an_address_is_opened_once_and_of_a_stage_never(
  theirs, tmp_path, monkeypatch
):
  opened = collections.Counter()

  def count(address, **how):
    opened[address] += 1
    return load(address, **how)

  load = checkpoint.load
  monkeypatch.setattr(checkpoint, "load", count)
  given_weights.check(with_arm(f"hf:{theirs}", tmp_path))
  assert opened[f"hf:{theirs}"] == 1 and set(opened.values()) == {1}
  assert not [address for address in opened if str(tmp_path / "w") in address]
