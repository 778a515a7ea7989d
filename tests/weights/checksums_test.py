"""A checksum is that of an array, wherever its shards lie, and misses no bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pivot_jax import sharding
from pivot_jax.weights import checksums


def checksum(array):
  return checksums.of_leaves({"x": jnp.asarray(array)})["x"]


def flipped(values, bit):
  """Return a copy of an array with one of its bits flipped."""
  content = np.array(values).view(np.uint8).reshape(-1)
  content[bit // 8] ^= 1 << bit % 8
  return content.view(values.dtype).reshape(values.shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_bit_of_a_leaf_counts(dtype):
  values = np.asarray(jnp.arange(6).reshape(2, 3).astype(dtype))
  found = {checksum(flipped(values, bit)) for bit in range(8 * values.nbytes)}
  assert len(found) == 8 * values.nbytes
  assert checksum(values) not in found


@pytest.mark.parametrize(
  "dtype", ["float32", "bfloat16", "int8", "bool", "uint32", "float16"]
)
def test_a_small_array_has_the_sum_that_devices_compute(dtype, monkeypatch):
  rng = np.random.default_rng(0)
  mesh = sharding.make_mesh({"data": -1})
  whole = sharding.replicated(mesh)
  for shape in ((), (7,), (3, 1, 5)):
    values = jnp.asarray(rng.integers(0, 99, shape)).astype(dtype)
    values = jax.device_put(values, whole)
    monkeypatch.setattr(checksums, "_SMALL", 2**18)
    on_host = checksum(values)
    monkeypatch.setattr(checksums, "_SMALL", -1)
    assert checksum(values) == on_host


def test_two_changed_signs_do_not_cancel():
  values = np.ones(4, np.float32)
  changed = {checksum(values * np.float32(one)) for one in ([-1, -1, 1, 1],)}
  swapped = (
    checksum(np.float32([1, 2, 1, 1])),
    checksum(np.float32([2, 1, 1, 1])),
  )
  assert checksum(values) not in changed and swapped[0] != swapped[1]


@pytest.mark.parametrize("dtype", ["bool", "uint32", "float16"])
def test_other_kinds_of_numbers_have_a_checksum(dtype):
  zeros = jnp.zeros((2, 2), dtype)
  assert checksum(zeros) != checksum(zeros.at[0, 1].set(1))


@pytest.mark.parametrize("small", [-1, 2**18])
def test_the_sum_does_not_depend_on_the_mesh(small, monkeypatch):
  monkeypatch.setattr(checksums, "_SMALL", small)
  values = np.random.default_rng(0).normal(size=(4, 8, 16)).astype(np.float32)
  found = {checksum(jnp.asarray(values))}
  for shape, spec in (
    ((1, 8, 1), PartitionSpec(None, "fsdp")),
    ((2, 2, 2), PartitionSpec(None, "tensor", "fsdp")),
    ((8, 1, 1), PartitionSpec()),
  ):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape)))
    placed = jax.device_put(values, NamedSharding(mesh, spec))
    # As in a training, which computes on all of them.
    with jax.set_mesh(mesh):
      found.add(checksums.of_leaves({"x": placed})["x"])
  assert len(found) == 1
  # It is noted in checkpoints: it may not change from one version to the next.
  assert checksum(jnp.arange(6, dtype=jnp.float32).reshape(2, 3)) == (
    "36aa76c540d04889"
  )
