"""Tiny configurations, batches and parameters for the tests of the models."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pivot_jax.evals import generate as generation
from pivot_jax.models import qwen2, vit

VISION = vit.VisionConfig(
  image_size=28,
  patch_size=8,  # a grid of 3: four pixels of each side are cut
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
)
LLM = qwen2.LLMConfig(
  vocab_size=61,
  hidden_size=40,
  intermediate_size=56,
  num_hidden_layers=2,
  num_attention_heads=6,
  num_key_value_heads=2,
  head_dim=8,
  rope_theta=1e6,
  rms_norm_eps=1e-6,
  tie_word_embeddings=True,
)
UNTIED = dataclasses.replace(LLM, tie_word_embeddings=False)


class Batch(NamedTuple):
  """The fields of `packing.Batch` that the models read."""

  tokens: jax.Array
  positions: jax.Array
  segments: jax.Array
  branches: jax.Array
  image_index: jax.Array
  images: jax.Array


def prompts(lengths, *, width, patches=0, vocab=61, image_size=28, seed=0):
  """One prompt a row, right padded; its first `patches` tokens an image."""
  rng = np.random.default_rng(seed)
  rows = len(lengths)
  place = np.arange(width)[None].repeat(rows, 0)
  valid = place < np.asarray(lengths)[:, None]
  image = np.where(valid & (place < patches), place, -1)
  count = 1 if patches else 0
  return Batch(
    tokens=jnp.asarray(
      np.where(valid, rng.integers(0, vocab, (rows, width)), 0), jnp.int32
    ),
    positions=jnp.asarray(np.where(valid, place, 0), jnp.int32),
    segments=jnp.asarray(valid, jnp.int32),
    branches=jnp.zeros((rows, width), jnp.int32),
    image_index=jnp.asarray(image, jnp.int32),
    images=jnp.asarray(
      rng.integers(0, 256, (rows, count, image_size, image_size, 3)), jnp.uint8
    ),
  )


def jitter(params, seed=0, *, scale=1.0):
  """Params with noise on every bias and norm, and matrices times `scale`.

  Fresh biases are zero and norms one, which would hide a lost or swapped one.
  """
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    if path[-1].key in ("bias", "scale"):
      return x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    return x * scale

  return jax.tree_util.tree_map_with_path(leaf, params)


@functools.partial(jax.jit, static_argnums=0)
def hidden(model, params, batch):
  """The hidden states of a batch; one jit, so that equal shapes compile once."""
  return model.apply({"params": params}, batch)


def uncached(model, params, batch, steps):
  """Greedy tokens by running the whole forward pass again for each one."""
  head = np.asarray(model.apply({"params": params}, method="head"))
  lengths = np.asarray((batch.segments > 0).sum(1))
  rows = np.arange(len(lengths))
  found = []
  for _ in range(steps):
    last = np.asarray(hidden(model, params, batch))[rows, lengths - 1]
    found.append((last @ head).argmax(-1))
    batch = batch._replace(
      tokens=batch.tokens.at[rows, lengths].set(found[-1]),
      positions=batch.positions.at[rows, lengths].set(lengths),
      segments=batch.segments.at[rows, lengths].set(1),
    )
    lengths = lengths + 1
  return np.stack(found, 1)


# One jit for all tests, so that equal shapes compile once.
_GENERATE = jax.jit(
  generation.generate,
  static_argnums=0,
  static_argnames=("max_new_tokens", "eos_ids"),
)


def generated(model, params, batch, **choices):
  """`generate` under jit, as a numpy array."""
  return np.asarray(_GENERATE(model, params, batch, **choices))
