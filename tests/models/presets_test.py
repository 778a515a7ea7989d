"""The full-size models, from their shapes alone."""

import jax
import numpy as np
import pytest

from configs import presets
from pivot_jax.models import mllm, qwen2, vit


def _count(vision, llm):
  model = mllm.MLLM(
    llm and qwen2.LLMConfig(**presets.LLM[llm]),
    vision and vit.VisionConfig(**presets.VISION[vision]),
  )
  shapes = jax.eval_shape(lambda: mllm.init_params(model, jax.random.key(0)))
  return {
    part: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
    for part, tree in shapes.items()
  }


# Totals of the published checkpoints.
@pytest.mark.parametrize(
  "name,total",
  [
    ("qwen2.5-0.5b", 494_032_768),
    ("qwen2.5-1.5b", 1_543_714_304),
    ("qwen2.5-3b", 3_085_938_688),
    ("qwen2.5-7b", 7_615_616_512),
  ],
)
def test_language_models_have_the_published_size(name, total):
  assert _count(None, name) == {"llm": total}


# Width D, MLP F, patch side p, patches P, and the blocks that are read: one
# less than published.
@pytest.mark.parametrize(
  "name,width,mlp,side,patches,blocks",
  [
    ("siglip2-b16-384", 768, 3072, 16, 576, 11),
    ("siglip2-l16-384", 1024, 4096, 16, 576, 23),
    ("siglip2-so400m16-384", 1152, 4304, 16, 576, 26),
    ("siglip2-gopt16-384", 1536, 6144, 16, 576, 39),
    ("siglip-so400m14-384", 1152, 4304, 14, 729, 26),
  ],
)
def test_encoders_have_the_size_of_their_formula(
  name, width, mlp, side, patches, blocks
):
  attention = 4 * (width * width + width)
  block = attention + 2 * width * mlp + mlp + width + 4 * width
  embeddings = side * side * 3 * width + width + patches * width
  assert _count(name, None) == {"vision": blocks * block + embeddings}
  config = vit.VisionConfig(**presets.VISION[name])
  assert (config.num_patches, config.used_layers) == (patches, blocks)


def test_the_paper_s_main_model_has_the_known_parts():
  parts = _count("siglip2-so400m16-384", "qwen2.5-1.5b")
  assert parts == {
    "vision": 397_776_544,
    "projector": 4_131_840,
    "llm": 1_543_714_304,
  }
