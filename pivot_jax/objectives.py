"""Model + loss -> loss_fn(params, batch, rng): the shape of all training.

SFT, DPO and what comes later differ in this function alone. It returns the loss
and metrics as (sum, count) pairs; it holds no parameters.

R rows, T tokens, M loss positions, S answers of a row, Q pairs of a row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pivot_jax import losses
from pivot_jax.data import packing
from pivot_jax.models import mllm

LossFn = Callable[[Any, packing.Batch, Any], tuple[Any, losses.Metrics]]

# Rows of logits that exist at a time, unless a config says otherwise.
CHUNK = 4096


def features(model: mllm.MLLM, params: Any, batch: packing.Batch):
  """Returns the vision features [R*I, P, D] of a batch, None without images."""
  rows, images = batch.images.shape[:2]
  if images == 0:
    return None
  flat = batch.images.reshape(rows * images, *batch.images.shape[2:])
  return model.apply({"params": params}, flat, method="encode")


def project(model: mllm.MLLM, params: Any, visual, batch: packing.Batch):
  """Returns projected features [R, I*P, E], None without images."""
  if visual is None:
    return None
  projected = model.apply({"params": params}, visual, method="project")
  return projected.reshape(batch.images.shape[0], -1, projected.shape[-1])


def logps_from_visual(
  model: mllm.MLLM,
  params: Any,
  visual: Float[Array, "R IP E"] | None,
  batch: packing.Batch,
  *,
  chunk: int = CHUNK,
) -> Float[Array, "R M"]:
  """Returns log p(target) in float32 at every loss position of the batch."""
  variables = {"params": params}
  embedded = model.apply(variables, visual, batch, method="embed")
  hidden = model.apply(variables, embedded, batch, method="decode")
  picked = jnp.take_along_axis(hidden, batch.loss_source[..., None], axis=1)
  head = model.apply(variables, method="head")
  return losses.token_logps(picked, head, batch.loss_target, chunk=chunk)


def logps(model, params, batch, *, chunk: int = CHUNK) -> Float[Array, "R M"]:
  """Returns log p(target) in float32 at every loss position of the batch."""
  visual = project(model, params, features(model, params, batch), batch)
  return logps_from_visual(model, params, visual, batch, chunk=chunk)


def answer_logps(
  token_logps: Float[Array, "R M"], batch: packing.Batch
) -> Float[Array, "R Q 2"]:
  """Returns the summed log-probability of (chosen, rejected) of each pair."""
  rows, pairs = batch.pair_weight.shape
  answers = jnp.arange(2 * pairs)
  member = batch.loss_answer[..., None] == answers
  # A plain sum, not a matmul: those may round float32 on an accelerator.
  sums = jnp.where(member, token_logps[..., None], 0.0).sum(axis=1)
  return sums.reshape(rows, pairs, 2)


def sft_from_logps(token_logps: Float[Array, "R M"], batch: packing.Batch):
  """Returns (loss, metrics) of SFT from the log-probabilities of a batch."""
  return losses.sft(token_logps.reshape(-1), batch.loss_weight.reshape(-1))


def dpo_from_logps(
  token_logps: Float[Array, "R M"],
  batch: packing.Batch,
  *,
  beta: float,
  label_smoothing: float = 0.0,
):
  """Returns (loss, metrics) of DPO from the log-probabilities of a batch."""
  policy = answer_logps(token_logps, batch)
  return losses.dpo(
    policy.reshape(-1, 2),
    batch.reference.reshape(-1, 2),
    batch.pair_weight.reshape(-1),
    beta=beta,
    label_smoothing=label_smoothing,
  )


def sft(model: mllm.MLLM, *, chunk: int = CHUNK) -> LossFn:
  """Returns the supervised objective (paper 3.1)."""

  def loss_fn(params, batch, rng):
    del rng
    return sft_from_logps(logps(model, params, batch, chunk=chunk), batch)

  return loss_fn


def dpo(
  model: mllm.MLLM,
  *,
  beta: float,
  label_smoothing: float = 0.0,
  chunk: int = CHUNK,
) -> LossFn:
  """Returns the DPO objective (paper 3.2): no SFT term, summed log-probs."""

  def loss_fn(params, batch, rng):
    del rng
    values = logps(model, params, batch, chunk=chunk)
    return dpo_from_logps(
      values, batch, beta=beta, label_smoothing=label_smoothing
    )

  return loss_fn


def pair_logps(model: mllm.MLLM, *, chunk: int = CHUNK):
  """Returns fn(params, batch) -> [R, Q, 2], what the score stage stores."""

  def score(params, batch):
    return answer_logps(logps(model, params, batch, chunk=chunk), batch)

  return jax.jit(score)
