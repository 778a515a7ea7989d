"""Rows to causal sequences and back, and both their gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from pivot_jax.models import sequences

# Two rows of eight tokens: a prompt of two with answers of two and one, a
# supervised example, padding; and an empty row.
INDEX = [
  [[0, 1, 2, 3], [0, 1, 4, -1], [5, 6, -1, -1]],
  [[-1] * 4, [-1] * 4, [-1] * 4],
]
COPIES = [
  [[0, 4], [1, 5], [2, -1], [3, -1], [6, -1], [8, -1], [9, -1], [-1, -1]],
  [[-1, -1]] * 8,
]
SEQUENCES = sequences.Sequences(jnp.asarray(INDEX), jnp.asarray(COPIES))


def _values(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_lengths_are_counted_and_at_least_one():
  assert SEQUENCES.lengths.tolist() == [4, 3, 2, 1, 1, 1]


def test_a_prompt_is_copied_to_each_of_its_answers():
  x = _values(2, 8, 1, 2)
  got = sequences.unpack(x, SEQUENCES)
  assert got.shape == (6, 4, 1, 2)
  for sequence, tokens in enumerate(INDEX[0]):
    for place, token in enumerate(tokens):
      if token >= 0:
        np.testing.assert_array_equal(got[sequence, place], x[0, token])


def test_a_result_is_read_from_the_first_copy_and_padding_is_zero():
  y = _values(6, 4, 1, 2)
  got = sequences.repack(y, SEQUENCES)
  flat = y[:3].reshape(12, 1, 2)
  for token, (first, _) in enumerate(COPIES[0]):
    expected = flat[first] if first >= 0 else jnp.zeros((1, 2))
    np.testing.assert_array_equal(got[0, token], expected)
  assert not got[1].any()


def test_gradients_are_those_of_plain_indexing():
  """Written out with scatters, as jax differentiates an indexed array."""
  index, first = jnp.asarray(INDEX), jnp.asarray(COPIES)[..., 0]
  x, y = _values(2, 8, 1, 2), _values(6, 4, 1, 2)
  rows = jnp.arange(2)[:, None, None]
  weight, other = _values(2, 3, 4, 1, 2), _values(2, 8, 1, 2)

  def unpacked(x):
    found = x[rows, jnp.maximum(index, 0)]
    return (weight * found * (index >= 0)[..., None, None]).sum()

  def unpack(x):
    found = sequences.unpack(x, SEQUENCES).reshape(2, 3, 4, 1, 2)
    return (weight * found * (index >= 0)[..., None, None]).sum()

  def repacked(y):
    flat = y.reshape(2, 12, 1, 2)
    found = flat[jnp.arange(2)[:, None], jnp.maximum(first, 0)]
    return (other * found * (first >= 0)[..., None, None]).sum()

  def repack(y):
    return (other * sequences.repack(y, SEQUENCES)).sum()

  for fast, plain, values in ((unpack, unpacked, x), (repack, repacked, y)):
    np.testing.assert_allclose(
      jax.grad(fast)(values), jax.grad(plain)(values), rtol=0, atol=1e-6
    )
