"""Losses: arrays in, arrays out. No model, no config, no random numbers.

A loss is always `sum(weight * term)`. The packer sets the weights over the
whole update, so that accumulation adds and never averages, and an empty slot
weighs 0. Metrics are (sum, count) pairs named as the paper's code logs them.

M loss positions, E hidden width, V vocabulary, Q pairs.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, Shaped

# Sums and counts, of which some are whole numbers.
Metrics = dict[str, tuple[Num[Array, ""], Num[Array, ""]]]


def token_logps(
  hidden: Float[Array, "R M E"],
  head: Float[Array, "E V"],
  targets: Int[Array, "R M"],
  *,
  chunk: int,
) -> Float[Array, "R M"]:
  """Return log p(target) at each position without holding `[R, M, V]`.

  Logits, log-softmax and the result are float32 whatever the inputs are. At
  most `chunk` positions (or one a row, if that is more) have logits at a time,
  in the backward pass too, where they are computed again; the head's gradient is
  summed over the chunks in float32. Float32 positions that fit one chunk keep
  theirs.
  """
  if chunk < 1:
    raise ValueError(f"chunk must be at least 1, got {chunk}")
  # Of bfloat16 logits automatic differentiation makes float32 products.
  if targets.size <= chunk and head.dtype == jnp.float32:
    return _logps_and_norm(hidden, head, targets)[0]
  width = min(targets.shape[1], max(1, chunk // len(targets)))
  return _chunked_logps(hidden, head, targets, width)


def _logps_and_norm(hidden, head, targets):
  """Return log p(target), and the logarithm of the softmax's denominator."""
  logits = _logits(hidden, head)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  norm = jax.nn.logsumexp(logits, axis=-1)
  return chosen - norm, norm


def _logits(hidden, head):
  # Positions are one axis in the product, as in a linear layer.
  flat = jnp.einsum(
    "ME,EV->MV",
    hidden.reshape(-1, hidden.shape[-1]),
    head,
    preferred_element_type=jnp.float32,
  )
  return flat.reshape(*hidden.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked_logps(hidden, head, targets, width):
  return _chunked_forward(hidden, head, targets, width)[0]


def _chunked_forward(hidden, head, targets, width):
  def part(block):
    return _logps_and_norm(block[0], head, block[1])

  blocks = (_blocks(hidden, width), _blocks(targets, width))
  logps, norms = jax.lax.map(part, blocks)
  kept = (hidden, head, targets, norms)
  return _rows(logps, targets.shape[1]), kept


def _chunked_backward(width, kept, gradient):
  """Compute d logits = gradient * (one-hot - softmax), chunk by chunk.

  Automatic differentiation of the loop would sum the head's gradient in the
  dtype of the head: in bfloat16 small contributions of late chunks are lost.
  """
  hidden, head, targets, norms = kept

  def part(total, block):
    hidden, targets, gradient, norm = block
    softmax = jnp.exp(_logits(hidden, head) - norm[..., None])
    one_hot = jnp.arange(head.shape[1])[None, None] == targets[..., None]
    given = gradient[..., None] * (one_hot - softmax)
    given = given.reshape(-1, head.shape[1]).astype(head.dtype)
    to_hidden = jnp.einsum(
      "MV,EV->ME", given, head, preferred_element_type=jnp.float32
    )
    to_head = jnp.einsum(
      "ME,MV->EV",
      hidden.reshape(-1, hidden.shape[-1]),
      given,
      preferred_element_type=jnp.float32,
    )
    return total + to_head, to_hidden.reshape(hidden.shape).astype(hidden.dtype)

  blocks = tuple(_blocks(x, width) for x in (hidden, targets, gradient))
  zeros = jnp.zeros(head.shape, jnp.float32)
  total, to_hidden = jax.lax.scan(part, zeros, (*blocks, norms))
  to_hidden = _rows(to_hidden, targets.shape[1])
  return to_hidden, total.astype(head.dtype), None


_chunked_logps.defvjp(_chunked_forward, _chunked_backward)


def _blocks(x, width):
  """Return [R, M, ...] as [M/width, R, width, ...], filled up with zeros.

  Each block holds positions of every row, so that rows stay on their devices.
  """
  pad = ((0, 0), (0, -x.shape[1] % width), *((0, 0),) * (x.ndim - 2))
  padded = jnp.pad(x, pad)
  split = padded.reshape(len(x), -1, width, *x.shape[2:])
  return jnp.swapaxes(split, 0, 1)


def _rows(blocks, positions):
  """Return blocks as [R, M, ...] again."""
  x = jnp.swapaxes(blocks, 0, 1)
  return x.reshape(len(x), -1, *blocks.shape[3:])[:, :positions]


def sft(
  logps: Float[Array, "M"], weight: Float[Array, "M"]
) -> tuple[Float[Array, ""], Metrics]:
  """Return the supervised loss, the weighted negative log-likelihood.

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
  """Return the DPO loss, eq. 7 of Rafailov et al. 2023.

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

  def mean(values: Shaped[Array, "Q"]):
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
