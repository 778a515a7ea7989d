"""The fast paths give the plain path's loss and gradients.

Causal sequences, chunks and recomputation, alone and together, beside one mask
over the packed row, one chunk and no recomputation.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pivot_jax import trees
from pivot_jax.data import packing
from pivot_jax.models import layers
from pivot_jax.training import objectives
from tests.fixtures import tiny

PLAIN = layers.Compute()


def _pairs(rng):
  """Return pairs of ragged answers, one without an image."""
  lengths = [((9, 4), True), ((1, 12), True), ((6, 6), False), ((2, 3), True)]
  return [
    tiny.example(rng, prompt=5 + i, answers=answers, image=image, name=str(i))
    for i, (answers, image) in enumerate(lengths)
  ]


def _answers(rng):
  """Return supervised examples, two of them without an image."""
  lengths = [(9, True), (1, False), (12, True), (4, False), (7, True)]
  return [
    tiny.example(rng, prompt=4 + i, answers=(n,), image=image, name=str(i))
    for i, (n, image) in enumerate(lengths)
  ]


def _without_images(rng):
  return [
    tiny.example(rng, prompt=6, answers=(n, 5), image=False, name=str(n))
    for n in (3, 8, 5)
  ]


@functools.cache
def _batch(examples):
  rows = examples(np.random.default_rng(0))
  layout = packing.layout_for(
    [rows], patches=tiny.PATCHES, image_size=16, row_tokens=80
  )
  batch = packing.pack(rows, layout, sft_group=2)
  # An update may leave a row empty.
  empty = packing.empty(dataclasses.replace(layout, rows=1))
  batch = jax.tree.map(lambda *x: np.concatenate(x), batch, empty)
  several = np.bincount(batch.segments[0][batch.segments[0] > 0])
  assert len(several) > 2, "a row has to hold several examples"
  scores = batch.sequences.shape[1] * batch.sequences.shape[2] ** 2
  assert scores < 80**2, "the sequences have to be the smaller path"
  return batch


def _run(compute, examples, *, chunk=4096):
  model = tiny.MODEL.clone(compute=compute)
  if examples is _answers:
    loss_fn = objectives.sft(model, chunk=chunk)
  else:
    loss_fn = objectives.dpo(model, beta=0.1, chunk=chunk)
  grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  (loss, metrics), gradients = grad_fn(tiny.params(), _batch(examples), None)
  return float(loss), metrics, trees.flatten(gradients)


@functools.cache
def _plain(examples):
  return _run(PLAIN, examples)


def _module(path):
  return path.rpartition("/")[0]


@pytest.mark.parametrize("examples", [_answers, _pairs, _without_images])
@pytest.mark.parametrize(
  ("compute", "chunk"),
  [
    (layers.Compute(attention="xla"), 4096),
    (layers.Compute(attention="xla", scan=False), 4096),
    (PLAIN, 7),
    (layers.Compute(attention="xla", remat="full"), 7),
    # What the others do in other combinations.
    *(
      pytest.param(*case, marks=pytest.mark.nightly)
      for case in (
        (layers.Compute(remat="attention"), 4096),
        (layers.Compute(remat="dots"), 4096),
        (layers.Compute(attention="xla", remat="attention"), 7),
      )
    ),
  ],
  ids=str,
)
def test_a_fast_path_gives_the_plain_loss_and_gradients(
  examples, compute, chunk
):
  loss, metrics, gradients = _run(compute, examples, chunk=chunk)
  plain_loss, plain_metrics, plain_gradients = _plain(examples)
  np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
  for name, (total, count) in plain_metrics.items():
    np.testing.assert_allclose(metrics[name][0], total, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(metrics[name][1], count)
  largest = {}
  for path, values in plain_gradients.items():
    size = float(np.abs(values).max())
    largest[_module(path)] = max(size, largest.get(_module(path), 0.0))
  assert sum(size > 1e-4 for size in largest.values()) > 10
  for path, values in plain_gradients.items():
    np.testing.assert_allclose(
      gradients[path],
      values,
      rtol=0,
      atol=1e-5 * largest[_module(path)],
      err_msg=path,
    )
