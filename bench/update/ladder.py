"""Our DPO update in rungs: from the peers' algorithm to what the package does.

The first three have the reference model run in every step and are put together
here from `pivot_jax.training.objectives`; the last is the package's own
objective and update. All give the same loss and the same gradients.

Q pairs, S sequences (2Q, chosen ones first), M loss positions.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import harness
from bench.update import ours
from pivot_jax.data import packing
from pivot_jax.models import layers, mllm
from pivot_jax.training import losses, objectives

BETA = 0.1

# (params, batch) -> [Q, 2], the log-probabilities of both answers.
Policy = Callable[[Any, packing.Batch], jax.Array]


def naive(model: mllm.MLLM, *, chunk: int = objectives.CHUNK) -> Policy:
  """Every answer is a sequence of its own, with prompt and image."""

  def policy(params, batch):
    return _pairs(objectives.logps(model, params, batch, chunk=chunk), batch)

  return policy


def image_once(model: mllm.MLLM, *, chunk: int = objectives.CHUNK) -> Policy:
  """The two sequences of a pair share the encoded and projected image."""

  def policy(params, batch):
    once = batch._replace(images=batch.images[: len(batch.images) // 2])
    visual = objectives.features(model, params, once)
    visual = objectives.project(model, params, visual, once)
    both = jnp.concatenate([visual, visual])
    values = objectives.logps_from_visual(
      model, params, both, batch, chunk=chunk
    )
    return _pairs(values, batch)

  return policy


def prompt_once(model: mllm.MLLM, *, chunk: int = objectives.CHUNK) -> Policy:
  """Both answers branch off one prompt, as the package packs a pair."""

  def policy(params, batch):
    values = objectives.logps(model, params, batch, chunk=chunk)
    return objectives.answer_logps(values, batch).reshape(-1, 2)

  return policy


# Policies, and whether they read every answer in a row of its own.
POLICIES = {
  "naive": (naive, True),
  "image_once": (image_once, True),
  "prompt_once": (prompt_once, False),
}


def in_every_step(policy: Policy) -> objectives.LossFn:
  """Return the DPO loss of a batch and the reference model's parameters."""

  def loss_fn(params, inputs, rng):
    del rng
    batch, fixed = inputs
    reference = jax.lax.stop_gradient(policy(fixed, batch))
    weight = jnp.full(len(reference), 1 / len(reference))
    return losses.dpo(policy(params, batch), reference, weight, beta=BETA)

  return loss_fn


def cached(
  folder: pathlib.Path, compute: layers.Compute = ours.COMPUTE
) -> harness.Ready:
  """The package's own: the reference's log-probabilities come with the data."""
  setup = ours.Setup(folder, compute)
  names = ("chosen", "rejected")
  batch = setup.packed(ours.examples(setup.data, names))
  fixed = _in_order(
    setup.compute(objectives.pair_logps(setup.model), batch)
  ).reshape(2, -1)
  batch = setup.packed(ours.examples(setup.data, names, fixed.T))
  loss_fn = objectives.dpo(setup.model, beta=BETA)
  return ours.training(setup, loss_fn, batch, fixed.reshape(-1))


def reference(folder: pathlib.Path) -> harness.Ready:
  """Return the forward pass that the score stage makes once for all epochs."""
  setup = ours.Setup(folder)
  score = objectives.pair_logps(setup.model)
  return ours.scoring(setup, score, _together(setup), _in_order)


def _rung(name: str):
  def make(folder):
    setup = ours.Setup(folder)
    make_policy, separate = POLICIES[name]
    policy = make_policy(setup.model)
    batch = _separate(setup) if separate else _together(setup)
    scores = _in_order(setup.compute(policy, batch))
    inputs = (batch, setup.params)
    return ours.training(setup, in_every_step(policy), inputs, scores)

  return make


RUNGS = {name: _rung(name) for name in POLICIES} | {
  "cached": cached,
  "reference": reference,
}


def _together(setup: ours.Setup):
  return setup.packed(ours.examples(setup.data, ("chosen", "rejected")))


def _separate(setup: ours.Setup):
  chosen = ours.examples(setup.data, ("chosen",))
  return setup.alone([*chosen, *ours.examples(setup.data, ("rejected",))])


def _pairs(token_logps, batch):
  """Return [Q, 2] from [S, M], one answer to a row."""
  sums = jnp.where(batch.loss_answer == 0, token_logps, 0.0).sum(axis=1)
  return sums.reshape(2, -1).T


def _in_order(values: np.ndarray) -> np.ndarray:
  """Return [S] from [R, Q, 2]; equally long examples stay in their order."""
  return values.reshape(-1, 2).T.reshape(-1)
