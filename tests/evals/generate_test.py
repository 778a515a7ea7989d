"""Generation against the forward pass without a cache."""

import jax
import numpy as np
import pytest

from pivot_jax.evals import generate
from pivot_jax.models import layers, mllm
from tests.fixtures import tiny_models

LENGTHS = (12, 10, 15)
STEPS = 6


@pytest.fixture(scope="module")
def case():
  model = mllm.MLLM(tiny_models.UNTIED, tiny_models.VISION)
  params = tiny_models.jitter(
    mllm.init_params(model, jax.random.key(0)), scale=3.0
  )
  batch = tiny_models.prompts(LENGTHS, width=24, patches=9)
  return model, params, batch, tiny_models.uncached(model, params, batch, STEPS)


def _cut(batch, width):
  return type(batch)(*(x[:, :width] for x in batch[:-1]), batch.images)


def test_cached_tokens_are_the_argmax_of_the_uncached_forward(case):
  model, params, batch, expected = case
  got = tiny_models.generated(
    model, params, _cut(batch, 15), max_new_tokens=STEPS, eos_ids=(60,)
  )
  assert len(np.unique(expected)) > 3  # not one token for ever
  np.testing.assert_array_equal(got, expected)


def test_unrolled_blocks_generate_the_same(case):
  model, params, batch, expected = case
  model = model.clone(compute=layers.Compute(scan=False))
  got = tiny_models.generated(
    model, params, _cut(batch, 15), max_new_tokens=STEPS, eos_ids=(60,)
  )
  np.testing.assert_array_equal(got, expected)


def test_an_answer_ends_at_any_eos_and_is_padded_with_the_first(case):
  model, params, batch, expected = case
  end = int(expected[0, 2])
  got = tiny_models.generated(
    model, params, _cut(batch, 15), max_new_tokens=STEPS, eos_ids=(60, end)
  )
  for row, full in zip(got, expected, strict=True):
    hits = np.flatnonzero(full == end)
    length = hits[0] + 1 if len(hits) else STEPS
    np.testing.assert_array_equal(row[:length], full[:length])
    assert (row[length:] == 60).all()
  assert (got[0, 3:] == 60).all()


def test_more_padding_behind_the_prompt_changes_nothing(case):
  model, params, batch, expected = case
  got = tiny_models.generated(
    model, params, batch, max_new_tokens=STEPS, eos_ids=(60,)
  )
  np.testing.assert_array_equal(got, expected)


def test_a_row_without_a_prompt_gives_only_eos(case):
  model, params, batch, expected = case
  batch = _cut(batch, 15)._replace(segments=batch.segments[:, :15].at[1].set(0))
  got = tiny_models.generated(
    model, params, batch, max_new_tokens=STEPS, eos_ids=(60,)
  )
  assert (got[1] == 60).all()
  np.testing.assert_array_equal(got[[0, 2]], expected[[0, 2]])


def test_one_token_needs_no_loop_and_text_needs_no_image():
  model = mllm.MLLM(tiny_models.LLM, None)
  params = mllm.init_params(model, jax.random.key(0))
  batch = tiny_models.prompts((3, 5), width=8)
  got = tiny_models.generated(
    model, params, _cut(batch, 5), max_new_tokens=1, eos_ids=(0,)
  )
  np.testing.assert_array_equal(
    got, tiny_models.uncached(model, params, batch, 1)
  )


def test_no_end_token_is_refused(case):
  model, params, batch, _ = case
  with pytest.raises(ValueError, match="eos"):
    generate.generate(model, params, batch, max_new_tokens=1, eos_ids=())
