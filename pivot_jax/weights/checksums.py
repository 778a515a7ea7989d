"""Checksums of arrays, computed where their shards lie.

Of each leaf the words (uint32; those of narrower numbers are widened) are mixed
with a hash of their place in the whole array and summed modulo 2^32, with two
seeds: 16 hexadecimal digits. A sum does not depend on how an array is spread, so
that eight devices compute what one verifies, without a byte on the host.

A flipped bit, and whatever else changes within one word, always changes both
sums: at a given place the mixing is a bijection of the word, as `_mixed` is made
of steps that can be undone, so that one addend changes and no other does.
Changes of several words cancel in both sums with a probability of 2^-64. (A
product of the word and an odd hash would be such a bijection, too. But it leaves
the highest bit alone: any two changed signs would cancel.)
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pivot_jax import processes

_SEEDS = (0x243F6A88, 0x85A308D3)
# Odd: each axis goes through its own multiples of it.
_STEP = 0x9E3779B1
# Bytes up to which an array goes to the host: that takes less than compiling.
_SMALL = 2**18
_NARROW = {1: np.uint8, 2: np.uint16}


def of_leaves(leaves: Mapping[str, Any]) -> dict[str, str]:
  """Return `{name: 16 hexadecimal digits}` of arrays on devices.

  Each process sums its own shards, one of each replica, and sums are added. Of
  arrays over several processes all of them call this, with the same names.
  """
  own = {name: _own_sums(leaf) for name, leaf in leaves.items()}
  totals = {
    name: np.array(found, np.uint64).reshape(-1, len(_SEEDS)).sum(axis=0)
    for name, found in own.items()
  }
  told = processes.exchange(
    "checksums", {k: x.tolist() for k, x in totals.items()}
  )
  return {
    name: "".join(
      f"{sum(one[name][seed] for one in told) % 2**32:08x}"
      for seed in range(len(_SEEDS))
    )
    for name in leaves
  }


def _own_sums(leaf: jax.Array) -> list[Any]:
  """Return the sums of each shard that no other process or device has."""
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  own = [shard for shard in leaf.addressable_shards if not shard.replica_id]
  where = leaf.sharding
  if leaf.nbytes > _SMALL and isinstance(where, NamedSharding):
    # Of all devices at once, so that there is one program for a leaf.
    by_device = {
      shard.device: shard.data
      for shard in _sums(leaf, where).addressable_shards
    }
    return [by_device[shard.device] for shard in own]
  return [
    _on_host(shard.data, tuple(axis.start or 0 for axis in shard.index))
    for shard in own
  ]


def _on_host(shard: jax.Array, begin: tuple[int, ...]) -> list[np.uint32]:
  """Return the two sums of a shard, without compiling."""
  words = _bits(np.array(shard))
  return [x.sum(dtype=np.uint32) for x in _addends(np, words, begin)]


@functools.partial(jax.jit, static_argnums=1)
def _sums(leaf: jax.Array, where: NamedSharding) -> jax.Array:
  """Return the two sums of each device's shard [devices, 2]; none moves."""
  spec = (*where.spec, *(None,) * (leaf.ndim - len(where.spec)))

  def local(shard: jax.Array) -> jax.Array:
    begin = tuple(
      jnp.uint32(jax.lax.axis_index(axes) * size) if axes else 0
      for axes, size in zip(spec, shard.shape)
    )
    addends = _addends(jnp, _words(shard), begin)
    # One reduction of both: of two, XLA keeps what is reduced in memory.
    zeros = (jnp.uint32(0),) * len(addends)
    dimensions = tuple(range(addends[0].ndim))
    return jnp.stack(jax.lax.reduce(addends, zeros, _add, dimensions))[None]

  return jax.shard_map(
    local,
    mesh=where.mesh,
    in_specs=where.spec,
    out_specs=PartitionSpec(where.mesh.axis_names),
    check_vma=False,
  )(leaf)


def _add(one: Sequence[jax.Array], other: Sequence[jax.Array]):
  return tuple(x + y for x, y in zip(one, other, strict=True))


def _addends(xp: Any, words: Any, begin: tuple[Any, ...]) -> tuple[Any, ...]:
  """Return the mixed words, for each seed; `xp` is numpy or jax's.

  `begin` is the place of the first word in the whole array.
  """
  words = words.reshape(words.shape or (1,))
  begin = (*begin, *(0,) * (words.ndim - len(begin)))
  places = xp.zeros((1,) * words.ndim, xp.uint32)
  for axis, size in enumerate(words.shape):
    along = xp.arange(size, dtype=xp.uint32) + xp.asarray(
      begin[axis], xp.uint32
    )
    along = along * xp.uint32(_STEP)
    shape = [size if axis == other else 1 for other in range(words.ndim)]
    places = places + _mixed(xp, along + xp.uint32(axis)).reshape(shape)
  return tuple(
    _mixed(xp, words ^ _mixed(xp, places + xp.uint32(seed))) for seed in _SEEDS
  )


def _words(leaf: jax.Array) -> jax.Array:
  """Return the bits of an array as uint32; wide numbers get one axis more."""
  if leaf.dtype == jnp.bool_:
    return leaf.astype(jnp.uint32)
  kind = _NARROW.get(leaf.dtype.itemsize, np.uint32)
  return jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)


def _bits(leaf: np.ndarray) -> np.ndarray:
  """Return what `_words` does, on the host."""
  kind = np.dtype(_NARROW.get(leaf.dtype.itemsize, np.uint32))
  wide = leaf.shape if leaf.dtype.itemsize <= 4 else (*leaf.shape, 2)
  return leaf.reshape(-1).view(kind).reshape(wide).astype(np.uint32)


def _mixed(xp: Any, x: Any) -> Any:
  """Return uint32 words as other ones, one to one (MurmurHash3's last steps)."""
  x = (x ^ (x >> 16)) * xp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * xp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
