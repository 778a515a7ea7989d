"""Path rules -> trainable mask, learning rates, decay; schedules; AdamW.

What trains is decided by `trees.split` before any gradient or optimizer state
exists. This file only sees the trainable part.
"""

import functools
import logging
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from pivot_jax import trees
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")
# The factor on the learning rate at an update.
Schedule = Callable[[Array | int | float], Array]
SCHEDULES = ("cosine", "constant")
MOMENTS = ("float32", "bfloat16")


def schedule(name: str, *, steps: int, warmup: float) -> Schedule:
  """Return the factor on the learning rate at update t = 0, 1, ...

  `cosine` is the paper's (2.2): t/W for t < W, then half a cosine to 0, with
  W = ceil(warmup * steps). The very first update has factor 0.
  """
  ramp = int(np.ceil(warmup * steps))

  def cosine(step: Array | int | float) -> Array:
    after = (step - ramp) / max(1, steps - ramp)
    factor = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(after, 0, 1)))
    return jnp.where(step < ramp, step / max(1, ramp), factor)

  def constant(step: Array | int | float) -> Array:
    return jnp.minimum(1.0, step / ramp) if ramp else jnp.ones(())

  if name not in SCHEDULES:
    raise InputError(f"schedule={name!r}: choose one of {SCHEDULES}")
  return cosine if name == "cosine" else constant


def adamw(
  trainable: trees.Params,
  *,
  lr: Sequence[tuple[str, float]],
  factor: Schedule,
  weight_decay: Sequence[tuple[str, float]] = ((".*", 0.0),),
  clip: float = 1.0,
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-8,
  moments: str = "float32",
) -> optax.GradientTransformation:
  """Return clipping by global norm, then AdamW with a rate for each path.

  `moments` in bfloat16 take half the memory (`_bfloat16_adam`).
  `lr` and `weight_decay` are ordered rules (pattern, value); the first full
  match wins and a path without one is an error. Rates enter the optimizer state
  as arrays, so that two runs that differ in a rate share one executable.
  """
  rates = _values(lr, trainable)
  decays = _values(weight_decay, trainable)
  if moments not in MOMENTS:
    raise InputError(f"moments={moments!r}: choose one of {MOMENTS}")
  adam = optax.scale_by_adam if moments == "float32" else _bfloat16_adam
  return optax.chain(
    optax.clip_by_global_norm(clip),
    adam(b1=betas[0], b2=betas[1], eps=eps),
    _decay(decays),
    _rates(rates, factor),
  )


def _bfloat16_adam(
  *, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
  """Adam whose moments are stored in bfloat16 and computed in float32.

  They are rounded up or down at random, in proportion: an update changes the
  second moment by a thousandth, less than half of bfloat16's last bit, and
  rounding to the nearest would never let it fall.
  """

  def init(params):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), params)
    count = jnp.zeros((), jnp.int32)
    return optax.ScaleByAdamState(count=count, mu=zeros, nu=zeros)

  def update(updates, state, params=None):
    del params
    grads, tree = jax.tree.flatten(updates)
    keys = jax.random.split(
      jax.random.fold_in(jax.random.PRNGKey(0), state.count), (len(grads), 2)
    )
    count = state.count + 1

    def leaf(grad, mu, nu, key):
      mu = b1 * mu.astype(jnp.float32) + (1 - b1) * grad
      nu = b2 * nu.astype(jnp.float32) + (1 - b2) * grad**2
      step = mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
      return step, round_at_random(mu, key[0]), round_at_random(nu, key[1])

    moments = (jax.tree.leaves(state.mu), jax.tree.leaves(state.nu))
    found = [leaf(*one) for one in zip(grads, *moments, keys)]
    steps, mu, nu = (jax.tree.unflatten(tree, x) for x in zip(*found))
    return steps, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

  return optax.GradientTransformation(init, update)


def round_at_random(
  x: Float[Array, "*shape"], key: jax.Array
) -> Float[Array, "*shape"]:
  """Return finite float32 as bfloat16, rounded so that the mean stays.

  Adding random low bits carries into the high ones in proportion to what the
  low bits hold.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  low = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  high = (bits + low) & jnp.uint32(0xFFFF0000)
  return jax.lax.bitcast_convert_type(high, jnp.float32).astype(jnp.bfloat16)


def _values(rules, tree) -> dict[str, float]:
  """Return `{path: value}`, tolerating rules for what does not train."""
  paths = trees.flatten(tree)
  return {path: float(trees.first_match(rules, path)) for path in paths}


def check_rules(
  rules: Sequence[tuple[str, Any]], tree: trees.Params, field: str
) -> None:
  """Raise InputError where a rule matches no parameter of the whole model."""
  paths = list(trees.flatten(tree))
  for pattern, _ in rules:
    if not any(re.fullmatch(pattern, path) for path in paths):
      raise InputError(f"{field}: the rule {pattern!r} matches no parameter")


def from_config(
  config: ConfigDict,
) -> Callable[[trees.Params], optax.GradientTransformation]:
  """Return f(trainable) -> optimizer, by the rules of a training stage."""
  return functools.partial(
    adamw,
    lr=config.lr,
    factor=schedule(config.schedule, steps=config.steps, warmup=config.warmup),
    weight_decay=config.weight_decay,
    clip=config.clip,
    moments=config.moments,
  )


def check_moved(
  config: ConfigDict,
  trained: Mapping[str, Any],
  moved: Set[str],
  lines: Sequence[Mapping[str, float]],
  folder: pathlib.Path,
) -> None:
  """Raise InputError for a part that trains and is as it was, and why.

  A part whose rates are all 0, and a stage all of whose updates have a rate of
  0 (the first of a warmup), are asked for, and are a warning.

  Args:
    config: of the training stage.
    trained: the parameters that train; their shapes and dtypes will do.
    moved: the parts of which some are not as they were.
    lines: the run's metrics, for the norms of gradients.
    folder: of the stage, which was begun with the settings to change.
  """
  factor = schedule(config.schedule, steps=config.steps, warmup=config.warmup)
  peak = float(np.max(factor(np.arange(config.steps))))
  for part, leaves in trained.items():
    if part in moved:
      continue
    new = trees.flatten({part: leaves})
    rules = dict(_rule(config.lr, path) for path in new)
    if not peak or not any(rules.values()):
      LOG.warning(
        "%s: %s is as it was: its learning rate is 0 in all %d updates",
        config.name,
        part,
        config.steps,
      )
      continue
    said = ", ".join(f"{rule!r}: {rate:g}" for rule, rate in rules.items())
    raise InputError(
      f"{config.name}: {part} trains (lr {said}) and did not move in "
      f"{config.steps} updates: {_why_still(part, new, lines)}; then delete "
      f"{folder}"
    )


def _why_still(
  part: str,
  leaves: Mapping[str, Any],
  lines: Sequence[Mapping[str, float]],
) -> str:
  """Return why a part did not move, as its gradients tell, and what to do."""
  name = f"grad_norm/{part}"
  # A run that an older version began has lines without it.
  norms = [line[name] for line in lines if name in line]
  if norms and not any(norms):
    needed = " (has the data images?)" if part != "llm" else ""
    return (
      f"its gradient was 0 in every one, so no row reaches it{needed}; give "
      "data that does, or take it out of `trainable`"
    )
  dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves.values()}))
  return (
    f"its gradient was up to {max(norms, default=0):.3g}, but the steps are "
    f"lost in the rounding of its {dtypes} parameters; raise the learning rate"
  )


def _rule(rules: Sequence[tuple[str, float]], path: str) -> tuple[str, float]:
  """Return the learning-rate rule of a parameter."""
  return trees.first_match([(rule[0], tuple(rule)) for rule in rules], path)


def _like(values: Mapping[str, float], tree: Any) -> Any:
  return trees.unflatten(
    {path: jnp.float32(values[path]) for path in trees.flatten(tree)}
  )


def _decay(decays: Mapping[str, float]) -> optax.GradientTransformation:
  if not any(decays.values()):
    return optax.identity()

  def init(params):
    del params
    return optax.EmptyState()

  def update(updates, state, params=None):
    flat, held = trees.flatten(updates), trees.flatten(params)
    decayed = {path: flat[path] + decays[path] * held[path] for path in flat}
    return trees.unflatten(decayed), state

  return optax.GradientTransformation(init, update)


def _rates(rates: Mapping[str, float], factor: Schedule):
  """Multiply by -rate * factor(step); the rates live in the state."""

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
