"""The formula for an update's arithmetic beside what XLA compiles."""

import jax
import numpy as np
import pytest

from pivot_jax import trees
from pivot_jax.data import packing
from pivot_jax.models import layers, mllm, qwen2, vit
from pivot_jax.training import cost, objectives

# Two layers each, unrolled: XLA counts the body of a loop once. Wide enough that
# products outweigh norms and softmax.
VISION = vit.VisionConfig(
  image_size=64,
  patch_size=16,
  hidden_size=128,
  intermediate_size=512,
  num_hidden_layers=3,
  num_attention_heads=4,
)
LLM = qwen2.LLMConfig(
  vocab_size=1024,
  hidden_size=128,
  intermediate_size=512,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=32,
  rope_theta=1e6,
  rms_norm_eps=1e-6,
  tie_word_embeddings=True,
)
MODEL = mllm.MLLM(LLM, VISION, layers.Compute(scan=False))
PATCHES = 16


def _batch():
  rng = np.random.default_rng(0)
  examples = [
    packing.Example(
      id=str(i),
      prompt=np.r_[packing.IMAGE_TOKEN, rng.integers(0, 1000, 47)],
      prompt_targets=np.zeros(48, bool),
      answers=(rng.integers(0, 1000, 32),) * 2,
      answer_targets=(np.ones(32, bool),) * 2,
      images=(np.zeros((64, 64, 3), np.uint8),),
      reference=(0.0, 0.0),
    )
    for i in range(4)
  ]
  layout = packing.layout_for([examples], patches=PATCHES, image_size=64)
  return packing.pack(examples, layout)


def _shapes():
  return jax.eval_shape(
    lambda key: mllm.init_params(MODEL, key), jax.random.PRNGKey(0)
  )


def _computed(batch):
  """Return the work that a program of this batch's shapes does, padding too."""
  rows, tokens = batch.tokens.shape
  return packing.Work(
    images=rows,
    tokens=rows * tokens,
    pairs=rows * tokens**2,
    targets=batch.loss_target.size,
  )


@pytest.mark.parametrize(
  "trainable",
  [
    (".*",),
    ("projector/.*",),
    ("projector/.*", "llm/.*"),
    ("llm/norm/.*",),
  ],
  ids=str,
)
def test_the_formula_is_what_xla_compiles(trainable):
  batch = _batch()
  inside, outside = trees.split(_shapes(), trainable)

  def loss(inside, outside, batch):
    params = trees.merge(inside, outside)
    return objectives.dpo(MODEL, beta=0.1)(params, batch, None)

  grad_fn = jax.jit(jax.value_and_grad(loss, has_aux=True))
  compiled = grad_fn.lower(inside, outside, batch).compile()
  counted = compiled.cost_analysis()["flops"]
  parts = cost.flops_of_update(
    MODEL, list(trees.flatten(inside)), _computed(batch)
  )
  assert sum(parts.values()) == pytest.approx(counted, rel=0.05)


def test_a_frozen_part_costs_its_forward_pass_alone():
  paths = list(trees.flatten(_shapes()))
  done = _computed(_batch())
  projector = [path for path in paths if path.startswith("projector/")]
  every, frozen = (
    cost.flops_of_update(MODEL, p, done) for p in (paths, projector)
  )
  # Pixels need no gradient; everything else is done three times if it trains.
  patch = 2 * 4 * PATCHES * (16 * 16 * 3) * 128
  assert every["vision"] == 3 * frozen["vision"] - patch
  # The LLM and the head pass gradients on, without any for their weights.
  kernels = 2 * done.tokens * 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 512)
  assert every["llm"] - frozen["llm"] == kernels
  assert every["head"] == 3 * (2 * done.targets * 128 * 1024)
  assert frozen["head"] == 2 * (2 * done.targets * 128 * 1024)


def test_work_leaves_padding_out_and_counts_a_prompt_once():
  batch = _batch()
  counted = packing.count_work(batch, PATCHES)
  prompt, answer = 47 + PATCHES, 32
  assert counted == packing.Work(
    images=4,
    tokens=4 * (prompt + 2 * answer),
    pairs=4
    * (
      prompt * (prompt + 1) // 2
      + 2 * (answer * prompt + answer * (answer + 1) // 2)
    ),
    targets=4 * 2 * answer,
  )
  assert counted.times(3).tokens == 3 * counted.tokens


def test_the_peak_of_a_device_is_looked_up_by_its_kind():
  assert cost.peak_flops("NVIDIA H200", 2) == 2 * 989e12
  assert cost.peak_flops("NVIDIA H100 PCIe", 1) == 756e12
  assert cost.peak_flops("NVIDIA L40", 1) == 181e12
  assert cost.peak_flops("NVIDIA L4", 1) == 121e12
  assert cost.peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 1) is None
  assert cost.peak_flops("TPU v5 lite", 4) == 4 * 197e12
  assert cost.peak_flops("cpu", 1) is None
