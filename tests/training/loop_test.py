"""One update: accumulation, meshes, what is frozen, what a NaN leaves."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pivot_jax import sharding, trees
from pivot_jax.data import feed, packing
from pivot_jax.training import (
  loop,
  objectives,
  optimizer,
  train_state,
  train_step,
)
from tests.fixtures import tiny

# Sums of float32 in another order: relative to the size of what is compared.
TOLERANCE = 1e-6
ALL = (".*",)


@pytest.fixture(scope="module")
def update():
  """Return eight rows of unequal size, as host arrays."""
  rng = np.random.default_rng(3)
  examples = [
    tiny.example(rng, prompt=p, answers=[a], image=i, name=str(n))
    for n, (p, a, i) in enumerate(
      [(3, 20, True), (9, 1, False), (2, 2, True), (1, 25, False)]
      + [(8, 7, True), (4, 22, True), (6, 15, True), (3, 10, False)]
      + [(5, 3, False), (2, 6, True)]
    )
  ]
  layout = packing.layout_for([examples], patches=4, image_size=16, shards=8)
  assert layout.rows == 8
  batch = packing.pack(examples, layout, sft_group=2)
  sizes = (batch.loss_weight > 0).sum(1)
  assert len(set(sizes.tolist())) > 2
  return batch


def _one_device():
  return jax.make_mesh(
    (1, 1, 1),
    sharding.AXES,
    devices=jax.devices()[:1],
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )


def _sgd(_):
  return optax.sgd(0.1)


def _loss():
  return objectives.sft(tiny.MODEL, chunk=64)


def _run(update, *, mesh, accum=1, trainable=ALL, tx=_sgd, steps=1):
  """Return (host state before, state after, host metrics of each step).

  Whatever the mesh and the number of steps, the update is compiled once.
  """
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.ACTIVATION_RULES):
    state, tx = train_state.make_state(
      tiny.params(), trainable=trainable, tx=tx, mesh=mesh, seed=0
    )
    before = jax.device_get(state)
    step_fn = train_step.make_train_step(
      _loss(),
      tx,
      accum=accum,
      examples=12,
      shardings=jax.tree.map(lambda x: x.sharding, state),
    )
    batch = sharding.place_rows(update, mesh)
    seen = []
    for _ in range(steps):
      state, metrics = step_fn(state, batch)
      seen.append(loop.means(jax.device_get(metrics)))
  assert step_fn._cache_size() == 1
  return before, state, seen


@pytest.fixture(scope="module")
def whole(update):
  """Return one SGD update of all rows at once on one device."""
  return _run(update, mesh=_one_device())


def _difference(found, wanted):
  """Return |found - wanted| / |wanted| over all leaves."""
  return trees.relative_change(jax.device_get(wanted), jax.device_get(found))


def _change(run):
  before, after, _ = run
  return jax.tree.map(
    lambda a, b: np.float64(a) - np.float64(b),
    jax.device_get(after.trainable),
    before.trainable,
  )


def _assert_same_update(run, wanted):
  assert run[2][0]["losses/total"] == pytest.approx(
    wanted[2][0]["losses/total"], rel=TOLERANCE
  )
  assert _difference(run[1].trainable, wanted[1].trainable) < TOLERANCE
  # The change itself, too: the parameters alone would hide a small one. It is
  # a difference of float32 parameters, hence the wider bound.
  assert _difference(_change(run), _change(wanted)) < 100 * TOLERANCE


def test_eight_parts_of_one_row_equal_one_part_of_eight_rows(update, whole):
  run = _run(update, mesh=_one_device(), accum=8)
  _assert_same_update(run, whole)
  # Every metric is that of the update, not of a part.
  assert run[2][0] == pytest.approx(whole[2][0], rel=1e-5)


def test_an_update_moves_the_parameters(whole):
  before, after, _ = whole
  change = trees.relative_change(
    before.trainable, jax.device_get(after.trainable)
  )
  assert change > 1e-3


@pytest.mark.parametrize("accum", [1, 2])
def test_eight_devices_equal_one(update, whole, accum):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  run = _run(update, mesh=mesh, accum=accum)
  spread = trees.flatten(run[1].trainable)
  kernel = spread["llm/layers/mlp/gate_proj/kernel"]
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size
  _assert_same_update(run, whole)


def test_rows_that_do_not_divide_into_the_parts_are_refused(update):
  with pytest.raises(ValueError, match="8 rows do not divide into 3"):
    _run(update, mesh=_one_device(), accum=3)


def _adamw(tree):
  return optimizer.adamw(
    tree,
    lr=(("projector/.*", 1e-2), (".*", 1e-3)),
    factor=optimizer.schedule("cosine", steps=10, warmup=0.2),
  )


@pytest.fixture(scope="module")
def projector_run(update):
  """Return three AdamW updates of the projector alone."""
  return _run(
    update,
    mesh=_one_device(),
    trainable=("projector/.*",),
    tx=_adamw,
    steps=3,
  )


def test_frozen_leaves_stay_bitwise_and_have_no_optimizer_state(projector_run):
  before, after, _ = projector_run
  assert set(after.trainable) == {"projector"}
  assert set(after.frozen) == {"llm", "vision"}
  assert trees.fingerprint(after.frozen) == trees.fingerprint(before.frozen)
  paths = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(after.opt_state)
  ]
  assert any("projector" in path for path in paths)
  assert not any("llm" in path or "vision" in path for path in paths)
  assert trees.relative_change(before.trainable, after.trainable) > 1e-3


def _norms(update):
  """Return the norm of each part's gradient, in float64 from the leaves."""
  params = tiny.params()
  grads = jax.grad(lambda p: _loss()(p, update, None)[0])(params)
  flat = {p: np.float64(x) for p, x in trees.flatten(grads).items()}
  return {
    part: sum((x**2).sum() for p, x in flat.items() if p.split("/")[0] == part)
    ** 0.5
    for part in params
  }


@pytest.mark.parametrize(
  "accum", [pytest.param(1, marks=pytest.mark.nightly), 4]
)
def test_each_part_has_the_norm_of_its_own_gradient(update, accum):
  *_, (found,) = _run(update, mesh=_one_device(), accum=accum)
  wanted = _norms(update)
  assert set(wanted) == {"vision", "projector", "llm"}
  assert len({round(norm, 4) for norm in wanted.values()}) == 3
  for part, norm in wanted.items():
    assert found[f"grad_norm/{part}"] == pytest.approx(norm, rel=1e-5), part
  total = sum(norm**2 for norm in wanted.values()) ** 0.5
  assert found["grad_norm"] == pytest.approx(total, rel=1e-5)


def test_a_frozen_part_has_no_norm(update, projector_run):
  *_, seen = projector_run
  for found in seen:
    names = {name for name in found if name.startswith("grad_norm")}
    assert names == {"grad_norm", "grad_norm/projector"}
    assert found["grad_norm"] == found["grad_norm/projector"]
  wanted = _norms(update)["projector"]
  assert seen[0]["grad_norm"] == pytest.approx(wanted, rel=1e-5)


def test_params_of_gives_the_whole_tree_again(projector_run):
  assert not trees.diff(tiny.params(), train_state.params_of(projector_run[1]))


def test_steps_and_examples_are_counted(projector_run):
  assert int(projector_run[1].step) == 3
  assert int(projector_run[1].examples) == 36


# --- a model of one line, where a test needs no MLLM -------------------------


def _line(params, batch, rng):
  del rng
  loss = (batch * params["a"]["w"][None]).sum() + 2 * (
    batch * params["b"]["w"][None]
  ).sum()
  return loss, {"rows": (batch.sum(), jnp.ones(()))}


def _line_state(tx, trainable=ALL):
  params = {"a": {"w": np.ones(2, np.float32)}, "b": {"w": np.ones(2, "f4")}}
  state, tx = train_state.make_state(
    params, trainable=trainable, tx=tx, mesh=_one_device(), seed=0
  )
  step_fn = train_step.make_train_step(_line, tx, accum=1, examples=2)
  return params, state, step_fn


def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was():
  _, state, step_fn = _line_state(_adamw_line)
  good = jnp.ones((2, 2))
  state, _ = step_fn(state, good)
  state, _ = step_fn(state, good)
  before = jax.device_get(state)
  state, metrics = step_fn(state, good.at[0, 0].set(jnp.nan))
  assert loop.means(jax.device_get(metrics))["finite"] == 0.0
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state)):
    np.testing.assert_array_equal(a, np.asarray(b))
  state, metrics = step_fn(state, good)
  assert loop.means(jax.device_get(metrics))["finite"] == 1.0
  assert int(state.step) == 3
  assert (state.trainable["a"]["w"] != before.trainable["a"]["w"]).all()


def _adamw_line(tree):
  return optimizer.adamw(
    tree,
    lr=(("a/.*", 1.0), ("b/.*", 0.25)),
    factor=optimizer.schedule("cosine", steps=234, warmup=0.03),
  )


def test_the_first_update_moves_nothing_and_the_peak_is_at_eight_of_234():
  _, state, step_fn = _line_state(_adamw_line)
  moved = []
  for _ in range(11):
    old = np.asarray(state.trainable["a"]["w"]).copy()
    state, _ = step_fn(state, jnp.ones((2, 2)))
    moved.append(float((old - np.asarray(state.trainable["a"]["w"]))[0]))
  # Of a constant gradient AdamW moves by its rate, sign(gradient) * lr.
  ramp = [t / 8 for t in range(8)]
  fall = [0.5 * (1 + np.cos(np.pi * t / 226)) for t in range(3)]
  np.testing.assert_allclose(moved, ramp + fall, atol=1e-5)


def test_each_path_moves_at_its_own_rate():
  params, state, step_fn = _line_state(_adamw_line)
  for _ in range(3):
    state, _ = step_fn(state, jnp.ones((2, 2)))
  change = {
    name: float((params[name]["w"] - np.asarray(state.trainable[name]["w"]))[0])
    for name in ("a", "b")
  }
  assert change["a"] == pytest.approx(4 * change["b"], rel=1e-5)
  assert change["a"] == pytest.approx(0 + 1 / 8 + 2 / 8, rel=1e-5)


def test_the_state_is_donated_and_the_given_parameters_are_not():
  params, state, step_fn = _line_state(_sgd)
  old = state.trainable["a"]["w"]
  step_fn(state, jnp.ones((2, 2)))
  assert old.is_deleted()
  np.testing.assert_array_equal(params["a"]["w"], np.ones(2))


def test_updates_share_one_compilation(update):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  _, state, _ = _run(
    update, mesh=mesh, trainable=("projector/.*",), tx=_adamw, steps=3
  )
  assert int(state.step) == 3


# --- the loop ----------------------------------------------------------------


@dataclasses.dataclass
class _Recorder:
  """Writes down what a hook is shown, in order."""

  every: int
  seen: list

  def metrics(self, step, metrics, update, wait):
    self.seen.append(("metrics", step, update.ids[0]))

  def due(self, step):
    return step % self.every == 0

  def state(self, state, step):
    assert int(state.step) == step
    self.seen.append(("state", step))


def _updates():
  for number in range(100):
    yield feed.Update(jnp.ones((2, 2)), (f"row{number}",), number)


def test_a_hook_sees_every_update_and_states_after_their_metrics():
  _, state, step_fn = _line_state(_sgd)
  hook = _Recorder(2, [])
  loop.fit(state, step_fn, _updates(), num_steps=5, hooks=[hook])
  assert hook.seen == [
    ("metrics", 1, "row0"),
    ("metrics", 2, "row1"),
    ("state", 2),
    ("metrics", 3, "row2"),
    ("metrics", 4, "row3"),
    ("state", 4),
    ("metrics", 5, "row4"),
    ("state", 5),
  ]


def test_a_stopped_run_shows_its_last_state():
  _, state, step_fn = _line_state(_sgd)
  hook = _Recorder(100, [])
  last = loop.fit(
    state,
    step_fn,
    _updates(),
    num_steps=50,
    hooks=[hook],
    should_stop=lambda: len(hook.seen) >= 2,
  )
  assert int(last.step) == 3
  assert hook.seen[-1] == ("state", 3)


class _Losses:
  """A hook that keeps the losses and reads the state after each update."""

  def __init__(self):
    self.losses, self.steps = [], []

  def metrics(self, step, values, update, wait):
    del step, update, wait
    self.losses.append(values["losses/total"])

  def due(self, step):
    return step == 1

  def state(self, state, step):
    del step
    self.steps.append(int(jax.device_get(state.step)))


def _fit_guarded(update, place):
  """Run two updates where implicit transfers raise; return the hook.

  On a CPU that is the way of arrays to the devices; reading one back copies
  nothing there, and is not noticed.
  """
  mesh, seen = _one_device(), _Losses()
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.ACTIVATION_RULES):
    state, tx = train_state.make_state(
      tiny.params(), trainable=ALL, tx=_sgd, mesh=mesh, seed=0
    )
    step_fn = train_step.make_train_step(
      _loss(),
      tx,
      accum=1,
      examples=12,
      shardings=jax.tree.map(lambda x: x.sharding, state),
    )
    updates = (feed.Update(place(update, mesh), (), 0) for _ in range(2))
    with jax.transfer_guard("disallow"):
      loop.fit(state, step_fn, updates, num_steps=2, hooks=[seen])
  return seen


def test_the_loop_transfers_nothing_implicitly(update, whole):
  seen = _fit_guarded(update, sharding.place_rows)
  assert seen.steps == [1, 2] and len(seen.losses) == 2
  assert seen.losses[0] == whole[2][0]["losses/total"]


def test_a_batch_that_is_not_placed_is_an_implicit_transfer(update):
  with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
    _fit_guarded(update, lambda batch, mesh: batch)
