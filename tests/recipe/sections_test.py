"""Arms and pairs that cannot be shown are refused while a config is planned."""

import pytest

from pivot_jax.configs import common, pivot
from pivot_jax.errors import InputError
from pivot_jax.recipe import plan
from pivot_jax.report import page

ARM = dict(name="x", model="stage2_dpo", label="mine", short="mine")


def expand(tmp_path, **changed):
  """Return the plan of the recipe with fields of it changed."""
  config = pivot.get_config()
  for name, value in changed.items():
    config[name] = value
  return plan.expand(config, tmp_path)


@pytest.mark.parametrize("label", ["majority answer", "question alone"])
def test_the_label_of_a_baseline_is_refused(label, tmp_path):
  found = {"majority": {"vqa/all": 1}, "blind": {"vqa/all": 1}}
  assert label in page._baselines(found)
  arms = (*pivot.ARMS, ARM | dict(label=label))
  with pytest.raises(InputError, match=f"'x' has the label '{label}'"):
    expand(tmp_path, arms=arms)


@pytest.mark.parametrize(
  ("arms", "says"),
  [
    ((("dpo", "x"),), r"arms: \('dpo', 'x'\) is none: give common.arm"),
    (("dpo",), "arms: 'dpo' is none: give common.arm"),
    ("dpo", "arms='dpo': give a tuple, as"),
    (dict(dpo="x"), "give a tuple, as .common.arm"),
    ((ARM | dict(label=5),), "label=5: give a text"),
    ((ARM | dict(short=None),), "short=None: give a text"),
    ((ARM | dict(name=""),), "name='': give a text"),
    ((ARM | dict(model=None),), "model=None: give a text"),
  ],
  ids=str,
)
def test_an_arm_that_is_none_is_refused(arms, says, tmp_path):
  config = pivot.get_config()
  del config.arms
  config.arms = arms
  with pytest.raises(InputError, match=says):
    plan.expand(config, tmp_path)


@pytest.mark.parametrize(
  ("pairs", "says"),
  [
    ((("dpo", "sft"),), "compared: .* is none: give common.pair"),
    ((dict(one="dpo", other=1, same_rows=True),), "other=1: give a text"),
    ((dict(one="dpo", other="sft", same_rows="no"),), "same_rows='no': give T"),
  ],
  ids=str,
)
def test_a_pair_that_is_none_is_refused(pairs, says, tmp_path):
  with pytest.raises(InputError, match=says):
    expand(tmp_path, compared=pairs)


def test_a_config_without_arms_has_none_to_measure(tmp_path):
  with pytest.raises(
    InputError, match="arm='original': the config has no arms"
  ):
    expand(tmp_path, arms=(), compared=())


def test_a_model_is_a_stage_or_an_address(tmp_path):
  def planned(model):
    return expand(tmp_path, arms=(*pivot.ARMS, ARM | dict(model=model)))

  for model in ("stage2_dop", "hf:gone", "mesh", str(tmp_path / "gone")):
    with pytest.raises(InputError, match=f"'x' has the model '{model}', which"):
      planned(model)
  for model in ("stage2_dpo", f"hf:{tmp_path}:vision", "hf:org/name"):
    assert planned(model).steps[-1].config.arms[-1]["model"] == model


def test_an_arm_whose_stage_is_skipped_stays(tmp_path):
  config = pivot.get_config("files")
  config.files.pretrain = "rows.json"
  planned = plan.expand(config, tmp_path)
  assert "stage2_dpo" in planned.left_out
  names = [arm["name"] for arm in planned.steps[-1].config.arms]
  assert names == [arm["name"] for arm in pivot.ARMS]


def test_an_arm_as_a_section_of_its_own_is_one(tmp_path):
  planned = expand(tmp_path, arms=(*pivot.ARMS, common.ConfigDict(ARM)))
  assert planned.steps[-1].config.arms[-1] == ARM
