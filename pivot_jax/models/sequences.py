"""Packed rows as plain causal sequences, and back: what attention gathers.

A row computes a prompt once and its answers behind it. Attention is the one
part that has to tell them apart, and kernels know causal sequences, not
branches: here tokens are copied out to the sequences (prompt + one answer) that
the packer lists, a prompt once for each of its answers, and what comes out is
read from the first copy. Gradients are exact: no other copy of a prompt is ever
read. Nothing here attends (`layers.py`) or decides where tokens lie (`packing`).

Both ways are gathers, in the backward pass too: a scatter is slow on a CPU and
adds in no fixed order on an accelerator.

Axes: R rows, T tokens, S sequences of a row, L tokens of a sequence, C copies of
a token, A heads, H head dim.
"""

import typing

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


# Not checked: jax rebuilds it around whatever a tree function gives.
@typing.no_type_check
class Sequences(flax.struct.PyTreeNode):
  """The places of packed rows' tokens in the row's causal sequences.

  index: the token at each place of a sequence, -1 behind its end.
  copies: the places s * L + l of each token; the first is where its result is
    read, -1 fills up. Padding has none.
  """

  index: Int[Array, "R S L"]
  copies: Int[Array, "R T C"]

  @property
  def lengths(self) -> Int[Array, "RS"]:
    """Tokens of each sequence, at least 1 so that a softmax has a key."""
    count = (self.index >= 0).sum(axis=-1, dtype=jnp.int32)
    return jnp.maximum(count, 1).reshape(-1)


@jax.custom_vjp
def unpack(
  x: Float[Array, "R T A H"], sequences: Sequences
) -> Float[Array, "RS L A H"]:
  """Copy the tokens of a row to its sequences.

  Places behind the end of a sequence hold the row's first token.
  """
  rows, count, length = sequences.index.shape
  flat = jnp.maximum(sequences.index, 0).reshape(rows, -1)
  return _take(x, flat).reshape(rows * count, length, *x.shape[2:])


def _unpack_forward(x, sequences):
  return unpack(x, sequences), sequences


def _unpack_backward(sequences, gradient):
  rows = len(sequences.index)
  flat = gradient.reshape(rows, -1, *gradient.shape[2:])
  copies = sequences.copies
  total = jnp.zeros((), jnp.float32)
  for copy in range(copies.shape[-1]):
    total += _take_present(flat, copies[..., copy]).astype(jnp.float32)
  return total.astype(gradient.dtype), None


unpack.defvjp(_unpack_forward, _unpack_backward)


@jax.custom_vjp
def repack(
  y: Float[Array, "RS L A H"], sequences: Sequences
) -> Float[Array, "R T A H"]:
  """Read each token's result from the first of its copies; padding is zero."""
  rows = len(sequences.index)
  flat = y.reshape(rows, -1, *y.shape[2:])
  return _take_present(flat, sequences.copies[..., 0])


def _repack_forward(y, sequences):
  return repack(y, sequences), sequences


def _repack_backward(sequences, gradient):
  rows, count, length = sequences.index.shape
  index = sequences.index.reshape(rows, -1)
  first = jnp.take_along_axis(
    sequences.copies[..., 0], jnp.maximum(index, 0), axis=1
  )
  read = (index >= 0) & (first == jnp.arange(count * length)[None])
  given = _take_present(gradient, jnp.where(read, index, -1))
  return given.reshape(rows * count, length, *gradient.shape[2:]), None


repack.defvjp(_repack_forward, _repack_backward)


def _take(x, index):
  return jnp.take_along_axis(x, index[..., None, None], axis=1)


def _take_present(x, index):
  """Take along axis 1, zeros where the index is -1."""
  present = (index >= 0)[..., None, None]
  return jnp.where(present, _take(x, jnp.maximum(index, 0)), 0)
