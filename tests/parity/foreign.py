"""Tiny random torch models, saved as transformers saves them.

Biases and norms carry noise, since fresh ones (zero, one) hide a lost or a
swapped tensor; matrices are scaled up, since small ones hide a wrong theta or
activation. Image embeddings are kept small, since LayerNorm's epsilon shows
only against a small variance.
"""

import jax
import numpy as np
import torch
import transformers

from pivot_jax.convert import names, tensors
from pivot_jax.models import mllm

TOLERANCE = 5e-6  # float32, absolute, outputs of order one
MISS = 10 * TOLERANCE  # what a wrong model must differ by at least
VISION = dict(
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  image_size=28,
  patch_size=8,
)
LLM = dict(
  vocab_size=61,
  hidden_size=48,
  intermediate_size=56,
  num_hidden_layers=3,
  num_attention_heads=6,
  num_key_value_heads=2,
  max_position_embeddings=64,
  rope_parameters=dict(rope_type="default", rope_theta=1e6),
)


def roughen(model, seed):
  """Puts noise on the vectors and scales the matrices, in place."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, x in model.named_parameters():
      noise = torch.randn(x.shape, generator=generator)
      if "embeddings." in name:
        x.copy_(0.03 * noise if x.ndim > 1 else 0.01 * noise)
      elif x.ndim == 1:
        x.add_(0.1 * noise)
      elif "embed_tokens" in name or "lm_head" in name:
        x.copy_(0.12 * noise)
      else:
        x.copy_(noise * x.shape[1] ** -0.5)
  return model.eval()


def pixels(images):
  """Pixel values as SiglipImageProcessor makes them from uint8 [N, H, W, 3]."""
  scaled = torch.tensor(np.asarray(images)).float() / 255
  return ((scaled - 0.5) / 0.5).permute(0, 3, 1, 2)


def images(count, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, 28, 28, 3)).astype(np.uint8)


def whole_vision(folder, config):
  """Our params of a vision folder under another config of the same model."""
  stored = tensors.contents(folder)
  shapes = jax.eval_shape(
    lambda: mllm.init_params(mllm.MLLM(None, config), jax.random.key(0))
  )

  def read(group):
    keys = [name.removeprefix("vision.") for name in group]
    found = tensors.read(stored, keys)
    return dict(zip(group, found.values(), strict=True))

  return names.from_foreign(shapes, read)


def loaded_without_loss(cls, folder):
  """The transformers model of a folder; fails on missing or unread tensors."""
  model, report = cls.from_pretrained(folder, output_loading_info=True)
  assert not any(report.values()), report
  return model.eval()


def difference(a, b):
  return float(np.abs(np.asarray(a) - np.asarray(b)).max())


transformers.logging.set_verbosity_error()
