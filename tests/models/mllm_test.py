"""Placing images, masking branches, and the ways to compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pivot_jax.models import layers, mllm
from tests.fixtures import tiny_models


@pytest.fixture(scope="module")
def case():
  model = mllm.MLLM(tiny_models.LLM, tiny_models.VISION)
  params = mllm.init_params(model, jax.random.key(0))
  return model, tiny_models.jitter(params, scale=3.0)


def _row(tokens, segments, branches, positions):
  """A batch of one text row."""
  fields = (tokens, positions, segments, branches)
  tokens, positions, segments, branches = (
    jnp.asarray([x], jnp.int32) for x in fields
  )
  return tiny_models.Batch(
    tokens=tokens,
    positions=positions,
    segments=segments,
    branches=branches,
    image_index=jnp.full_like(tokens, -1),
    images=jnp.zeros((1, 0, 28, 28, 3), jnp.uint8),
  )


def _hidden(case, batch):
  model, params = case
  return np.asarray(tiny_models.hidden(model, params, batch))


def test_the_mask_reads_as_drawn():
  # prompt, two answers of two tokens, another example, padding
  segments = jnp.asarray([[1, 1, 1, 1, 1, 1, 2, 2, 0]])
  branches = jnp.asarray([[0, 0, 1, 1, 2, 2, 0, 1, 0]])
  drawn = """
    #........
    ##.......
    ###......
    ####.....
    ##..#....
    ##..##...
    ......#..
    ......##.
    .........
  """.split()
  got = mllm.attention_mask(segments, branches)[0]
  assert ["".join(".#"[int(x)] for x in row) for row in got] == drawn


def test_two_branches_equal_two_separate_sequences(case):
  prompt, one, two = [3, 9, 4, 11], [7, 8, 2], [5, 6]
  packed = _row(
    [*prompt, *one, *two, 0],
    [1] * 9 + [0],
    [0] * 4 + [1] * 3 + [2] * 2 + [0],
    [0, 1, 2, 3, 4, 5, 6, 4, 5, 0],
  )
  together = _hidden(case, packed)[0]
  first = _hidden(case, _row([*prompt, *one], [1] * 7, [0] * 7, range(7)))[0]
  second = _hidden(case, _row([*prompt, *two], [1] * 6, [0] * 6, range(6)))[0]
  np.testing.assert_allclose(together[:7], first, rtol=0, atol=5e-6)
  np.testing.assert_allclose(together[7:9], second[4:], rtol=0, atol=5e-6)


def test_a_token_changes_its_own_branch_and_no_other(case):
  row = ([3, 9, 7, 8, 5, 6, 4, 2], [1] * 6 + [2] * 2)
  rest = ([0, 0, 1, 1, 2, 2, 0, 0], [0, 1, 2, 3, 2, 3, 0, 1])
  before = _hidden(case, _row(*row, *rest))[0]
  row[0][2] = 10  # first token of branch 1
  after = _hidden(case, _row(*row, *rest))[0]
  same = np.abs(after - before).max(-1) == 0
  assert same.tolist() == [True, True, False, False, True, True, True, True]


def test_a_row_of_padding_stays_finite_with_its_gradient(case):
  model, params = case
  batch = tiny_models.prompts((12, 0), width=12, patches=9)

  def total(params):
    return (model.apply({"params": params}, batch) ** 2).sum()

  value, gradient = jax.jit(jax.value_and_grad(total))(params)
  assert np.isfinite(value)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_embeddings_hold_tokens_images_and_zeros_in_their_places(case):
  model, params = case
  batch = _row([4, -200, -200, 5, 0], [1] * 4 + [0], [0] * 5, range(5))
  batch = batch._replace(image_index=jnp.asarray([[-1, 2, 0, -1, -1]]))
  visual = jnp.arange(3.0)[None, :, None] + jnp.ones((1, 3, 40))
  got = model.apply({"params": params}, visual, batch, method="embed")[0]
  table = params["llm"]["embed_tokens"]["embedding"]
  expected = [table[4], visual[0, 2], visual[0, 0], table[5], 0 * table[0]]
  np.testing.assert_array_equal(got, jnp.stack(expected))


def test_each_row_reads_its_own_images(case):
  batch = tiny_models.prompts((12, 12), width=12, patches=9)
  together = _hidden(case, batch)
  alone = jax.tree.map(lambda x: x[1:], batch)
  np.testing.assert_allclose(
    together[1:], _hidden(case, alone), rtol=0, atol=5e-6
  )


@pytest.mark.parametrize(
  "compute",
  [
    layers.Compute(scan=False),
    layers.Compute(remat="full"),
    layers.Compute(scan=False, remat="full"),
  ],
  ids=str,
)
def test_how_it_is_computed_changes_neither_values_nor_gradients(case, compute):
  model, params = case
  batch = tiny_models.prompts((15, 11), width=15, patches=9)

  def run(model):
    def total(params):
      hidden = model.apply({"params": params}, batch)
      return (jnp.sin(hidden) * (batch.segments > 0)[..., None]).mean()

    return jax.jit(jax.value_and_grad(total))(params)

  (value, gradient), (other, others) = (
    run(model),
    run(model.clone(compute=compute)),
  )
  np.testing.assert_allclose(value, other, rtol=1e-5)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(gradient))
  assert largest > 1e-3
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * largest),
    gradient,
    others,
  )


def test_bfloat16_computes_near_float32_and_keeps_its_parameters(case):
  model, params = case
  batch = tiny_models.prompts((15, 11), width=15, patches=9)
  half = model.clone(compute=layers.Compute(dtype="bfloat16"))
  exact, rough = _hidden(case, batch), _hidden((half, params), batch)
  assert rough.dtype == jnp.bfloat16
  fresh = mllm.init_params(half, jax.random.key(0))
  assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
  valid = np.asarray(batch.segments) > 0
  error = (rough.astype("f4") - exact)[valid]
  assert 0 < np.sqrt((error**2).mean()) < 0.1 * np.sqrt((exact**2).mean())


def test_a_part_starts_alike_whatever_else_exists():
  rng = jax.random.key(3)
  whole = mllm.init_params(mllm.MLLM(tiny_models.LLM, tiny_models.VISION), rng)
  encoder = mllm.init_params(mllm.MLLM(None, tiny_models.VISION), rng)
  decoder = mllm.init_params(mllm.MLLM(tiny_models.LLM, None), rng)
  assert list(encoder) == ["vision"] and list(decoder) == ["llm"]
  jax.tree.map(
    np.testing.assert_array_equal, whole["vision"], encoder["vision"]
  )
  jax.tree.map(np.testing.assert_array_equal, whole["llm"], decoder["llm"])


def test_blocks_start_with_different_values():
  params = mllm.init_params(mllm.MLLM(tiny_models.LLM, None), jax.random.key(0))
  kernel = params["llm"]["layers"]["mlp"]["up_proj"]["kernel"]
  assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_the_head_is_the_embedding_if_tied_and_a_matrix_if_not(case):
  model, params = case
  np.testing.assert_array_equal(
    model.apply({"params": params}, method="head"),
    params["llm"]["embed_tokens"]["embedding"].T,
  )
  untied = mllm.MLLM(tiny_models.UNTIED, None)
  params = mllm.init_params(untied, jax.random.key(0))
  np.testing.assert_array_equal(
    untied.apply({"params": params}, method="head"),
    params["llm"]["lm_head"]["kernel"],
  )


def test_an_encoder_alone_returns_features():
  model = mllm.MLLM(None, tiny_models.VISION)
  params = mllm.init_params(model, jax.random.key(0))
  batch = tiny_models.prompts((9, 9), width=9, patches=9)
  assert model.apply({"params": params}, batch).shape == (2, 1, 9, 32)


def test_a_cache_shorter_than_the_prompt_is_refused(case):
  model, params = case
  batch = tiny_models.prompts((5,), width=5)
  with pytest.raises(ValueError, match="5 tokens do not fit 4"):
    model.apply(
      {"params": params},
      jnp.zeros((1, 5, 40)),
      batch,
      4,
      method="prefill",
    )
