"""What of the benchmark on a GPU needs none: time, data, table, goals."""

import json
import sys

import numpy as np
import pytest

from bench import budget, gpu_device, gpu_ours, gpu_report, gpu_rows, gpu_sizes

_WORKS = {
  "dpo_8": {"examples": 8, "tokens": 10048, "flops": 1e14},
  "dpo_16": {"examples": 16, "tokens": 20096, "flops": 2e14},
  "sft_16": {"examples": 16, "tokens": 11616, "flops": 1e14},
}


def _result(seconds, **found):
  values = {"status": "", "walls": [seconds] * 5, "first_step": 2.0}
  return values | {"peak": 3e10} | found


def _goals(results, *, compared=True):
  return "\n".join(gpu_report.goals(results, _WORKS, compared=compared))


def test_a_row_gets_its_share_until_too_little_is_left():
  now = [0.0]
  left = budget.Budget(100.0, clock=lambda: now[0])
  assert left.share(60.0) == 60.0
  now[0] = 70.0
  assert left.share(60.0) == 30.0
  now[0] = 100.0 - budget.LEAST + 1
  assert left.share(60.0) is None
  now[0] = 500.0
  assert left.left() == 0.0


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
def test_what_became_of_a_row_is_said_in_words(code, text, expected):
  assert budget.outcome(code, text, 30.0) == expected


def test_a_row_that_takes_too_long_ends_with_all_it_started(tmp_path):
  child = "import time; time.sleep(60)"
  script = (
    f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
  )
  code = budget.run(
    [sys.executable, "-c", script],
    environment={},
    seconds=1.0,
    log=tmp_path / "log",
  )
  assert code is None


def test_what_a_row_knows_is_written_at_once(tmp_path):
  job = budget.Job("dpo_8", 3, True, tmp_path, tmp_path / "result.json")
  job.save(compile_seconds=4.0)
  clock = budget.Clock(job, lambda: None)
  for _ in range(budget.WARM_UP + 2):
    clock.begin()
    clock.end()
  found = json.loads((tmp_path / "result.json").read_text())
  assert found["compile_seconds"] == 4.0 and len(found["walls"]) == 2


def test_rows_have_names_workloads_and_a_base_of_their_own():
  names = [row.name for row in (*gpu_rows.BEFORE, *gpu_rows.ROWS)]
  assert len(set(names)) == len(names)
  assert {r.workload for r in gpu_rows.ROWS} <= set(gpu_sizes.WORKLOADS)
  for workload, name in gpu_report.OURS.items():
    assert gpu_rows.by_name()[name].workload == workload


def test_a_pair_has_the_lengths_it_is_said_to_have():
  data = gpu_sizes.data("dpo_8", tiny=False)
  assert data.patches == 576 and data.images.shape == (8, 384, 384, 3)
  assert {data.patches + len(x) for x in data.prompt} == {667}
  assert {len(x) for x in data.chosen} == {280}
  assert {len(x) for x in data.rejected} == {309}
  again = gpu_sizes.data("dpo_8", tiny=False)
  np.testing.assert_array_equal(data.prompt[3], again.prompt[3])


def test_ragged_lengths_differ_and_one_answer_makes_no_pair():
  ragged = gpu_sizes.data("dpo_ragged", tiny=False)
  assert len({len(x) for x in ragged.chosen}) > 4
  single = gpu_sizes.data("sft_16", tiny=False)
  assert single.answers == ("chosen",)
  assert 576 + len(single.prompt[0]) + len(single.chosen[0]) == 726


def test_a_step_counts_the_least_arithmetic():
  work = gpu_device.work("dpo_8", tiny=False)
  assert work["tokens"] == 8 * (667 + 280 + 309)
  assert work["flops"] / 8 == pytest.approx(12.5e12, rel=0.01)
  assert work["parameters"] == pytest.approx(1.946e9, rel=1e-3)


def test_scores_are_float32_with_two_axes_as_long_as_a_sequence():
  text = "f32[8,12,976,976] bf16[8,976,976] f32[16,12,976] f32[976,1536]"
  assert gpu_ours.scores(text, {576, 976}) == {"f32[8,12,976,976]"}


def test_table_gives_rates_and_how_much_faster_ours_is():
  results = {
    "ours_8": _result(0.25, trace_seconds=3.0, compile_seconds=40.0),
    "trl_8": _result(0.75),
    "trl_tuned_8": {"status": "does not fit"},
    "ours_reference": _result(0.1),
  }
  text = gpu_report.table(results, _WORKS, 1e15, compared=True)
  _, _, ours, peer, tuned, part = text.split("\n")
  assert "| 32.00 | 250.0 |" in ours and "| 40.0 % | 30.0 | 43.0 |  |" in ours
  assert peer.endswith("| 13.3 % | 30.0 | 2.0 | 3.00x |")
  assert "does not fit" in tuned
  assert part.endswith("|  |")
  alone = gpu_report.table(results, _WORKS, None, compared=False)
  assert "3.00x" not in alone


def test_a_row_cut_short_counts_if_it_did_enough_steps():
  assert gpu_report.wall({"walls": [1.0, 2.0]}) is None
  assert gpu_report.wall({"walls": [1.0, 2.0, 3.0]}) == 2.0
  assert gpu_report.wall(None) is None


def test_goals_are_met_missed_or_not_measured():
  results = {
    "ours_8": _result(0.25, trace_seconds=3.0, compile_seconds=70.0),
    "trl_8": _result(0.75, peak=4e10),
    "ours_attention": _result(0.3, peak=3e10),
    "sft": {"status": "not run"},
  }
  text = _goals(results)
  assert "pairs/s, the better of 8 and 16: 32.00, goal at least 28: met" in text
  assert "the same, stretched: 32.00, goal at least 35: missed" in text
  assert "than TRL default, 8 pairs: 3.00, goal at least 2.2: met" in text
  assert "than TRL tuned, 8 pairs: not measured" in text
  assert "both computing again, 8 pairs: 0.75, goal at most 0.8: met" in text
  assert "caches empty: 73.00, goal at most 60: missed" in text
  assert "SFT samples/s: not measured" in text
  assert "TRL default, 8 pairs: not measured" in _goals(results, compared=False)


def test_a_gate_that_could_not_be_asked_is_shouted():
  before = {
    "gate_torch": {"status": "", "errors": {"bfloat16": {"loss": 1e-3}}},
    "gate_ours": {"status": "does not fit"},
  }
  first, second = gpu_report.gate(before)
  assert first.endswith("loss 1e-03")
  assert second.endswith("THE SIDES ARE NOT COMPARED")
