"""A run tells its own speed."""

import logging
import threading

import jax
import jax.numpy as jnp
import pytest

from pivot_jax.errors import InputError
from pivot_jax.training import monitor


class _Clock:
  now = 0.0

  def __call__(self):
    return self.now


def _meter(peak=None):
  clock = _Clock()
  return clock, monitor.Meter(peak=peak, clock=clock)


def test_rates_are_sums_over_the_seconds_since_the_last_window():
  clock, meter = _meter(peak=1000.0)
  for _ in range(4):
    meter.add(tokens=50, examples=8, flops=200.0, wait=0.25)
  clock.now = 2.0
  window = meter.window()
  assert (window.updates, window.seconds) == (4, 2.0)
  assert (window.tokens, window.examples, window.flops) == (100, 16, 400)
  assert (window.mfu, window.input_wait) == (0.4, 0.5)
  meter.add(tokens=10, examples=1, flops=1.0, wait=0.0)
  clock.now = 3.0
  assert meter.window().tokens == 10


def test_a_window_that_is_skipped_counts_neither_updates_nor_seconds():
  clock, meter = _meter()
  meter.add(tokens=1000, examples=8, flops=1.0, wait=9.0)
  clock.now = 10.0
  meter.skip()
  assert meter.window() is None
  meter.add(tokens=7, examples=1, flops=1.0, wait=0.0)
  clock.now = 11.0
  assert meter.window().tokens == 7


def test_without_a_known_peak_there_is_no_mfu():
  clock, meter = _meter()
  meter.add(tokens=1, examples=1, flops=5e9, wait=0.0)
  clock.now = 1.0
  window = meter.window()
  assert window.mfu is None
  assert "speed/mfu" not in window.metrics()
  assert "5 GFLOP/s" in str(window)
  assert window.memory > 2**20


def test_items_come_in_order_and_are_made_ahead():
  made, there = [], threading.Event()

  def items():
    for number in range(5):
      made.append(number)
      if number == 2:
        there.set()
      yield number

  stream = monitor.ahead(items(), depth=2)
  assert next(stream) == 0
  # Nobody asks for them, and there they are; the next one has to wait.
  assert there.wait(timeout=60)
  assert made == [0, 1, 2]
  assert list(stream) == [1, 2, 3, 4]
  assert made == [0, 1, 2, 3, 4]


def test_what_making_an_item_raises_comes_in_its_place():
  def items():
    yield 1
    raise InputError("row 2 of the file")

  stream = monitor.ahead(items())
  assert next(stream) == 1
  with pytest.raises(InputError, match="row 2"):
    next(stream)


def _warnings(shapes, caplog):
  logger = logging.getLogger("pivot_jax")
  propagated, logger.propagate = logger.propagate, True
  step_fn = jax.jit(lambda state, batch: state + batch["tokens"].sum())
  watch, state = monitor.CompileWatch(), jnp.zeros(())
  with caplog.at_level(logging.WARNING, "pivot_jax"):
    for shape in shapes:
      state = watch.call(step_fn, state, {"tokens": jnp.ones(shape)})
  logger.propagate = propagated
  return [record.getMessage() for record in caplog.records]


def test_a_late_compilation_is_a_warning_that_names_the_shape(caplog):
  (said,) = _warnings([(2, 3)] * 4 + [(2, 5)] + [(2, 3)] * 2, caplog)
  assert "update 5" in said
  assert "'tokens'" in said
  assert "float32[2, 3] and is float32[2, 5]" in said


def test_the_first_compilations_are_none(caplog):
  assert _warnings([(4, 3), (4, 4), (4, 5), (4, 5), (4, 4)], caplog) == []


def test_a_trace_is_written_of_the_updates_asked_for(tmp_path):
  trace = monitor.Trace("1:3", tmp_path / "profile")
  started = []
  for step in range(5):
    trace.before(step)
    started.append(trace._on)
    trace.after(step + 1, jnp.ones(()))
  assert started == [False, True, True, False, False]
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("wrong", ["10", "13:10", "a:b", "-1:2"])
def test_a_window_that_is_none_is_refused(wrong):
  with pytest.raises(InputError, match="10:13"):
    monitor.window_of(wrong)


def test_a_window_that_never_comes_is_said(tmp_path, caplog):
  logger = logging.getLogger("pivot_jax")
  logger.propagate, propagated = True, logger.propagate
  trace = monitor.Trace("10:13", tmp_path)
  trace.before(0)
  trace.after(1, jnp.ones(()))
  trace.close()
  logger.propagate = propagated
  assert "no update of this run is between 10 and 13" in caplog.text
