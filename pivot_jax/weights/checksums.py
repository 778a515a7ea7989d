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

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SEEDS = (0x243F6A88, 0x85A308D3)
# Odd: each axis goes through its own multiples of it.
_STEP = 0x9E3779B1


def of_leaves(leaves: Mapping[str, Any]) -> dict[str, str]:
  """Return `{name: 16 hexadecimal digits}` of arrays on devices.

  Of arrays over several processes all of them call this, with the same names.
  """
  sums = {name: _sums(leaf) for name, leaf in leaves.items()}
  return {
    name: "".join(f"{int(one):08x}" for one in np.asarray(found))
    for name, found in sums.items()
  }


@jax.jit
def _sums(leaf: jax.Array) -> jax.Array:
  """Return the sums of an array's mixed words, one for each seed."""
  words = _words(leaf)
  places = jnp.zeros(words.shape, jnp.uint32)
  for axis in range(words.ndim):
    along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    places += _mixed(along * jnp.uint32(_STEP) + jnp.uint32(axis))
  mixed = tuple(
    _mixed(words ^ _mixed(places + jnp.uint32(seed))) for seed in _SEEDS
  )
  # One reduction of both: of two, XLA keeps what is reduced in memory.
  zeros = (jnp.uint32(0),) * len(_SEEDS)
  return jnp.stack(jax.lax.reduce(mixed, zeros, _add, tuple(range(words.ndim))))


def _add(one: Sequence[jax.Array], other: Sequence[jax.Array]):
  return tuple(x + y for x, y in zip(one, other, strict=True))


def _words(leaf: jax.Array) -> jax.Array:
  """Return the bits of an array as uint32; wide numbers get one axis more."""
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if leaf.dtype == jnp.bool_:
    return leaf.astype(jnp.uint32)
  wide = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
  return jax.lax.bitcast_convert_type(leaf, wide).astype(jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
  """Return uint32 words as other ones, one to one (MurmurHash3's last steps)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
