"""A tiny multimodal model and random examples for tests of whole updates.

Images are 16 pixels in patches of 8, so that an image is four tokens. This file
draws and sizes; what a test expects is computed in the test.
"""

import functools

import jax
import numpy as np

from pivot_jax.data import packing
from pivot_jax.models import mllm, qwen2, vit
from tests.models import tiny as tiny_models

PATCHES = 4
VOCAB = 64

VISION = vit.VisionConfig(
  image_size=16,
  patch_size=8,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=2,
)
LLM = qwen2.LLMConfig(
  vocab_size=VOCAB,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  rope_theta=1e6,
  rms_norm_eps=1e-6,
  tie_word_embeddings=True,
)
MODEL = mllm.MLLM(llm=LLM, vision=VISION)


@functools.cache
def params():
  """Returns host parameters, large enough that attention attends."""
  drawn = mllm.init_params(MODEL, jax.random.PRNGKey(0))
  return jax.device_get(tiny_models.jitter(drawn, scale=4.0))


def example(rng, *, prompt, answers, image, name="row"):
  """Returns an example of `prompt` text tokens and answers of given lengths."""
  ids = rng.integers(0, VOCAB, prompt)
  flags = rng.random(prompt) < 0.3
  picture = ()
  if image:
    at = int(rng.integers(0, prompt + 1))
    ids = np.insert(ids, at, packing.IMAGE_TOKEN)
    flags = np.insert(flags, at, False)
    picture = (rng.integers(0, 256, (16, 16, 3)).astype(np.uint8),)
  # A log-probability of 1/V a token: margins stay where sigmoid is not flat.
  reference = None
  if len(answers) == 2:
    reference = tuple(
      float(-np.log(VOCAB) * n + rng.normal(0, 3)) for n in answers
    )
  return packing.Example(
    id=name,
    prompt=ids,
    prompt_targets=flags,
    answers=tuple(rng.integers(0, VOCAB, n) for n in answers),
    answer_targets=tuple(_flags(rng, n) for n in answers),
    images=picture,
    reference=reference,
  )


def _flags(rng, length):
  flags = rng.random(length) < 0.8
  flags[-1] = True
  return flags
