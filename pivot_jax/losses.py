"""Losses: arrays in, arrays out. No model, no config, no random numbers.

A loss is always `sum(weight * term)`. The packer sets the weights over the
whole update, so that accumulation adds and never averages, and an empty slot
weighs 0. Metrics are (sum, count) pairs named as the paper's code logs them.

M loss positions, E hidden width, V vocabulary, Q pairs.
"""

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
  they are computed again.
  """
  if chunk < 1:
    raise ValueError(f"chunk must be at least 1, got {chunk}")
  positions = targets.shape[0]
  if positions <= chunk:
    return _logps(hidden, head, targets)
  pad = -positions % chunk
  hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(
    -1, chunk, hidden.shape[-1]
  )
  blocks = jnp.pad(targets, (0, pad)).reshape(-1, chunk)
  part = jax.checkpoint(lambda block: _logps(block[0], head, block[1]))
  return jax.lax.map(part, (hidden, blocks)).reshape(-1)[:positions]


def _logps(hidden, head, targets):
  logits = jnp.einsum(
    "ME,EV->MV", hidden, head, preferred_element_type=jnp.float32
  )
  chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


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
