"""A dry run counts what the run will hold and refuses what it will refuse."""

import pathlib
import re

import ml_collections
import pytest

from pivot_jax.configs import pivot
from pivot_jax.errors import InputError
from pivot_jax.recipe import plan, preflight


def describe(
  workdir: pathlib.Path, order: tuple[str, ...], **changed: object
) -> str:
  """Return what a dry run of these stages says, `a__b` being a.b."""
  config = pivot.get_config()
  config.order = order
  for key, value in changed.items():
    config.update_from_flattened_dict({key.replace("__", "."): value})
  return preflight.describe(plan.expand(config, workdir))


def megabytes(text: str) -> float:
  return float(re.search(r"([\d,.]+) MB of state", text)[1].replace(",", ""))


ONE = ("stage1_proj",)


def test_moments_in_half_the_bytes_are_counted_so(tmp_path):
  changed = dict(stage1_proj__trainable=(".*",))
  full = describe(tmp_path, ONE, **changed)
  training = int(re.search(r"([\d,]+) train;", full)[1].replace(",", ""))
  assert megabytes(full) == pytest.approx(16e-6 * training, abs=0.06)
  changed |= dict(stage1_proj__moments="bfloat16")
  half = describe(tmp_path, ONE, **changed)
  assert megabytes(half) == pytest.approx(12e-6 * training, abs=0.06)


def test_frozen_kernels_are_counted_in_the_dtype_of_the_products(tmp_path):
  full = megabytes(describe(tmp_path, ONE))
  half = megabytes(describe(tmp_path, ONE, compute__dtype="bfloat16"))
  assert 0.5 * full < half < 0.65 * full


@pytest.mark.parametrize("field", ["lr", "weight_decay"])
def test_a_rule_that_matches_nothing_is_an_error_as_in_the_run(tmp_path, field):
  rules = {f"stage1_proj__{field}": (("projektor/.*", 1e-3), (".*", 1e-4))}
  with pytest.raises(InputError, match=rf"stage1_proj.{field}.*projektor"):
    describe(tmp_path, ONE, **rules)


def test_a_parameter_without_a_rate_is_an_error_as_in_the_run(tmp_path):
  rules = dict(stage1_proj__lr=(("vision/.*", 1e-3),))
  with pytest.raises(InputError, match="no rule covers.*projector/"):
    describe(tmp_path, ONE, **rules)


def test_an_encoder_alone_can_be_detached(tmp_path):
  config = pivot.get_config()
  config.order = ("detach_dpo",)
  config.detach_dpo.inputs = ml_collections.ConfigDict(
    dict(vision="package:toy:vision")
  )
  assert "detach_dpo" in preflight.describe(plan.expand(config, tmp_path))
  config.detach_dpo.inputs = ml_collections.ConfigDict({})
  with pytest.raises(InputError, match="detach_dpo: .*init.*vision"):
    preflight.describe(plan.expand(config, tmp_path))
