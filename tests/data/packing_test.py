"""Packed rows are separate sequences, in loss and in every gradient."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivot_jax import trees
from pivot_jax.data import packing
from pivot_jax.errors import InputError
from pivot_jax.models import mllm
from pivot_jax.training import objectives
from tests.fixtures import tiny

# One layout for all drawn updates, so that a loss is compiled once.
LAYOUT = packing.Layout(
  rows=3,
  examples=5,
  tokens=96,
  images=5,
  image_size=16,
  patches=tiny.PATCHES,
  sequences=10,
  sequence=64,
  copies=2,
  losses=160,
  pairs=5,
)
# The most sequences that three rows of five pairs hold.
SEQUENCES = 30
BETA = 0.1
# Relative; float32 sums in another order.
TOLERANCE = 2e-5


@pytest.fixture(autouse=True, scope="module")
def _compiled_as_for_users():
  """Optimize: what is compiled quickly rounds more, beyond the tolerance."""
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, False)
  yield
  jax.config.update(name, before)


# --- the reference: one plain causal sequence a row, full logits -------------


def _sequences(examples):
  """Return one padded row for each (prompt, answer), in stream order."""
  width = LAYOUT.sequence
  tokens = np.zeros((SEQUENCES, width), np.int32)
  patch = np.full((SEQUENCES, width), -1, np.int32)
  valid = np.zeros((SEQUENCES, width), np.int32)
  target = np.zeros((SEQUENCES, width), bool)
  images = np.zeros((SEQUENCES, 1, 16, 16, 3), np.uint8)
  row = 0
  for example in examples:
    for answer, answer_flags in zip(example.answers, example.answer_targets):
      ids, spots, flags = [], [], []
      for token, flag in zip(example.prompt, example.prompt_targets):
        if token == packing.IMAGE_TOKEN:
          ids += [0] * tiny.PATCHES
          spots += range(tiny.PATCHES)
          flags += [False] * tiny.PATCHES
          images[row, 0] = example.images[0]
        else:
          ids.append(token)
          spots.append(-1)
          flags.append(flag)
      ids += list(answer)
      spots += [-1] * len(answer)
      flags += list(answer_flags)
      tokens[row, : len(ids)] = ids
      patch[row, : len(ids)] = spots
      valid[row, : len(ids)] = 1
      target[row, : len(ids)] = flags
      row += 1
  return types.SimpleNamespace(
    tokens=tokens, patch=patch, valid=valid, target=target, images=images
  )


def _reference_logps(params, tokens, patch, valid, images):
  """Return log p(token i | tokens before i) [N, L-1] for i = 1, 2, ..."""
  variables = {"params": params}
  batch = types.SimpleNamespace(
    tokens=tokens,
    positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
    segments=valid,
    branches=jnp.zeros_like(tokens),
    image_index=patch,
    images=images,
  )
  seen = tiny.MODEL.apply(variables, images[:, 0], method="encode")
  visual = tiny.MODEL.apply(variables, seen, method="project")
  x = tiny.MODEL.apply(variables, visual, batch, method="embed")
  hidden = tiny.MODEL.apply(variables, x, batch, method="decode")
  logits = hidden @ params["llm"]["embed_tokens"]["embedding"].T
  logps = jax.nn.log_softmax(logits)[:, :-1]
  return jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]


@jax.jit
@jax.value_and_grad
def _reference_sft(params, tokens, patch, valid, images, weight):
  logps = _reference_logps(params, tokens, patch, valid, images)
  return -(weight[:, 1:] * logps).sum()


@jax.jit
@jax.value_and_grad
def _reference_dpo(params, tokens, patch, valid, images, target, held, count):
  logps = _reference_logps(params, tokens, patch, valid, images)
  sums = (target[:, 1:] * logps).sum(-1).reshape(-1, 2)
  margin = (sums[:, 0] - sums[:, 1]) - (held[:, 0] - held[:, 1])
  term = jnp.log1p(jnp.exp(-BETA * margin))
  return jnp.where(jnp.arange(len(term)) < count, term, 0).sum() / count


def _sft_weight(plain, examples):
  """Pairs of examples: token mean in each, plain mean over them (paper 2.4)."""
  counts = plain.target[:, 1:].sum(-1)
  groups = -(-len(examples) // 2)
  weight = np.zeros(plain.target.shape, np.float32)
  for first in range(0, len(examples), 2):
    rows = slice(first, min(first + 2, len(examples)))
    weight[rows] = plain.target[rows] / max(1, counts[rows].sum()) / groups
  return weight


# --- the packed side ---------------------------------------------------------


def _value_and_grad(loss):
  def fn(params, batch):
    return loss(params, batch, None)

  graded = jax.jit(jax.value_and_grad(fn, has_aux=True))

  def call(batch):
    (value, _), grads = graded(tiny.params(), batch)
    return value, grads

  return call


@functools.cache
def _packed(kind):
  if kind == "sft":
    return _value_and_grad(objectives.sft(tiny.MODEL, chunk=64))
  return _value_and_grad(objectives.dpo(tiny.MODEL, beta=BETA, chunk=64))


def _error(found, wanted):
  """Return the largest relative error of the loss and of any gradient leaf.

  A leaf whose gradient is zero by symmetry is held to a thousandth of the norm
  of the whole gradient.
  """
  (loss, grads), (want_loss, want_grads) = found, wanted
  flat, want = trees.flatten(grads), trees.flatten(want_grads)
  norm = np.sqrt(sum(np.square(np.float64(x)).sum() for x in want.values()))
  worst = abs(float(loss) - float(want_loss)) / abs(float(want_loss))
  for path in want:
    size = np.linalg.norm(np.float64(want[path])) + 1e-3 * norm
    difference = np.linalg.norm(np.float64(flat[path] - want[path]))
    worst = max(worst, difference / size)
  return worst


def _sft_error(examples):
  batch = packing.pack(examples, LAYOUT, sft_group=2)
  plain = _sequences(examples)
  weight = _sft_weight(plain, examples)
  wanted = _reference_sft(
    tiny.params(), plain.tokens, plain.patch, plain.valid, plain.images, weight
  )
  return _error(_packed("sft")(batch), wanted)


def _dpo_error(examples, packed=None):
  batch = packing.pack(examples, LAYOUT)
  plain = _sequences(examples)
  held = np.zeros((SEQUENCES // 2, 2), np.float32)
  held[: len(examples)] = [example.reference for example in examples]
  wanted = _reference_dpo(
    tiny.params(),
    *(plain.tokens, plain.patch, plain.valid, plain.images),
    *(plain.target, held, len(examples)),
  )
  return _error((packed or _packed("dpo"))(batch), wanted)


# --- drawn updates -----------------------------------------------------------


@st.composite
def updates(draw, answers):
  """Examples that fit LAYOUT; prompts 1-12, answers 1-40 tokens, some images.

  An example that would need a fourth row is left out.
  """
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  long = st.sampled_from([1, 1, 2, 3, 5, 8, 13, 40])
  chosen = []
  for number in range(draw(st.integers(1, 15))):
    example = tiny.example(
      rng,
      prompt=draw(st.integers(1, 12)),
      answers=[draw(long) for _ in range(answers)],
      image=draw(st.booleans()),
      name=str(number),
    )
    try:
      packing.pack([*chosen, example], LAYOUT)
    except InputError:
      continue
    chosen.append(example)
  return chosen


def _full_row(answers):
  """Return examples of which pairs fill three rows to their last tokens."""
  rng = np.random.default_rng(7)
  # 96 tokens a row, as 52 + 44; the images are four tokens each.
  sizes = [(8, (40,), True), (4, (40,), False), (5, (40,), True)]
  sizes += [(7, (40,), False), (6, (40,), True), (6, (40,), False)]
  if answers == 2:
    sizes = [(7, (1, 40), True), (3, (40, 1), False), (2, (40, 40), True)]
    sizes += [(2, (4, 4), False), (10, (25, 25), False), (2, (15, 15), True)]
  return [
    tiny.example(rng, prompt=p, answers=a, image=i, name=str(n))
    for n, (p, a, i) in enumerate(sizes)
  ]


@settings(max_examples=15)
@given(updates(answers=1))
def test_packed_sft_rows_equal_separate_sequences(examples):
  assert _sft_error(examples) < TOLERANCE


@settings(max_examples=15)
@given(updates(answers=2))
def test_packed_dpo_rows_equal_separate_sequences(examples):
  assert _dpo_error(examples) < TOLERANCE


@pytest.mark.parametrize("answers, error", [(1, _sft_error), (2, _dpo_error)])
def test_a_row_filled_to_its_last_token_equals_separate_sequences(
  answers, error
):
  examples = _full_row(answers)
  batch = packing.pack(examples, LAYOUT)
  assert (batch.segments > 0).all()
  assert error(examples) < TOLERANCE


def test_a_branch_that_sees_its_sibling_is_noticed(monkeypatch):
  right = mllm.attention_mask
  monkeypatch.setattr(
    mllm,
    "attention_mask",
    lambda segments, branches: right(segments, jnp.zeros_like(branches)),
  )
  mutant = _value_and_grad(objectives.dpo(tiny.MODEL, beta=BETA, chunk=64))
  assert _dpo_error(_full_row(2), mutant) > 100 * TOLERANCE


def test_a_neighbour_that_is_seen_is_noticed(monkeypatch):
  right = mllm.attention_mask
  monkeypatch.setattr(
    mllm,
    "attention_mask",
    lambda segments, branches: right(
      jnp.minimum(segments, 1), jnp.where(segments > 0, branches, 0)
    ),
  )
  mutant = _value_and_grad(objectives.dpo(tiny.MODEL, beta=BETA, chunk=64))
  assert _dpo_error(_full_row(2), mutant) > 100 * TOLERANCE


def test_pairs_of_one_prompt_equal_examples_of_their_own():
  """Four answers to one image: the loss and gradients of two separate pairs."""
  rng = np.random.default_rng(3)
  group = tiny.example(rng, prompt=5, answers=[7, 4, 6, 9], image=True)
  group = dataclasses.replace(group, reference=[(-9.0, -8.0), (-7.0, -6.5)])
  alone = [
    dataclasses.replace(
      group,
      answers=group.answers[2 * k : 2 * k + 2],
      answer_targets=group.answer_targets[2 * k : 2 * k + 2],
      reference=group.reference[k],
    )
    for k in range(2)
  ]
  wide = dataclasses.replace(LAYOUT, copies=4)

  def packed(_):
    return _packed("dpo")(packing.pack([group], wide))

  assert _dpo_error(alone, packed) < TOLERANCE
  swapped = [
    dataclasses.replace(x, reference=alone[0].reference) for x in alone
  ]
  assert _dpo_error(swapped, packed) > 10 * TOLERANCE
