"""Ticks, thinned curves and maps over images, by hand."""

import math

import numpy as np

from pivot_jax.report import charts


def test_ticks_are_round_and_enclose_the_values():
  assert charts.ticks(0.13, 0.98) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
  assert len(charts.ticks(3.0, 3.0)) >= 2


def test_long_curves_are_thinned_by_means():
  found = charts.thin([(i, float(i)) for i in range(400)] + [(400, math.nan)])
  assert len(found) == 200 and found[0] == (0.5, 0.5)


def test_the_overlay_follows_the_map():
  image = np.full((48, 48, 3), 100, np.uint8)
  values = np.zeros((6, 6))
  values[0, 5] = 1
  drawn = charts.overlay(image, values).astype(int)
  assert (drawn[:8, 40:] == drawn[0, 47]).all()
  # The last control point is red; 0.4 * 0.6 * 100 + 0.6 * 215 = 153.
  assert drawn[0, 47, 0] == 153
  assert drawn[0, 0, 2] > drawn[0, 0, 0]
