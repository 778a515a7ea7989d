"""A training goes on from what it saved; what is damaged is named."""

import gc
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pivot_jax import sharding, trees
from pivot_jax.errors import InputError
from pivot_jax.weights import resumable
from tests.weights import damage


def _state(step):
  return {
    "step": jnp.int32(step),
    "w": jnp.asarray(
      np.random.default_rng(step).normal(size=(64, 32)), jnp.float32
    ),
  }


def _target():
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    _state(0),
  )


def _saved(folder, steps):
  saver = resumable.Resumable(folder)
  for step in steps:
    saver.save(step, _state(step), {"examples": 10 * step})
  saver.close()


def test_the_newest_state_comes_back_bit_for_bit(tmp_path):
  _saved(tmp_path, [1, 2, 3])
  saver = resumable.Resumable(tmp_path)
  step, state, note = saver.restore(_target())
  saver.close()
  assert (step, note) == (3, {"examples": 30})
  np.testing.assert_array_equal(state["w"], _state(3)["w"])
  # Two are kept.
  assert not (tmp_path / "1").exists()


def test_nothing_saved_gives_none(tmp_path):
  saver = resumable.Resumable(tmp_path)
  assert saver.restore(_target()) is None
  saver.close()


@damage.BROKEN_READ
def test_a_damaged_newest_state_is_marked_and_the_one_before_taken(tmp_path):
  _saved(tmp_path, [1, 2])
  damage.flip(damage.data_file(tmp_path / "2"))
  saver = resumable.Resumable(tmp_path)
  step, state, note = saver.restore(_target())
  assert (step, note) == (1, {"examples": 10})
  np.testing.assert_array_equal(state["w"], _state(1)["w"])
  assert (tmp_path / "2" / "damaged.txt").is_file()
  # The run goes on and passes the step again.
  saver.save(2, _state(2), {"examples": 20})
  assert saver.restore(_target())[0] == 2
  saver.close()
  gc.collect()


@damage.BROKEN_READ
def test_damage_of_every_state_is_an_error_that_touches_nothing(tmp_path):
  _saved(tmp_path, [1, 2])
  for step in ("1", "2"):
    damage.flip(damage.data_file(tmp_path / step))
  before = sorted(tmp_path.rglob("*"))
  saver = resumable.Resumable(tmp_path)
  for _ in range(2):
    with pytest.raises(InputError, match=rf"{tmp_path}: .*2 .*; 1 .*delete"):
      saver.restore(_target())
  saver.close()
  assert sorted(tmp_path.rglob("*")) == before
  gc.collect()


@damage.BROKEN_READ
def test_states_that_were_passed_over_are_no_reason_to_begin_anew(tmp_path):
  _saved(tmp_path, [1, 2])
  damage.flip(damage.data_file(tmp_path / "2"))
  saver = resumable.Resumable(tmp_path)
  assert saver.restore(_target())[0] == 1
  saver.close()
  damage.flip(damage.data_file(tmp_path / "1"))
  saver = resumable.Resumable(tmp_path)
  with pytest.raises(InputError, match=r"1 .*; 2 "):
    saver.restore(_target())
  saver.close()
  gc.collect()


@damage.BROKEN_READ
def test_a_state_without_its_arrays_is_marked(tmp_path):
  _saved(tmp_path, [1, 2])
  damage.data_file(tmp_path / "2").unlink()
  saver = resumable.Resumable(tmp_path)
  assert saver.restore(_target())[0] == 1
  saver.close()
  gc.collect()


def restored(folder, target=None, **settings):
  saver = resumable.Resumable(folder, **settings)
  found = saver.restore(target or _target())
  saver.close()
  return found


@damage.BROKEN_READ
def test_what_is_damaged_stays_marked_and_counts_for_nothing(tmp_path):
  _saved(tmp_path, [1, 2, 3])
  damage.flip(damage.data_file(tmp_path / "3"))
  saver = resumable.Resumable(tmp_path)
  assert saver.restore(_target())[0] == 2
  # The mark alone decides, whatever is beside it.
  saver.close()
  saver = resumable.Resumable(tmp_path)
  assert saver.restore(_target())[0] == 2
  # An earlier step than the damaged one is saved, and nothing sound is lost.
  saver.save(4, _state(4), {"examples": 40})
  saver.close()
  assert sorted(x.name for x in tmp_path.iterdir()) == ["2", "3", "4"]
  gc.collect()


def test_folders_that_earlier_versions_set_aside_are_listed(tmp_path):
  _saved(tmp_path, [1, 2])
  for step in ("1", "2"):
    (tmp_path / step).rename(tmp_path / f"{step}.bad")
  with pytest.raises(InputError, match=r"1.bad; 2.bad"):
    restored(tmp_path)


@damage.BROKEN_READ
def test_damage_is_told_in_one_line(tmp_path, caplog, capfd):
  _saved(tmp_path, [1, 2])
  damage.data_file(tmp_path / "2").unlink()
  with caplog.at_level(logging.WARNING):
    assert restored(tmp_path)[0] == 1
  gc.collect()
  assert len(caplog.records) == 1
  assert capfd.readouterr() == ("", "")


def test_a_copy_without_the_files_of_a_commit_is_restored(tmp_path):
  _saved(tmp_path, [1])
  gone = [*(tmp_path / "1").rglob("commit_success.txt")]
  gone += (tmp_path / "1").glob("_CHECKPOINT_METADATA")
  for path in gone:
    path.unlink()
  step, state, _ = restored(tmp_path)
  assert step == 1
  np.testing.assert_array_equal(state["w"], _state(1)["w"])


def test_some_states_are_kept_for_ever(tmp_path):
  saver = resumable.Resumable(tmp_path, keep=1, keep_every=2)
  for step in (1, 2, 3, 4, 5):
    saver.save(step, _state(step), {})
  saver.close()
  assert sorted(x.name for x in tmp_path.iterdir()) == ["2", "4", "5"]


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
  forget = jax.jit(lambda x: jax.tree.map(lambda y: y * 0, x), donate_argnums=0)
  saver = resumable.Resumable(tmp_path)
  state = _state(1)
  saver.save(1, state, {})
  jax.block_until_ready(forget(state))
  saver.close()
  np.testing.assert_array_equal(restored(tmp_path)[1]["w"], _state(1)["w"])


def test_a_state_beyond_the_limit_is_on_disk_when_save_returns(tmp_path):
  saver = resumable.Resumable(tmp_path, save_concurrent_gb=1e-6)
  saver.save(1, _state(1), {})
  assert saver.took() is not None
  np.testing.assert_array_equal(restored(tmp_path)[1]["w"], _state(1)["w"])
  saver.close()


def test_a_state_of_an_earlier_version_is_read_and_verified(tmp_path):
  manager = ocp.CheckpointManager(tmp_path)
  for step in (1, 2):
    state = _state(step)
    crcs = trees.fingerprint(jax.device_get(state))
    if step == 2:
      crcs["w"] = "00000000"
    meta = {"crc": crcs, "note": {"examples": step}}
    manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
      ),
    )
  manager.close()
  step, state, note = restored(tmp_path)
  assert (step, note) == (1, {"examples": 1})
  np.testing.assert_array_equal(state["w"], _state(1)["w"])


def test_what_a_killed_save_left_is_in_nobodys_way(tmp_path):
  _saved(tmp_path, [1, 2])
  for name in ("3", "3.orbax-checkpoint-tmp"):
    shutil.copytree(tmp_path / "2" / "state", tmp_path / name / "state")
  saver = resumable.Resumable(tmp_path)
  assert saver.restore(_target())[0] == 2
  saver.save(3, _state(3), {})
  saver.close()
  assert restored(tmp_path)[0] == 3


@pytest.mark.nightly
@pytest.mark.parametrize("before", [(1, 8, 1), (2, 2, 2), (8, 1, 1)])
@pytest.mark.parametrize("after", [(1, 1, 8), (4, 2, 1), None])
def test_any_mesh_goes_on_from_any_other(tmp_path, before, after):
  def placed(state, shape):
    if shape is None:
      return state
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape)))
    specs = {"step": PartitionSpec(), "w": PartitionSpec("fsdp", "tensor")}
    return {
      k: jax.device_put(x, NamedSharding(mesh, specs[k]))
      for k, x in state.items()
    }

  saver = resumable.Resumable(tmp_path)
  saver.save(1, placed(_state(1), before), {})
  saver.close()
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    placed(_state(0), after),
  )
  found = restored(tmp_path, target)[1]
  assert found["w"].sharding == target["w"].sharding
  np.testing.assert_array_equal(found["w"], _state(1)["w"])
