"""The arithmetic of the benchmark of images; nothing is timed here."""

import math

import numpy as np
import pytest

from bench import images


def _row(name, walls, size="640x480", off=None):
  off = off or {"mean": 0.0, "max": 0.0, "psnr": math.inf}
  return images.Row(size, name, tuple(walls), tuple(walls), off)


def test_a_difference_is_in_grey_levels_and_decibels():
  exact = np.zeros((1, 2, 2, 3), np.uint8)
  found = exact.copy()
  found[0, 0, 0] = 255
  off = images.difference(found, exact)
  assert off["mean"] == pytest.approx(255 / 4) and off["max"] == 255
  # A quarter of the largest possible square error.
  assert off["psnr"] == pytest.approx(10 * math.log10(4))
  assert images.difference(exact, found)["mean"] == off["mean"]
  assert images.difference(exact, exact)["psnr"] == math.inf


def test_the_gate_wants_pillows_pixels_of_pil_and_close_ones_of_the_others():
  near = {"mean": 1.0, "max": 30.0, "psnr": 40.0}
  none = {"mean": 0.0, "max": 0.0, "psnr": math.inf}
  good = {"Pillow alone": none, "pil": none, "pil_draft": near}
  assert images.failures(good) == []
  (line,) = images.failures(good | {"pil": near})
  assert line.startswith("pil is off by 1.00 in the mean, 30 at most, 40.0 dB")
  for bad in ({"mean": 2.1}, {"max": 61.0}, {"psnr": 36.9}, {"mean": math.nan}):
    assert len(images.failures({"pil_draft": near | bad})) == 1


def test_times_are_compared_round_by_round():
  # The machine was slower by ten in the second round, for both.
  rows = [_row("Pillow alone", (1, 10, 1)), _row("pil", (1.05, 10.5, 1.05))]
  low, middle, high = images.compared(rows)["640x480"]["pil"]
  assert low == pytest.approx(1.05) and high == pytest.approx(1.05)
  assert middle == pytest.approx(1.05)


def test_goals_are_judged_at_the_median():
  rows = [
    _row("Pillow alone", (0.004, 0.003, 0.9)),
    _row("pil", (0.0048, 0.0036, 1.08)),
    _row("pil_draft", (0.002, 0.001, 0.9)),
  ]
  overhead, exact, smaller = images.goals(rows)
  assert overhead.endswith("1.20, goal at most 1.1: missed")
  assert exact.endswith("208.33, goal at least 200: met")
  assert smaller.endswith("500.00, goal at least 400: met")


def test_a_table_names_files_rates_and_differences():
  near = {"mean": 1.0, "max": 30.0, "psnr": 40.0}
  rows = [
    _row("Pillow alone", (0.004,) * 3),
    _row("pil_draft", (0.002,) * 3, off=near),
  ]
  *_, first, second = images.table(rows, {"640x480": 89.6}).splitlines()
  assert first == (
    "| 640x480, 90 KB | Pillow alone | 250 | 250–250 | 250 | 1.000 |"
    " 1.000–1.000 | not at all |"
  )
  assert "| pil_draft | 500 |" in second and "| 0.500 |" in second
  assert second.endswith("| 1.00 in the mean, 30 at most, 40.0 dB |")


def test_the_variants_agree_on_a_photograph(tmp_path):
  picture = images.photograph(np.random.default_rng(0), 800, 780)
  picture.save(tmp_path / "a.jpg", quality=images.QUALITY)
  pixels = {
    name: read("a.jpg") for name, read in images.variants(tmp_path).items()
  }
  exact = pixels["Pillow alone"]
  off = {name: images.difference(one, exact) for name, one in pixels.items()}
  assert images.failures(off) == []
  assert off["pil"]["max"] == 0 and off["pil_draft"]["max"] > 0
