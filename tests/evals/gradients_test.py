"""Maps, shares and pictures of gradients by hand."""

import numpy as np
import pytest

from pivot_jax.evals import gradients


def test_a_uniform_map_has_ratio_one_and_a_zero_map_none():
  share = np.array([[0.5, 0.0, 1.0, 0.0], [0.25, 0.25, 0.0, 0.0]])
  maps = np.array([[2.0] * 4, [0.0] * 4])
  found = gradients.localisation(maps, share)
  assert found[0] == 1.0 and np.isnan(found[1])


def test_localisation_by_hand():
  maps = np.array([[6.0, 2.0, 0.0, 0.0]])
  share = np.array([[0.5, 0.5, 0.0, 0.0]])
  # Inside: (3 + 1) / 8 of the gradient, on a quarter of the image.
  assert gradients.localisation(maps, share)[0] == 2.0


def test_the_error_is_that_of_a_mean_over_finite_values():
  found = gradients.mean_and_error(np.array([1.0, 2.0, 3.0, np.nan]))
  assert found == {"value": 2.0, "n": 3, "se": pytest.approx(1 / 3**0.5)}


def test_shares_of_a_mask_leave_the_cut_pixels_out():
  mask = np.zeros((7, 7), bool)
  mask[:2, :3] = mask[6] = True
  found = gradients.patch_share(mask, patch=2, grid=3)
  assert found.tolist() == [1.0, 0.5, 0, 0, 0, 0, 0, 0, 0]


def test_a_picture_keeps_its_inside_and_replaces_its_border():
  values = np.arange(25.0)
  values[[0, 4, 24]] = 1e6
  found = gradients.picture(values, rng=np.random.default_rng(0))
  assert found.min() == 0.0 and found.max() == 1.0
  # What is left ranks as before: undo the power and the scale at two cells.
  inside = found[1:4, 1:4] ** (1 / 1.1)
  step = np.diff(inside, axis=1)
  np.testing.assert_allclose(step, step[0, 0])
  again = gradients.picture(values, rng=np.random.default_rng(0))
  assert (found == again).all()


def test_the_border_comes_from_one_or_two_cells_further_in():
  values = np.add.outer(10.0 * np.arange(5), np.arange(5)).reshape(-1)
  raw = values.reshape(5, 5)
  found = gradients.picture(values, rng=np.random.default_rng(1)) ** (1 / 1.1)
  # The scale: cells (1, 1) and (3, 3) keep their values, 11 and 33.
  scale = 22 / (found[3, 3] - found[1, 1])
  back = found * scale + 11 - found[1, 1] * scale
  for cell in (1, 2, 3):
    assert np.isclose(back[0, cell], raw[[1, 2], cell]).any()
    assert np.isclose(back[4, cell], raw[[3, 2], cell]).any()
  for cell in range(5):
    assert np.isclose(back[cell, 0], raw[cell, [1, 2]]).any()
    assert np.isclose(back[cell, 4], raw[cell, [3, 2]]).any()


def test_a_flat_map_is_black():
  found = gradients.picture(np.ones(9), rng=np.random.default_rng(0))
  assert (found == 0).all()


def test_a_grid_that_is_not_square_is_refused():
  with pytest.raises(ValueError, match="12 patches"):
    gradients.grid_size(12)
