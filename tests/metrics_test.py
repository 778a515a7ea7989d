"""Measured numbers, and the file they go to."""

import math

import pytest

from pivot_jax import metrics
from pivot_jax.errors import InputError


def test_a_share_has_its_binomial_standard_error():
  found = metrics.share(30, 40)
  assert found["value"] == 0.75 and found["n"] == 40
  assert found["se"] == pytest.approx(math.sqrt(0.75 * 0.25 / 40))
  assert metrics.share(0, 5)["se"] == 0.0


def test_a_share_of_nothing_is_refused():
  with pytest.raises(InputError, match="empty"):
    metrics.share(0, 0)


def test_lines_after_the_step_are_dropped_when_a_run_resumes(tmp_path):
  straight = metrics.Writer(tmp_path, step=0)
  for step in (1, 2, 3):
    straight.write(step, {"loss": 1 / step})
  text = (tmp_path / "metrics.jsonl").read_text()
  resumed = metrics.Writer(tmp_path, step=1)
  assert [line["step"] for line in metrics.read(tmp_path)] == [1]
  for step in (2, 3):
    resumed.write(step, {"loss": 1 / step})
  assert (tmp_path / "metrics.jsonl").read_text() == text
  assert metrics.read(tmp_path)[1] == {"step": 2, "loss": 0.5}


def test_a_new_run_starts_an_empty_file(tmp_path):
  metrics.Writer(tmp_path, step=0).write(1, {"loss": 1.0})
  metrics.Writer(tmp_path, step=0)
  assert metrics.read(tmp_path) == []


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
  metrics.Writer(tmp_path, step=0).write(1, {"loss": 1.0})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 2, "lo')
  metrics.Writer(tmp_path, step=5).write(2, {"loss": 2.0})
  assert [line["step"] for line in metrics.read(tmp_path)] == [1, 2]


def test_a_missing_file_has_no_lines(tmp_path):
  assert metrics.read(tmp_path) == []
