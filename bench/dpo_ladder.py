"""Our DPO update in rungs: from the peers' algorithm to what the package does.

The first three have the reference model run in every step and are put together
here from `pivot_jax.objectives`; the last is the package's own objective and
update. All give the same loss and the same gradients.

Q pairs, S sequences (2Q, chosen ones first), M loss positions.
"""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bench import ours, side_by_side
from pivot_jax import losses, objectives

BETA = 0.1


def naive(folder: pathlib.Path) -> side_by_side.Ready:
  """Every answer is a sequence of its own, with prompt and image."""
  setup = ours.Setup(folder)

  def policy(params, batch):
    return _pairs(objectives.logps(setup.model, params, batch), batch)

  return _with_reference(setup, policy, _separate(setup))


def image_once(folder: pathlib.Path) -> side_by_side.Ready:
  """The two sequences of a pair share the encoded and projected image."""
  setup = ours.Setup(folder)
  model = setup.model

  def policy(params, batch):
    once = batch.replace(images=batch.images[: len(batch.images) // 2])
    visual = objectives.features(model, params, once)
    visual = objectives.project(model, params, visual, once)
    both = jnp.concatenate([visual, visual])
    values = objectives.logps_from_visual(model, params, both, batch)
    return _pairs(values, batch)

  return _with_reference(setup, policy, _separate(setup))


def prompt_once(folder: pathlib.Path) -> side_by_side.Ready:
  """Both answers branch off one prompt, as the package packs a pair."""
  setup = ours.Setup(folder)
  pairs = ours.examples(setup.data, ("chosen", "rejected"))

  def policy(params, batch):
    values = objectives.logps(setup.model, params, batch)
    return objectives.answer_logps(values, batch).reshape(-1, 2)

  return _with_reference(setup, policy, setup.packed(pairs))


def cached(folder: pathlib.Path) -> side_by_side.Ready:
  """The package's own: the reference's log-probabilities come with the data."""
  setup = ours.Setup(folder)
  names = ("chosen", "rejected")
  batch = setup.packed(ours.examples(setup.data, names))
  fixed = _in_order(
    setup.compute(objectives.pair_logps(setup.model), batch)
  ).reshape(2, -1)
  batch = setup.packed(ours.examples(setup.data, names, fixed.T))
  loss_fn = objectives.dpo(setup.model, beta=BETA)
  return ours.training(setup, loss_fn, batch, fixed.reshape(-1))


def reference(folder: pathlib.Path) -> side_by_side.Ready:
  """What the score stage does once for all epochs: a forward pass."""
  setup = ours.Setup(folder)
  pairs = ours.examples(setup.data, ("chosen", "rejected"))
  score = objectives.pair_logps(setup.model)
  return ours.scoring(setup, score, setup.packed(pairs), _in_order)


RUNGS = {
  "naive": naive,
  "image_once": image_once,
  "prompt_once": prompt_once,
  "cached": cached,
  "reference": reference,
}


def _separate(setup: ours.Setup):
  chosen = ours.examples(setup.data, ("chosen",))
  return setup.alone([*chosen, *ours.examples(setup.data, ("rejected",))])


def _pairs(token_logps, batch):
  """Returns [Q, 2] from [S, M], one answer to a row."""
  sums = jnp.where(batch.loss_answer == 0, token_logps, 0.0).sum(axis=1)
  return sums.reshape(2, -1).T


def _in_order(values: np.ndarray) -> np.ndarray:
  """Returns [S] from [R, Q, 2]; equally long examples stay in their order."""
  return values.reshape(-1, 2).T.reshape(-1)


def _with_reference(
  setup: ours.Setup, policy: Callable, batch
) -> side_by_side.Ready:
  """Returns the update of a DPO whose reference model runs in every step."""

  def loss_fn(params, inputs, rng):
    del rng
    batch, fixed = inputs
    reference = jax.lax.stop_gradient(policy(fixed, batch))
    weight = jnp.full(len(reference), 1 / len(reference))
    return losses.dpo(policy(params, batch), reference, weight, beta=BETA)

  scores = _in_order(setup.compute(policy, batch))
  return ours.training(setup, loss_fn, (batch, setup.params), scores)
