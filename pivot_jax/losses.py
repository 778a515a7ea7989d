"""Losses: arrays in, arrays out. No model, no config, no random numbers.

A loss is always `sum(weight * term)`. The packer sets the weights over the
whole update, so that accumulation adds and never averages, and an empty slot
weighs 0. Metrics are (sum, count) pairs named as the paper's code logs them.

M loss positions, E hidden width, V vocabulary, Q pairs.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def token_logps(
  hidden: Float[Array, "M E"],
  head: Float[Array, "E V"],
  targets: Int[Array, "M"],
  *,
  chunk: int,
) -> Float[Array, "M"]:
  """Returns log p(target) at each position without holding `[M, V]`.

  Logits, log-softmax and the result are float32 whatever the inputs are. At
  most `chunk` rows of logits exist at a time, in the backward pass too, where
  they are computed again; the head's gradient is summed over the chunks in
  float32. Positions that fit one chunk keep their logits instead.
  """
  if chunk < 1:
    raise ValueError(f"chunk must be at least 1, got {chunk}")
  if targets.shape[0] <= chunk:
    return _logps(hidden, head, targets)
  return _chunked_logps(hidden, head, targets, chunk)


def _logps(hidden, head, targets):
  return _logps_and_norm(hidden, head, targets)[0]


def _logps_and_norm(hidden, head, targets):
  """Returns log p(target), and the logarithm of the softmax's denominator."""
  logits = _logits(hidden, head)
  chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
  norm = jax.nn.logsumexp(logits, axis=-1)
  return chosen - norm, norm


def _logits(hidden, head):
  return jnp.einsum(
    "ME,EV->MV", hidden, head, preferred_element_type=jnp.float32
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked_logps(hidden, head, targets, chunk):
  return _chunked_forward(hidden, head, targets, chunk)[0]


def _chunked_forward(hidden, head, targets, chunk):
  positions = targets.shape[0]

  def part(block):
    return _logps_and_norm(block[0], head, block[1])

  logps, norms = jax.lax.map(part, _blocks(chunk, hidden, targets))
  kept = (hidden, head, targets, norms)
  return logps.reshape(-1)[:positions], kept


def _chunked_backward(chunk, kept, gradient):
  """Computes d logits = gradient * (one-hot - softmax), chunk by chunk.

  Automatic differentiation of the loop would sum the head's gradient in the
  dtype of the head: in bfloat16 small contributions of late chunks are lost.
  """
  hidden, head, targets, norms = kept
  blocks = _blocks(chunk, hidden, targets, gradient)

  def part(total, block):
    hidden, targets, gradient, norm = block
    softmax = jnp.exp(_logits(hidden, head) - norm[:, None])
    one_hot = jnp.arange(head.shape[1]) == targets[:, None]
    given = (gradient[:, None] * (one_hot - softmax)).astype(head.dtype)
    to_hidden = jnp.einsum(
      "MV,EV->ME", given, head, preferred_element_type=jnp.float32
    )
    to_head = jnp.einsum(
      "ME,MV->EV", hidden, given, preferred_element_type=jnp.float32
    )
    return total + to_head, to_hidden.astype(hidden.dtype)

  zeros = jnp.zeros(head.shape, jnp.float32)
  total, to_hidden = jax.lax.scan(part, zeros, (*blocks, norms))
  to_hidden = to_hidden.reshape(-1, hidden.shape[1])[: len(targets)]
  return to_hidden, total.astype(head.dtype), None


_chunked_logps.defvjp(_chunked_forward, _chunked_backward)


def _blocks(chunk, *arrays):
  """Returns arrays [M, ...] as [M/chunk, chunk, ...], filled up with zeros."""

  def split(x):
    pad = ((0, -len(x) % chunk), *((0, 0),) * (x.ndim - 1))
    return jnp.pad(x, pad).reshape(-1, chunk, *x.shape[1:])

  return tuple(split(x) for x in arrays)


def sft(
  logps: Float[Array, "M"], weight: Float[Array, "M"]
) -> tuple[Float[Array, ""], Metrics]:
  """Returns the supervised loss, the weighted negative log-likelihood.

  With weights of 1/(targets of the group) per group of examples this is the
  paper's mean of per-micro-batch token means (paper 2.4).
  """
  loss = -(weight * logps).sum()
  used = weight > 0
  return loss, {
    "losses/sft": (loss, weight.sum()),
    "logps/token": ((used * logps).sum(), used.sum()),
  }


def dpo(
  policy: Float[Array, "Q 2"],
  reference: Float[Array, "Q 2"],
  weight: Float[Array, "Q"],
  *,
  beta: float,
  label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
  """Returns the DPO loss, eq. 7 of Rafailov et al. 2023.

  Column 0 holds the log-probabilities of the chosen answers, column 1 of the
  rejected ones, each *summed* over the tokens of the answer in float32.
  `weight` is 1/pairs of the whole update for a pair and 0 for an empty slot.
  """
  reward = beta * (policy - reference)
  margin = reward[:, 0] - reward[:, 1]
  term = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin)
  term -= label_smoothing * jax.nn.log_sigmoid(-margin)
  used = weight > 0
  count = used.sum()

  def mean(values):
    return (used * values).sum(), count

  return (weight * term).sum(), {
    "losses/dpo": mean(term),
    "rewards/chosen": mean(reward[:, 0]),
    "rewards/rejected": mean(reward[:, 1]),
    "rewards/margins": mean(margin),
    "rewards/accuracies": mean(margin > 0),
    "logps/chosen": mean(policy[:, 0]),
    "logps/rejected": mean(policy[:, 1]),
    "ref_logps/chosen": mean(reference[:, 0]),
    "ref_logps/rejected": mean(reference[:, 1]),
  }
