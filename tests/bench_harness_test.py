"""Processes of a benchmark: their time, their end, what they leave behind."""

import json
import sys

import numpy as np
import pytest

from bench import harness, results


def test_a_row_gets_its_share_until_too_little_is_left():
  now = [0.0]
  left = harness.Budget(100.0, clock=lambda: now[0])
  assert left.share(60.0) == 60.0
  now[0] = 70.0
  assert left.share(60.0) == 30.0
  now[0] = 100.0 - harness.LEAST + 1
  assert left.share(60.0) is None


@pytest.mark.parametrize(
  "code, text, expected",
  [
    (0, "CUDA out of memory, but caught", ""),
    (None, "", "took longer than its 30 s"),
    (1, "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory", "does not fit"),
    (1, "torch.OutOfMemoryError: CUDA out of memory.\n", "does not fit"),
    (1, "Traceback\nKeyError: 'x'\n\n", "ended with an error: KeyError: 'x'"),
    (1, "a.BError: no\n---\nFor", "ended with an error: a.BError: no"),
    (1, "killed by it", "ended with an error: killed by it"),
    (-9, "", "ended with an error: code -9"),
  ],
)
def test_how_a_process_ended_is_said_in_words(code, text, expected):
  assert harness.outcome(code, text, 30.0) == expected


def test_a_process_that_takes_too_long_ends_with_all_it_started(tmp_path):
  child = "import time; time.sleep(60)"
  script = (
    f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
  )
  outcome, _ = harness.run(
    [sys.executable, "-c", script],
    environment={},
    seconds=1.0,
    log=tmp_path / "log",
  )
  assert outcome == "took longer than its 1 s"


def _bench(*variants, **fields):
  return harness.Bench(
    name="none",
    setup=lambda folder, options: {},
    variants=variants,
    reference="right",
    ours={},
    limits={"loss": 1e-3},
    **fields,
  )


def _child(bench, name, folder, steps=2):
  result = folder / "result.json"
  flags = harness._parser(bench).parse_args(
    [
      *(f"--variant={name}", f"--folder={folder}"),
      *(f"--result={result}", f"--steps={steps}"),
    ]
  )
  harness._child(bench, flags)
  return json.loads(result.read_text())


def _variant(name, loss):
  facts = {"compile_seconds": 3.0}
  return harness.Variant(
    name,
    name,
    lambda folder: harness.stepping(
      lambda: None, lambda: {"loss": np.array(loss)}, lambda: facts
    ),
  )


def test_a_variant_with_the_numbers_of_the_reference_is_timed(tmp_path):
  bench = _bench(_variant("right", 1.0), _variant("near", 1.0005))
  _child(bench, "right", tmp_path)
  found = _child(bench, "near", tmp_path)
  assert found["failures"] == [] and len(found["walls"]) == 2
  assert found["errors"]["loss"] == pytest.approx(5e-4)
  assert found["compile_seconds"] == 3.0


def test_a_variant_with_other_numbers_ends_before_its_timed_steps(tmp_path):
  bench = _bench(_variant("right", 1.0), _variant("wrong", 1.1))
  _child(bench, "right", tmp_path)
  found = _child(bench, "wrong", tmp_path)
  assert len(found["failures"]) == 1 and "loss" in found["failures"][0]
  assert not found.get("walls")


def test_a_process_that_dies_has_said_what_it_knew(tmp_path):
  def make(folder):
    steps = iter(range(5))
    return harness.stepping(lambda: next(steps), facts=lambda: {"peak": 7})

  bench = _bench(harness.Variant("right", "", make, limits={}))
  with pytest.raises(StopIteration):
    _child(bench, "right", tmp_path)
  found = json.loads((tmp_path / "result.json").read_text())
  assert found["peak"] == 7 and len(found["walls"]) == 1


def test_a_command_names_the_flags_that_change_numbers():
  bench = _bench(_variant("right", 1.0), options={"pairs": 8, "tiny": False})
  flags = harness._parser(bench).parse_args(["--tiny", "--pairs=2"])
  defaults = {"steps": 8, "only": ""} | dict(bench.options)
  said = results.command("none", flags, defaults)
  assert said == "python -m bench.none --pairs=2 --tiny"
