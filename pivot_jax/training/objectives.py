"""Model + loss -> loss_fn(params, batch, rng): the shape of all training.

SFT, DPO and what comes later differ in this function alone. It returns the loss
and metrics as (sum, count) pairs; it holds no parameters. `TABLE` has what a
config may name; one of your own is `path/to/file.py:function`, where the
function is `build(model, config) -> loss_fn` under `@needs(...)`.

R rows, T tokens, M loss positions, S answers of a row, Q pairs of a row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from pivot_jax import names, trees
from pivot_jax.data import packing
from pivot_jax.errors import InputError
from pivot_jax.models import mllm
from pivot_jax.training import losses

Loss = tuple[Float[Array, ""], losses.Metrics]
LossFn = Callable[[trees.Params, packing.Batch, jax.Array | None], Loss]


@dataclasses.dataclass(frozen=True)
class Objective:
  """An objective that a config may name.

  Attributes:
    build: (model, the stage's settings) -> loss_fn.
    pairs: whether it learns from both answers of a pair; else from the chosen.
    reference: whether it reads log-probabilities of the start (stage `score`).
  """

  build: Callable[[mllm.MLLM, ConfigDict], LossFn]
  pairs: bool = False
  reference: bool = False

  def __call__(self, model: mllm.MLLM, config: ConfigDict) -> LossFn:
    return self.build(model, config)


def needs(*, pairs: bool = False, reference: bool = False):
  """Return a decorator that makes an objective of a builder."""

  def decorate(build: Callable[[mllm.MLLM, ConfigDict], LossFn]) -> Objective:
    return Objective(build, pairs=pairs, reference=reference)

  return decorate


def named(name: str, what: str = "objective") -> Objective:
  """Return the objective of a name of `TABLE`, or of a user's own.

  Raises InputError for a name that is neither, and where one's own is called:
  for a loss that is none.
  """
  found = names.named(name, TABLE, what)
  if name in TABLE:
    return found
  if not isinstance(found, Objective):
    found = Objective(found)
  who = f"{what}={name!r}"
  names.check_call(who, found.build, ("model", "config"))
  return dataclasses.replace(found, build=_checked(found.build, who))


def _checked(
  build: Callable[[mllm.MLLM, ConfigDict], LossFn], who: str
) -> Callable[[mllm.MLLM, ConfigDict], LossFn]:
  """Return a user's builder, the results of whose loss are looked at."""

  def build_checked(model: mllm.MLLM, config: ConfigDict) -> LossFn:
    loss_fn = build(model, config)
    if not callable(loss_fn):
      raise InputError(
        f"{who}: returned {type(loss_fn).__name__}, not a function loss_fn("
        "params, batch, rng) -> (loss, metrics)"
      )
    names.check_call(f"{who}: its loss_fn", loss_fn, ("params", "batch", "rng"))

    def checked(
      params: trees.Params, batch: packing.Batch, rng: jax.Array | None
    ) -> Any:
      # While it is traced, so that it costs nothing.
      found = loss_fn(params, batch, rng)
      wrong = _fault(found)
      if wrong:
        raise InputError(f"{who}: its loss_fn returned {wrong}")
      return found

    return checked

  return build_checked


def _fault(found: Any) -> str:
  """Return in which way a loss_fn's result is no loss with metrics, or ""."""
  if not isinstance(found, tuple) or len(found) != 2:
    return f"{_shown(found)}, not (loss, metrics)"
  loss, metrics = found
  number = isinstance(loss, jax.Array) and loss.shape == ()
  if not number or not jnp.issubdtype(loss.dtype, jnp.floating):
    return f"as loss {_shown(loss)}, not one float, as of a sum"
  if not isinstance(metrics, dict):
    return f"as metrics {_shown(metrics)}, not a dict"
  for name, value in metrics.items():
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not pair or not all(map(_is_number, value)):
      return f"as metric {name!r} {_shown(value)}, not numbers (sum, count)"
  return ""


def _is_number(value: Any) -> bool:
  kinds = (jax.Array, np.ndarray, np.generic, int, float)
  return isinstance(value, kinds) and np.shape(value) == ()


def _shown(value: Any) -> str:
  """Return the type of a value, and its shape or its parts'."""
  if isinstance(value, jax.Array):
    return f"an array {value.dtype}{list(value.shape)}"
  if isinstance(value, (tuple, list)):
    return f"({', '.join(map(_shown, value))})"
  return type(value).__name__


# Rows of logits that exist at a time, unless a config says otherwise.
CHUNK = 4096


def features(
  model: mllm.MLLM, params: trees.Params, batch: packing.Batch
) -> Float[Array, "N P D"] | None:
  """Return the vision features [R*I, P, D] of a batch, None without images."""
  rows, images = batch.images.shape[:2]
  if images == 0:
    return None
  flat = batch.images.reshape(rows * images, *batch.images.shape[2:])
  return _apply(model, params, flat, method="encode")


def project(
  model: mllm.MLLM,
  params: trees.Params,
  visual: Float[Array, "N P D"] | None,
  batch: packing.Batch,
) -> Float[Array, "R IP E"] | None:
  """Return projected features [R, I*P, E], None without images."""
  if visual is None:
    return None
  projected = _apply(model, params, visual, method="project")
  return projected.reshape(batch.images.shape[0], -1, projected.shape[-1])


def logps_from_visual(
  model: mllm.MLLM,
  params: trees.Params,
  visual: Float[Array, "R IP E"] | None,
  batch: packing.Batch,
  *,
  chunk: int = CHUNK,
) -> Float[Array, "R M"]:
  """Return log p(target) in float32 at every loss position of the batch."""
  embedded = _apply(model, params, visual, batch, method="embed")
  hidden = _apply(model, params, embedded, batch, method="decode")
  picked = jnp.take_along_axis(hidden, batch.loss_source[..., None], axis=1)
  head = _apply(model, params, method="head")
  return losses.token_logps(picked, head, batch.loss_target, chunk=chunk)


def _apply(model: mllm.MLLM, params: trees.Params, *inputs, method: str) -> Any:
  return model.apply({"params": params}, *inputs, method=method)


def logps(
  model: mllm.MLLM,
  params: trees.Params,
  batch: packing.Batch,
  *,
  chunk: int = CHUNK,
) -> Float[Array, "R M"]:
  """Return log p(target) in float32 at every loss position of the batch."""
  visual = project(model, params, features(model, params, batch), batch)
  return logps_from_visual(model, params, visual, batch, chunk=chunk)


def answer_logps(
  token_logps: Float[Array, "R M"], batch: packing.Batch
) -> Float[Array, "R Q 2"]:
  """Return the summed log-probability of (chosen, rejected) of each pair."""
  rows, pairs = batch.pair_weight.shape
  answers = jnp.arange(2 * pairs)
  member = batch.loss_answer[..., None] == answers[None, None]
  # A plain sum, not a matmul: those may round float32 on an accelerator.
  sums = jnp.where(member, token_logps[..., None], 0.0).sum(axis=1)
  return sums.reshape(rows, pairs, 2)


def sft_from_logps(
  token_logps: Float[Array, "R M"], batch: packing.Batch
) -> Loss:
  """Return (loss, metrics) of SFT from the log-probabilities of a batch."""
  return losses.sft(token_logps.reshape(-1), batch.loss_weight.reshape(-1))


def dpo_from_logps(
  token_logps: Float[Array, "R M"],
  batch: packing.Batch,
  *,
  beta: float,
  label_smoothing: float = 0.0,
) -> Loss:
  """Return (loss, metrics) of DPO from the log-probabilities of a batch."""
  policy = answer_logps(token_logps, batch)
  return losses.dpo(
    policy.reshape(-1, 2),
    batch.reference.reshape(-1, 2),
    batch.pair_weight.reshape(-1),
    beta=beta,
    label_smoothing=label_smoothing,
  )


def sft(model: mllm.MLLM, *, chunk: int = CHUNK) -> LossFn:
  """Return the supervised objective (paper 3.1)."""

  def loss_fn(
    params: trees.Params, batch: packing.Batch, rng: jax.Array | None
  ) -> Loss:
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
  """Return the DPO objective (paper 3.2): no SFT term, summed log-probs."""

  def loss_fn(
    params: trees.Params, batch: packing.Batch, rng: jax.Array | None
  ) -> Loss:
    del rng
    values = logps(model, params, batch, chunk=chunk)
    return dpo_from_logps(
      values, batch, beta=beta, label_smoothing=label_smoothing
    )

  return loss_fn


def pair_logps(model: mllm.MLLM, *, chunk: int = CHUNK):
  """Return fn(params, batch) -> [R, Q, 2], what the score stage stores."""

  def score(params: trees.Params, batch: packing.Batch):
    return answer_logps(logps(model, params, batch, chunk=chunk), batch)

  return jax.jit(score)


TABLE = {
  "sft": Objective(lambda model, config: sft(model, chunk=config.chunk)),
  "dpo": Objective(
    lambda model, config: dpo(model, beta=config.beta, chunk=config.chunk),
    pairs=True,
    reference=True,
  ),
}
