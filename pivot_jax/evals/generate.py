"""Greedy generation: prefill and a KV-cache loop in one function to jit.

It returns token ids; prompts come from `data/chat.py` and `data/packing.py`,
and scoring what the ids say is a stage's business.

Axes: R rows (one prompt each), T prompt tokens, E llm width.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from pivot_jax.models import mllm


def generate(
  model: mllm.MLLM,
  params: PyTree,
  batch: mllm.Rows,
  *,
  max_new_tokens: int,
  eos_ids: tuple[int, ...],
  prompt_lengths: Int[Array, "R"] | None = None,
) -> Int[Array, "R N"]:
  """Continue each row's prompt with its most likely tokens.

  A row holds one prompt, filled from the left: segment 1 on its tokens, 0 on
  the padding behind them, branch 0 everywhere. The answer includes the token
  of `eos_ids` that ended it and goes on with `eos_ids[0]` up to the fixed
  length. No repetition penalty. The loop stops when every row has ended.

  Args:
    max_new_tokens: the length N of the result; static, as are `eos_ids` and
      `model`.
    prompt_lengths: tokens of each prompt, images' patches included; counted
      from `batch.segments` if not given. A row of length 0 has ended before
      it began.
  """
  if max_new_tokens < 1 or not eos_ids:
    raise ValueError("generate needs max_new_tokens >= 1 and one eos id")
  if prompt_lengths is None:
    prompt_lengths = (batch.segments > 0).sum(axis=1, dtype=jnp.int32)
  apply = functools.partial(_apply, model, params)
  rows, width = batch.tokens.shape
  # The last token is never fed back, so it needs no slot.
  slots = width + max_new_tokens - 1
  logits, cache = _prefill(apply, batch, prompt_lengths, slots)
  ends = jnp.asarray(eos_ids, jnp.int32)
  done = prompt_lengths == 0
  tokens = _pick(logits, done, ends[0])
  answers = jnp.full((rows, max_new_tokens), ends[0], jnp.int32)
  answers = answers.at[:, 0].set(tokens)

  def unfinished(carry: tuple):
    count, _, done, _, _ = carry
    return (count < max_new_tokens) & ~done.all()

  def step(carry: tuple):
    count, tokens, done, answers, cache = carry
    logits, cache = apply(
      "decode_step",
      tokens,
      prompt_lengths + count - 1,
      width + count - 1,
      cache,
    )
    tokens = _pick(logits, done, ends[0])
    answers = answers.at[:, count].set(tokens)
    return count + 1, tokens, done | _is_end(tokens, ends), answers, cache

  done |= _is_end(tokens, ends)
  carry = (jnp.int32(1), tokens, done, answers, cache)
  return jax.lax.while_loop(unfinished, step, carry)[3]


def _apply(model, params, method, *arguments):
  return model.apply({"params": params}, *arguments, method=method)


def _prefill(apply, batch, prompt_lengths, slots):
  """Return the logits [R, V] behind each prompt and the filled cache."""
  embeddings = apply("embed", apply("see", batch.images), batch)
  hidden, cache = apply("prefill", embeddings, batch, slots)
  last = jnp.maximum(prompt_lengths - 1, 0)[:, None, None]
  return apply("logits", jnp.take_along_axis(hidden, last, axis=1)[:, 0]), cache


def _pick(logits, done, end):
  return jnp.where(done, end, logits.argmax(axis=-1).astype(jnp.int32))


def _is_end(tokens, ends):
  return (tokens[:, None] == ends[None]).any(axis=1)
