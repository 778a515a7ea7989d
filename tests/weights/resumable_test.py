"""A training goes on from what it saved; what is damaged is named."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
def test_a_damaged_newest_state_is_set_aside_and_the_one_before_taken(tmp_path):
  _saved(tmp_path, [1, 2])
  damage.flip(damage.data_file(tmp_path / "2"))
  saver = resumable.Resumable(tmp_path)
  step, state, note = saver.restore(_target())
  assert (step, note) == (1, {"examples": 10})
  np.testing.assert_array_equal(state["w"], _state(1)["w"])
  assert (tmp_path / "2.bad").is_dir() and not (tmp_path / "2").exists()
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
def test_states_that_were_set_aside_are_no_reason_to_begin_anew(tmp_path):
  _saved(tmp_path, [1, 2])
  damage.flip(damage.data_file(tmp_path / "2"))
  saver = resumable.Resumable(tmp_path)
  assert saver.restore(_target())[0] == 1
  saver.close()
  damage.flip(damage.data_file(tmp_path / "1"))
  saver = resumable.Resumable(tmp_path)
  with pytest.raises(InputError, match=r"1 .*; 2.bad"):
    saver.restore(_target())
  saver.close()
  gc.collect()


@damage.BROKEN_READ
def test_a_state_without_its_arrays_is_set_aside(tmp_path):
  _saved(tmp_path, [1, 2])
  damage.data_file(tmp_path / "2").unlink()
  saver = resumable.Resumable(tmp_path)
  assert saver.restore(_target())[0] == 1
  saver.close()
  gc.collect()
