"""The decoder's own choices; its numbers are proven in tests/parity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pivot_jax import trees
from pivot_jax.models import layers, mllm, qwen2
from tests.fixtures import tiny_models


@pytest.mark.parametrize(
  "field,said", [("num_key_value_heads", "4"), ("head_dim", "odd")]
)
def test_impossible_heads_are_refused(field, said):
  value = {"num_key_value_heads": 4, "head_dim": 7}[field]
  with pytest.raises(ValueError, match=said):
    dataclasses.replace(tiny_models.LLM, **{field: value})


def test_every_fresh_matrix_has_the_spread_that_the_config_names():
  config = dataclasses.replace(tiny_models.UNTIED, initializer_range=0.3)
  model = mllm.MLLM(config, None)
  params = mllm.init_params(model, jax.random.key(0))["llm"]
  drawn = {
    path: float(jnp.std(leaf))
    for path, leaf in trees.flatten(params).items()
    if path.endswith(("kernel", "embedding"))
  }
  assert len(drawn) == 9
  # The smallest has 640 entries a block: 4 standard errors are 12 %.
  assert all(abs(spread / 0.3 - 1) < 0.12 for spread in drawn.values()), drawn


@pytest.mark.parametrize("scan", [True, False])
def test_decoding_in_pieces_gives_the_hidden_states_of_one_pass(scan):
  model = mllm.MLLM(tiny_models.LLM, None, layers.Compute(scan=scan))
  params = tiny_models.jitter(
    mllm.init_params(model, jax.random.key(0)), scale=3.0
  )
  decoder = qwen2.Qwen2(tiny_models.LLM, model.compute)
  x = jax.random.normal(jax.random.key(1), (2, 7, 40))
  places = jnp.broadcast_to(jnp.arange(7), (2, 7))
  mask = jnp.broadcast_to(jnp.tril(jnp.ones((7, 7), bool)), (2, 7, 7))
  llm = {"params": params["llm"]}
  whole = jax.jit(decoder.apply)(llm, x, positions=places, visible=mask)
  cache = decoder.apply(llm, 2, 7, method="empty_cache")
  extend = jax.jit(functools.partial(decoder.apply, method="extend"))
  pieces = []
  for start, end in ((0, 4), (4, 5), (5, 7)):
    hidden, cache = extend(
      llm,
      x[:, start:end],
      positions=places[:, start:end],
      mask=mask[:, start:end],
      index=jnp.int32(start),
      cache=cache,
    )
    pieces.append(hidden)
  np.testing.assert_allclose(
    jnp.concatenate(pieces, 1), whole, rtol=0, atol=5e-6
  )


def test_an_id_outside_the_vocabulary_is_not_read_silently():
  model = mllm.MLLM(tiny_models.LLM, None)
  params = mllm.init_params(model, jax.random.key(0))
  batch = tiny_models.prompts((3,), width=3)
  batch = batch._replace(tokens=batch.tokens.at[0, 1].set(61))
  hidden = tiny_models.hidden(model, params, batch)
  assert np.isnan(hidden[0, 1]).all()
