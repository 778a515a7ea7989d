"""Rules over paths become placements; a dimension that does not divide stays."""

import functools
import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pivot_jax import sharding, trees
from pivot_jax.data import packing
from pivot_jax.errors import InputError
from pivot_jax.models import layers, mllm
from pivot_jax.training import objectives, optimizer
from tests.fixtures import tiny


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


@functools.cache
def _shapes():
  return jax.eval_shape(
    functools.partial(mllm.init_params, tiny.MODEL), jax.random.PRNGKey(0)
  )


def _specs(shapes, mesh):
  placed = trees.flatten(sharding.infer(shapes, mesh))
  return {path: tuple(sharding_.spec) for path, sharding_ in placed.items()}


def test_every_parameter_of_a_model_is_placed(mesh):
  specs = _specs(_shapes(), mesh)
  assert specs.keys() == trees.flatten(_shapes()).keys()
  # Every rule but an untied head's is of use to this model.
  for pattern, _ in sharding.PARAM_RULES:
    if "lm_head" not in pattern:
      trees.split(_shapes(), (pattern,))


def test_matrices_are_split_and_norms_are_whole(mesh):
  specs = _specs(_shapes(), mesh)
  block = "llm/layers/"
  assert specs[block + "mlp/up_proj/kernel"] == (None, "fsdp", "tensor")
  assert specs[block + "mlp/down_proj/kernel"] == (None, "tensor", "fsdp")
  assert specs[block + "self_attn/o_proj/kernel"] == (None, "tensor", "fsdp")
  assert specs[block + "self_attn/q_proj/bias"] == (None, "tensor")
  assert not any(specs[block + "input_layernorm/scale"])
  assert specs["projector/linear_1/kernel"] == ("fsdp", "tensor")
  assert specs["projector/linear_2/kernel"] == ("tensor", "fsdp")
  assert specs["llm/embed_tokens/embedding"] == ("tensor", "fsdp")


def test_most_of_the_weights_are_split(mesh):
  placed = trees.flatten(sharding.infer(_shapes(), mesh))
  whole = [
    leaf.size
    for path, leaf in trees.flatten(_shapes()).items()
    if placed[path].is_fully_replicated
  ]
  assert sum(whole) < 0.1 * trees.count(_shapes())


def test_a_dimension_that_does_not_divide_stays_whole(mesh):
  odd = {"x": {"q_proj": {"kernel": jax.ShapeDtypeStruct((3, 4), "float32")}}}
  assert _specs(odd, mesh)["x/q_proj/kernel"] == (None, "tensor")


def test_placed_parameters_keep_their_values_and_their_source(mesh):
  params = tiny.params()
  placed = sharding.place(params, mesh)
  assert trees.fingerprint(placed) == trees.fingerprint(params)
  kernel = placed["llm"]["layers"]["mlp"]["up_proj"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 16, 24)
  jax.tree.map(lambda x: x.delete(), placed)
  assert np.isfinite(params["llm"]["norm"]["scale"]).all()


def test_deferred_leaves_are_let_go_while_others_are_read(mesh):
  owners, alive = [], []

  def read():
    alive.append(sum(owner() is not None for owner in owners))
    # One byte off what a CPU device would share.
    owner = np.ones(64 * 8 * 4 + 65, np.uint8)
    start = -owner.ctypes.data % 64 + 1
    owners.append(weakref.ref(owner))
    return owner[start : start + 64 * 8 * 4].view(np.float32).reshape(64, 8)

  leaf = trees.Deferred((64, 8), np.dtype(np.float32), read)
  tree = {"llm": {name: {"kernel": leaf} for name in "abcdef"}}
  gc.disable()  # What only a collection lets go of counts as kept.
  try:
    sharding.place(tree, mesh)
  finally:
    gc.enable()
  # jax lets the last one go at its next call.
  assert len(alive) == 6 and max(alive) <= 1


def test_an_optimizer_state_is_placed_like_its_parameters(mesh):
  params = sharding.place(tiny.params(), mesh)
  tx = optimizer.adamw(
    params,
    lr=((".*", 1e-3),),
    factor=optimizer.schedule("constant", steps=1, warmup=0.0),
  )
  shapes = jax.eval_shape(tx.init, params)
  placed = sharding.like_params(shapes, params, mesh)
  assert jax.tree.structure(placed) == jax.tree.structure(shapes)
  wanted = trees.flatten(sharding.infer(params, mesh))
  adam = next(part for part in placed if "mu" in part.__match_args__)
  for moment in (adam.mu, adam.nu):
    assert trees.flatten(moment) == wanted
  assert adam.count.is_fully_replicated


def test_rows_go_over_data_and_fsdp(mesh):
  batch = sharding.place_rows({"tokens": np.zeros((8, 3), np.int32)}, mesh)
  assert batch["tokens"].sharding.spec == PartitionSpec(("data", "fsdp"))
  assert sharding.row_shards(mesh) == 4


def test_a_mesh_takes_what_is_left():
  mesh = sharding.make_mesh({"data": -1, "tensor": 2})
  assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}


@pytest.mark.parametrize(
  "shape, words",
  [({"data": 3}, "needs 3 devices"), ({"dat": 8}, "unknown axes")],
)
def test_a_mesh_that_does_not_fit_is_refused(shape, words):
  with pytest.raises(InputError, match=words):
    sharding.make_mesh(shape)


def test_the_activation_rules_are_read_by_logical_constraints(mesh):
  def fn(x):
    return nn.with_logical_constraint(x, ("rows", "tokens", "embed"))

  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.ACTIVATION_RULES):
    placed = jax.jit(fn)(jnp.zeros((8, 2, 4)))
  assert placed.sharding.shard_shape(placed.shape) == (2, 2, 4)


def test_rows_stay_on_their_devices_in_attention_and_chunks():
  """With parameters on every device, nothing but sums crosses between them."""
  rng = np.random.default_rng(0)
  rows = [
    tiny.example(rng, prompt=5, answers=(9, 7), image=True, name=str(i))
    for i in range(16)
  ]
  layout = packing.layout_for(
    [rows], patches=tiny.PATCHES, image_size=16, row_tokens=56, shards=8
  )
  mesh = sharding.make_mesh({"data": -1})
  batch = sharding.place_rows(packing.pack(rows, layout), mesh)
  model = tiny.MODEL.clone(compute=layers.Compute(attention="xla"))
  loss_fn = objectives.dpo(model, beta=0.1, chunk=24)
  with jax.set_mesh(mesh), layers.logical_rules(sharding.ACTIVATION_RULES):
    params = sharding.place(tiny.params(), mesh)
    grad_fn = jax.jit(jax.grad(loss_fn, has_aux=True))
    text = grad_fn.lower(params, batch, None).compile().as_text()
  assert "all-reduce" in text
  for moved in ("all-gather", "all-to-all", "collective-permute"):
    assert moved not in text
