"""Position tables at another grid; PyTorch's rule is in tests/parity."""

import numpy as np
import pytest
import scipy.ndimage

from pivot_jax import errors
from pivot_jax.weights.convert import positions


def _table(rows, width=5):
  return np.random.default_rng(rows).normal(size=(rows, width)).astype("f4")


@pytest.mark.parametrize("old, new", [(7, 12), (12, 7), (3, 8), (5, 1), (1, 4)])
def test_big_visions_rule_is_scipys_zoom(old, new):
  table = _table(old * old)
  got = positions.resize(table, new, method="big_vision", class_token=False)
  expected = scipy.ndimage.zoom(
    table.reshape(old, old, -1), (new / old, new / old, 1), order=1
  ).reshape(new * new, -1)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, expected)


def test_big_visions_rule_keeps_the_corners_and_halves_what_is_between():
  table = np.array([[0], [1], [2], [3]], np.float32)
  got = positions.resize(table, 3, method="big_vision", class_token=False)
  assert got.reshape(3, 3).tolist() == [[0, 0.5, 1], [1, 1.5, 2], [2, 2.5, 3]]


def test_dinov2s_rule_weighs_four_neighbours_of_a_centre():
  # Two places to four: the centres lie at -0.25, 0.25, 0.75 and 1.25 of the old
  # ones, and the cubic of -0.75 is 0.8789, 0.2617, -0.1055 or -0.0352 at a
  # distance of 0.25, 0.75, 1.25 and 1.75; the border row counts repeatedly.
  table = np.array([[0], [0], [1], [1]], np.float32)
  got = positions.resize(table, 4, method="dinov2", class_token=False)
  wanted = [-0.10546875, 0.2265625, 0.7734375, 1.10546875]
  assert got.reshape(4, 4).T.tolist() == [wanted] * 4


@pytest.mark.parametrize("method", positions.METHODS)
@pytest.mark.parametrize("grid", [1, 3, 6, 11])
def test_a_flat_table_stays_flat_and_the_class_row_as_it_is(method, grid):
  table = np.full((37, 4), 0.7, np.float32)
  table[0] = [1, -2, 3, 1e6]
  got = positions.resize(table, grid, method=method, class_token=True)
  assert got.shape == (grid * grid + 1, 4) and got.dtype == np.float32
  np.testing.assert_array_equal(got[0], table[0])
  np.testing.assert_allclose(got[1:], 0.7, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", positions.METHODS)
@pytest.mark.parametrize("class_token", [False, True])
def test_a_table_of_the_right_size_is_a_copy(method, class_token):
  table = _table(16 + class_token)
  got = positions.resize(table, 4, method=method, class_token=class_token)
  np.testing.assert_array_equal(got, table)
  got[:] = 0
  assert table.any()


def test_both_axes_are_treated_alike_and_not_mixed():
  table = _table(25)
  turned = table.reshape(5, 5, -1).swapaxes(0, 1).reshape(25, -1)
  for method in positions.METHODS:
    got = positions.resize(table, 8, method=method, class_token=False)
    other = positions.resize(turned, 8, method=method, class_token=False)
    np.testing.assert_allclose(
      got.reshape(8, 8, -1), other.reshape(8, 8, -1).swapaxes(0, 1), atol=1e-6
    )


@pytest.mark.parametrize("rows, token, said", [
  (17, False, "17 rows are no square grid;"),
  (16, True, "16 rows are no square grid and a class token;"),
  (0, False, "0 rows are no square grid"),
  (1, True, "1 rows are no square grid and a class token"),
])  # fmt: skip
def test_a_table_that_is_no_square_is_refused(rows, token, said):
  with pytest.raises(errors.InputError, match=f"position table: {said}"):
    positions.resize(_table(rows), 4, method="dinov2", class_token=token)


def test_an_unknown_method_and_no_grid_are_refused():
  said = "positions='nearest': choose one of big_vision, dinov2"
  with pytest.raises(errors.InputError, match=said):
    positions.resize(_table(16), 4, method="nearest", class_token=False)
  with pytest.raises(errors.InputError, match="a grid of 0 is none"):
    positions.resize(_table(16), 0, method="dinov2", class_token=False)
