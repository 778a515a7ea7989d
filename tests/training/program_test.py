"""The compiled update: its products, tensors, casts and memory."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from pivot_jax import sharding, trees
from pivot_jax.data import packing
from pivot_jax.models import layers, qwen2
from pivot_jax.training import (
  cost,
  objectives,
  optimizer,
  train_state,
  train_step,
)
from tests.fixtures import tiny

_JAXPRS = (core.Jaxpr, core.ClosedJaxpr)
# Sizes that no other axis of the program has.
ROWS, TOKENS, CHUNK = 3, 56, 12


def _one_device():
  kinds = (jax.sharding.AxisType.Auto,) * 3
  devices = jax.devices()[:1]
  return jax.make_mesh(
    (1, 1, 1), sharding.AXES, axis_types=kinds, devices=devices
  )


def _batch():
  rng = np.random.default_rng(0)
  rows = [
    tiny.example(rng, prompt=5, answers=(9, 7), image=True, name=str(i))
    for i in range(2 * ROWS)
  ]
  layout = packing.layout_for(
    [rows], patches=tiny.PATCHES, image_size=16, row_tokens=TOKENS
  )
  batch = packing.pack(rows, layout)
  assert batch.tokens.shape == (ROWS, TOKENS)
  return batch


def _tx(trainable, moments="float32"):
  factor = optimizer.schedule("constant", steps=9, warmup=0.0)
  rates = ((".*", 1e-3),)
  return optimizer.adamw(trainable, lr=rates, factor=factor, moments=moments)


def _state(mesh, **settings):
  return train_state.make_state(
    tiny.params(),
    trainable=(".*",),
    tx=_tx,
    mesh=mesh,
    seed=0,
    **settings,
  )


@functools.cache
def _compiled(**compute):
  """Return (program, memory, state) of a compiled DPO update."""
  mesh = _one_device()
  model = tiny.MODEL.clone(compute=layers.Compute(**compute))
  state, tx = _state(mesh)
  loss_fn = objectives.dpo(model, beta=0.1, chunk=CHUNK)
  step_fn = train_step.make_train_step(loss_fn, tx, accum=1, examples=6)
  done = step_fn.lower(state, _batch()).compile()
  return done.as_text(), done.memory_analysis(), state


def _products(jaxpr, times=1):
  """Yield (shapes of both operands, how often) of every matrix product."""
  for equation in jaxpr.eqns:
    repeats = times * equation.params.get("length", 1)
    if equation.primitive.name == "dot_general":
      yield tuple(x.aval.shape for x in equation.invars), times
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: isinstance(x, _JAXPRS)
    ):
      if isinstance(value, core.ClosedJaxpr):
        yield from _products(value.jaxpr, repeats)
      elif isinstance(value, core.Jaxpr):
        yield from _products(value, repeats)


def _count(left, right, *, scan):
  """Return how often an update multiplies matrices of these shapes."""
  model = tiny.MODEL.clone(compute=layers.Compute(attention="xla", scan=scan))
  state, tx = _state(_one_device())
  loss_fn = objectives.dpo(model, beta=0.1, chunk=CHUNK)
  step_fn = train_step.make_train_step(loss_fn, tx, accum=1, examples=6)
  program = jax.make_jaxpr(step_fn)(state, _batch())
  return sum(
    times
    for shapes, times in _products(program.jaxpr)
    if shapes == (left, right)
  )


@pytest.mark.parametrize("scan", [True, False])
def test_an_image_is_encoded_once_and_a_prompt_decoded_once(scan):
  images, pixels = 2 * ROWS * tiny.PATCHES, 8 * 8 * 3
  assert _count((images, pixels), (pixels, 16), scan=scan) == 1
  # The one block of the encoder that is read.
  assert _count((images, 16), (16, 24), scan=scan) == 1
  # up_proj and gate_proj of two blocks, over the tokens of the packed rows.
  assert _count((ROWS * TOKENS, 32), (32, 48), scan=scan) == 4


def _shapes(text):
  return {
    tuple(int(x) for x in found.split(","))
    for found in re.findall(r"[a-z0-9]+\[([\d,]+)\]", text)
  }


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_tensor_spans_the_vocabulary_and_all_tokens(remat):
  text, *_ = _compiled(attention="xla", remat=remat)
  shapes = _shapes(text)
  positions = _batch().loss_target.shape[1]
  # The widest that has the vocabulary is a chunk of positions.
  wide = {s for s in shapes if tiny.VOCAB in s}
  assert any(np.prod(s) == CHUNK * tiny.VOCAB for s in wide)
  largest = max(np.prod(s) for s in wide)
  assert largest < ROWS * positions * tiny.VOCAB < ROWS * TOKENS * tiny.VOCAB
  table = 32 * tiny.VOCAB
  assert largest <= max(CHUNK * tiny.VOCAB, table)


def test_the_state_is_donated_whole():
  _, found, state = _compiled(attention="xla")
  held = sum(
    x.nbytes
    for x in jax.tree.leaves((state.trainable, state.opt_state, state.frozen))
  )
  assert found.alias_size_in_bytes >= held


@pytest.mark.parametrize(
  "remat",
  [
    *("none", "full"),
    *(
      pytest.param(x, marks=pytest.mark.nightly) for x in ("dots", "attention")
    ),
  ],
)
def test_the_memory_that_is_promised_is_what_xla_takes(remat):
  mesh = _one_device()
  model = tiny.MODEL.clone(compute=layers.Compute(remat=remat))
  state, _ = _state(mesh)
  batch = cost.rows_at_once(_batch(), 256)
  objective = functools.partial(objectives.dpo, beta=0.1, chunk=CHUNK)
  found = cost.estimate_memory(
    state,
    objective,
    model,
    batch,
    accum=1,
    shards=1,
    chunk=CHUNK,
    available=None,
  )

  def gradients(trainable, batch):
    grad_fn = jax.grad(objective(model), has_aux=True)
    return grad_fn(trainable, batch, None)[0]

  done = jax.jit(gradients).lower(state.trainable, batch).compile()
  taken = done.memory_analysis().temp_size_in_bytes
  promised = found.parts["activations"] + found.parts.get("a block again", 0)
  assert promised == pytest.approx(taken, rel=0.35)


def test_less_is_kept_the_more_is_computed_again():
  mesh = _one_device()
  state, _ = _state(mesh)

  def kept(remat):
    model = tiny.MODEL.clone(compute=layers.Compute(remat=remat))
    loss_fn = objectives.dpo(model, beta=0.1, chunk=CHUNK)
    return cost.activation_bytes(loss_fn, state, _batch())

  sizes = [kept(name) for name in layers.REMATS]
  assert layers.REMATS == ("none", "attention", "dots", "full")
  assert sizes[0] > sizes[2] > sizes[1] > sizes[3]


def test_an_estimate_counts_parts_devices_logits_and_copies():
  state, _ = _state(_one_device())
  batch = cost.rows_at_once(_batch(), 64)

  def estimate(dtype="float32", **settings):
    how = dict(accum=1, shards=1, chunk=CHUNK, available=None) | settings
    model = tiny.MODEL.clone(compute=layers.Compute(dtype=dtype))
    objective = functools.partial(objectives.dpo, beta=0.1, chunk=how["chunk"])
    return cost.estimate_memory(state, objective, model, batch, **how).parts

  whole, parts, spread = estimate(), estimate(accum=4), estimate(shards=4)
  for fewer in (parts, spread):
    assert fewer["activations"] == pytest.approx(
      whole["activations"] / 4, rel=0.05
    )
  assert parts["gradients"] == 2 * whole["gradients"]
  assert parts["batches"] == whole["batches"] == 4 * spread["batches"]
  assert whole["logits"] == 2 * 4 * CHUNK * tiny.VOCAB
  # Copies of kernels are counted once, and activations take half the bytes.
  kernels = sum(
    x.nbytes
    for path, x in trees.flatten(state.trainable).items()
    if path.endswith("/kernel")
  )
  half = estimate(dtype="bfloat16")
  assert half["parameters"] == whole["parameters"] + kernels // 2
  assert half["activations"] < 0.8 * whole["activations"]


def test_an_estimate_that_does_not_fit_says_what_to_change():
  found = cost.Estimate({"parameters": 8, "activations": 30}, available=20)
  assert not found.fits
  assert "remat" in cost.advice(found)
  found = cost.Estimate({"optimizer": 30, "activations": 8}, available=None)
  assert found.fits
  assert "fsdp" in cost.advice(found)


def test_kernels_are_cast_once_an_update_and_nothing_changes():
  """The same gradients as casts at each use, accumulated in float32."""
  mesh = _one_device()
  model = tiny.MODEL.clone(compute=layers.Compute(dtype="bfloat16"))
  loss_fn = objectives.dpo(model, beta=0.1)
  state, _ = _state(mesh)
  batch = jax.tree.map(jnp.asarray, _batch())

  def run(dtype, accum):
    gradients = train_step._gradients(loss_fn, accum, dtype)
    return jax.jit(gradients)(state, batch, state.rng)

  (loss, _), there = run("float32", 1)
  expected = trees.flatten(there)
  # The gradient of a key's bias is rounding alone: its kernel's gives the size.
  largest = collections.defaultdict(float)
  for path, values in expected.items():
    module = path.rpartition("/")[0]
    largest[module] = max(largest[module], float(np.abs(values).max()))
  for accum in (1, 3):
    (cast_loss, _), here = run("bfloat16", accum)
    np.testing.assert_allclose(cast_loss, loss, rtol=1e-2 if accum > 1 else 0)
    for path, values in trees.flatten(here).items():
      assert values.dtype == jnp.float32
      # Of parts, sums are rounded in other places.
      limit = 2e-2 if accum > 1 else 1e-6
      limit *= largest[path.rpartition("/")[0]]
      np.testing.assert_allclose(
        values, expected[path], rtol=0, atol=limit, err_msg=path
      )


def _casts(jaxpr, shape, inside=False):
  """Yield whether a loop holds it, for each cast of this shape to bfloat16."""
  for equation in jaxpr.eqns:
    if (
      equation.primitive.name == "convert_element_type"
      and equation.invars[0].aval.shape == shape
      and equation.invars[0].aval.dtype == jnp.float32
      and equation.outvars[0].aval.dtype == jnp.bfloat16
    ):
      yield inside
    again = equation.primitive.name in ("scan", "while")
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: isinstance(x, _JAXPRS)
    ):
      if isinstance(value, core.ClosedJaxpr):
        yield from _casts(value.jaxpr, shape, inside or again)
      elif isinstance(value, core.Jaxpr):
        yield from _casts(value, shape, inside or again)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_loop_casts_a_kernel(dtype):
  """Over parts or layers; a stack of kernels in the first, one in the other."""
  model = tiny.MODEL.clone(compute=layers.Compute(dtype="bfloat16"))
  state, tx = _state(_one_device())
  step_fn = train_step.make_train_step(
    objectives.dpo(model, beta=0.1), tx, accum=3, examples=6, dtype=dtype
  )
  program = jax.make_jaxpr(step_fn)(state, _batch()).jaxpr
  stacked = list(_casts(program, (2, 32, 48)))
  single = list(_casts(program, (32, 48)))
  if dtype == "bfloat16":
    # gate_proj and up_proj, once each.
    assert stacked == [False, False] and not single
  else:
    assert any(single)


@pytest.mark.parametrize("module", ["llm/embed_tokens", "vision/encoder"])
def test_gradients_of_what_all_tokens_share_are_summed_in_float32(module):
  """A bias and a token that occurs everywhere, of thousands of summands."""
  count = 4096
  if module == "llm/embed_tokens":
    table = qwen2.Embedding(tiny.LLM)
    params = table.init(jax.random.PRNGKey(0), jnp.zeros((1, 1), jnp.int32))

    def output(params):
      tokens = jnp.zeros((1, count), jnp.int32)
      return table.apply(params, tokens).astype(jnp.bfloat16)
  else:
    layer = layers.Linear(
      8, dtype="bfloat16", kernel_init=jax.nn.initializers.zeros
    )
    x = jnp.zeros((1, count, 4))
    params = layer.init(jax.random.PRNGKey(0), x)

    def output(params):
      return layer.apply(params, x)

  summand = float(jnp.bfloat16(0.4))
  gradients = jax.grad(
    lambda p: (jnp.bfloat16(0.4) * output(p)).astype(jnp.float32).sum()
  )(params)
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradients))
  assert largest == pytest.approx(count * summand, rel=1e-4)


def test_what_is_frozen_is_held_in_the_dtype_of_the_products():
  mesh = _one_device()
  state, _ = train_state.make_state(
    tiny.params(),
    trainable=("projector/.*",),
    tx=_tx,
    mesh=mesh,
    seed=0,
    dtype="bfloat16",
  )
  for path, leaf in trees.flatten(state.frozen).items():
    kernel = path.endswith("/kernel")
    assert leaf.dtype == (jnp.bfloat16 if kernel else jnp.float32), path
  for leaf in jax.tree.leaves((state.trainable, state.opt_state)):
    assert leaf.dtype != jnp.bfloat16
