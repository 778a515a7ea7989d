"""The decoder against transformers' Qwen2ForCausalLM."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers

from pivot_jax.models import mllm
from pivot_jax.weights.convert import hf
from tests.fixtures import tiny_models
from tests.parity import foreign
from tests.weights.convert import folders

LENGTHS = (17, 11)


def _save(folder, tied):
  torch.manual_seed(0)
  config = transformers.Qwen2Config(**foreign.LLM, tie_word_embeddings=tied)
  model = foreign.roughen(transformers.Qwen2ForCausalLM(config), 2)
  model.save_pretrained(folder)
  return model


def _run_torch(model, batch):
  with torch.no_grad():
    result = model(
      input_ids=torch.tensor(np.asarray(batch.tokens)).long(),
      attention_mask=torch.tensor(np.asarray(batch.segments)),
      output_hidden_states=True,
    )
  return result.hidden_states[-1].numpy(), result.logits.numpy()


def _run_ours(config, params, batch):
  model = mllm.MLLM(config, None)

  @jax.jit
  def run(params, batch):
    hidden = model.apply({"params": params}, batch)
    return hidden, hidden @ model.apply({"params": params}, method="head")

  return jax.tree.map(np.asarray, run(params, batch))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  folder = tmp_path_factory.mktemp("qwen2")
  model = _save(folder, tied=True)
  batch = tiny_models.prompts(LENGTHS, width=17)
  hidden, logits = _run_torch(model, batch)
  return folder, batch, hidden, logits


def _valid(batch, x):
  return x[np.asarray(batch.segments) > 0]


def test_hidden_states_and_logits_agree(case):
  folder, batch, hidden, logits = case
  configs, params, info = folders.load(folder)
  ours, our_logits = _run_ours(configs["llm"], params, batch)
  assert "lm_head" not in params["llm"]
  assert info["not_carried"] == []
  assert (
    foreign.difference(_valid(batch, ours), _valid(batch, hidden))
    < foreign.TOLERANCE
  )
  assert (
    foreign.difference(_valid(batch, our_logits), _valid(batch, logits))
    < foreign.TOLERANCE
  )


def test_an_untied_head_agrees(tmp_path):
  model = _save(tmp_path, tied=False)
  batch = tiny_models.prompts(LENGTHS, width=17)
  _, logits = _run_torch(model, batch)
  configs, params, _ = folders.load(tmp_path)
  _, ours = _run_ours(configs["llm"], params, batch)
  assert (
    foreign.difference(_valid(batch, ours), _valid(batch, logits))
    < foreign.TOLERANCE
  )


def _miss(case, config, params):
  _, batch, hidden, _ = case
  ours, _ = _run_ours(config, params, batch)
  return foreign.difference(_valid(batch, ours), _valid(batch, hidden))


@pytest.mark.parametrize(
  "change", [{"rope_theta": 1e4}, {"rms_norm_eps": 1e-5}], ids=str
)
def test_a_wrong_number_misses_by_ten_tolerances(case, change):
  configs, params, _ = folders.load(case[0])
  config = dataclasses.replace(configs["llm"], **change)
  assert _miss(case, config, params) > foreign.MISS


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_dropped_bias_misses_by_ten_tolerances(case, name):
  configs, params, _ = folders.load(case[0])
  params["llm"]["layers"]["self_attn"][name]["bias"][:] = 0
  assert _miss(case, configs["llm"], params) > foreign.MISS


def test_tiled_instead_of_repeated_heads_miss_by_ten_tolerances(case):
  configs, params, _ = folders.load(case[0])
  config = configs["llm"]
  # Head a reads key head a // 3; exchanging query heads so that the one in
  # place a is head (a % 3) * 2 + a // 3 makes it read key head a % 2.
  heads, kv = config.num_attention_heads, config.num_key_value_heads
  order = np.arange(heads).reshape(-1, kv).T.reshape(-1)
  attention = params["llm"]["layers"]["self_attn"]
  split = (heads, config.head_dim)
  for leaf, axis in (("kernel", 2), ("bias", 1)):
    x = attention["q_proj"][leaf]
    y = x.reshape(*x.shape[:axis], *split).take(order, axis)
    attention["q_proj"][leaf] = y.reshape(x.shape)
  x = attention["o_proj"]["kernel"]
  y = x.reshape(x.shape[0], *split, x.shape[2]).take(order, 1)
  attention["o_proj"]["kernel"] = y.reshape(x.shape)
  assert _miss(case, config, params) > foreign.MISS


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_our_export_without_loss(tmp_path, tied):
  model = _save(tmp_path / "theirs", tied)
  configs, params, _ = folders.load(tmp_path / "theirs")
  hf.save_llm(tmp_path / "ours", configs["llm"], params["llm"])
  again = foreign.loaded_without_loss(
    transformers.Qwen2ForCausalLM, tmp_path / "ours"
  )
  batch = tiny_models.prompts(LENGTHS, width=17)
  np.testing.assert_array_equal(
    _run_torch(again, batch)[1], _run_torch(model, batch)[1]
  )
