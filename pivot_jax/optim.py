"""Path rules -> trainable mask, learning rates, decay; schedules; AdamW.

What trains is decided by `trees.split` before any gradient or optimizer state
exists. This file only sees the trainable part.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from pivot_jax import trees
from pivot_jax.errors import InputError

SCHEDULES = ("cosine", "constant")


def schedule(name: str, *, steps: int, warmup: float) -> optax.Schedule:
  """Returns the factor on the learning rate at update t = 0, 1, ...

  `cosine` is the paper's (2.2): t/W for t < W, then half a cosine to 0, with
  W = ceil(warmup * steps). The very first update has factor 0.
  """
  ramp = int(np.ceil(warmup * steps))

  def cosine(step):
    after = (step - ramp) / max(1, steps - ramp)
    factor = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(after, 0, 1)))
    return jnp.where(step < ramp, step / max(1, ramp), factor)

  def constant(step):
    return jnp.minimum(1.0, step / ramp) if ramp else jnp.ones(())

  if name not in SCHEDULES:
    raise InputError(f"schedule={name!r}: choose one of {SCHEDULES}")
  return cosine if name == "cosine" else constant


def adamw(
  trainable: Any,
  *,
  lr: Sequence[tuple[str, float]],
  factor: optax.Schedule,
  weight_decay: Sequence[tuple[str, float]] = ((".*", 0.0),),
  clip: float = 1.0,
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """Returns clipping by global norm, then AdamW with a rate for each path.

  `lr` and `weight_decay` are ordered rules (pattern, value); the first full
  match wins and a path without one is an error. Rates enter the optimizer state
  as arrays, so that two runs that differ in a rate share one executable.
  """
  rates = _values(lr, trainable)
  decays = _values(weight_decay, trainable)
  return optax.chain(
    optax.clip_by_global_norm(clip),
    optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps),
    _decay(decays),
    _rates(rates, factor),
  )


def _values(rules, tree) -> dict[str, float]:
  """Returns `{path: value}`, tolerating rules for what does not train."""
  paths = trees.flatten(tree)
  return {path: float(trees.first_match(rules, path)) for path in paths}


def check_rules(
  rules: Sequence[tuple[str, Any]], tree: Any, field: str
) -> None:
  """Raises InputError where a rule matches no parameter of the whole model."""
  paths = list(trees.flatten(tree))
  for pattern, _ in rules:
    if not any(re.fullmatch(pattern, path) for path in paths):
      raise InputError(f"{field}: the rule {pattern!r} matches no parameter")


def _like(values: Mapping[str, float], tree: Any) -> Any:
  return trees.unflatten(
    {path: jnp.float32(values[path]) for path in trees.flatten(tree)}
  )


def _decay(decays: Mapping[str, float]) -> optax.GradientTransformation:
  if not any(decays.values()):
    return optax.identity()

  def update(updates, state, params):
    flat, held = trees.flatten(updates), trees.flatten(params)
    decayed = {path: flat[path] + decays[path] * held[path] for path in flat}
    return trees.unflatten(decayed), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _rates(rates: Mapping[str, float], factor: optax.Schedule):
  """Multiplies by -rate * factor(step); the rates live in the state."""

  def init(params):
    return {"count": jnp.zeros((), jnp.int32), "rates": _like(rates, params)}

  def update(updates, state, params=None):
    del params
    scale = -factor(state["count"])
    rates_now = trees.flatten(state["rates"])
    flat = trees.flatten(updates)
    scaled = {path: flat[path] * (scale * rates_now[path]) for path in flat}
    count = state["count"] + 1
    return trees.unflatten(scaled), {"count": count, "rates": state["rates"]}

  return optax.GradientTransformation(init, update)
