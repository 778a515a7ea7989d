"""Of the benchmark and the smoke test of a GPU, all that needs none."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import results, verdict
from bench.gpu import __main__ as command
from bench.gpu import checks, ours, rows, sizes, smoke
from pivot_jax.models import layers

ROOT = pathlib.Path(__file__).parents[1]
_WORK = {
  "dpo_8": {"examples": 8, "useful tokens": 10048, "TFLOP": 100.0},
  "dpo_16": {"examples": 16, "useful tokens": 20096, "TFLOP": 200.0},
  "sft_16": {"examples": 16, "useful tokens": 11616, "TFLOP": 100.0},
}


def _row(name, seconds, **fields):
  variant = rows.BENCH.variant(name)
  values = dict(
    label=variant.label,
    settings="",
    walls=(seconds,) * 5,
    cpus=(seconds,) * 5,
    first=(2.0,),
    again=None,
    errors={},
    load=(0.0, 0.0),
    workload=variant.workload,
    beside=rows.BENCH.ours.get(variant.workload, ""),
    peak=30_000_000_000,
  )
  return verdict.Row(name=name, **(values | fields))


def _goals(*found):
  return "\n".join(rows.goals({row.name: row for row in found}, _WORK))


def test_rows_have_names_workloads_and_a_base_of_their_own():
  names = [row.name for row in rows.ROWS]
  assert len(set(names)) == len(names)
  assert {row.workload for row in rows.ROWS} == {
    *("dpo_8", "dpo_16", "sft_16", "toy"),
  }
  for workload, name in rows.BENCH.ours.items():
    assert rows.BENCH.variant(name).workload == workload


def test_only_the_toy_has_a_gate_and_a_tiny_run_opens_it():
  gated = [row for row in rows.ROWS if rows.BENCH.gates(row)]
  assert {row.workload for row in gated} == {"toy"} and len(gated) == 4
  assert all(row.quick for row in gated)


def test_a_pair_has_the_lengths_it_is_said_to_have():
  data = sizes.data("dpo_8", tiny=False)
  assert data.patches == 576 and data.images.shape == (8, 384, 384, 3)
  assert {data.patches + len(x) for x in data.prompt} == {667}
  assert {len(x) for x in data.chosen} == {280}
  assert {len(x) for x in data.rejected} == {309}
  again = sizes.data("dpo_8", tiny=False)
  np.testing.assert_array_equal(data.prompt[3], again.prompt[3])


def test_ragged_lengths_differ_and_one_answer_makes_no_pair():
  ragged = sizes.data("dpo_ragged", tiny=False)
  assert len({len(x) for x in ragged.chosen}) > 4
  single = sizes.data("sft_16", tiny=False)
  assert single.answers == ("chosen",)
  assert 576 + len(single.prompt[0]) + len(single.chosen[0]) == 726


def test_a_step_counts_the_least_arithmetic():
  work = ours.work("dpo_8", tiny=False)
  assert work["useful tokens"] == 8 * (667 + 280 + 309)
  assert work["TFLOP"] / 8 == pytest.approx(12.5, rel=0.01)


def test_scores_are_float32_with_two_axes_as_long_as_a_sequence():
  text = "f32[8,12,976,976] bf16[8,976,976] f32[16,12,976] f32[976,1536]"
  assert ours.scores(text, {576, 976}) == {"f32[8,12,976,976]"}


def test_goals_are_met_missed_or_not_measured():
  text = _goals(
    _row("ours_8", 0.25, first=(73.0, 9.0)),
    _row("trl_8", 0.75, peak=40_000_000_000),
    _row("ours_attention", 0.3),
    _row("ours_sft", 1.0, walls=(), status="not run"),
  )
  assert "pairs/s, the better of 8 and 16: 32.00, goal at least 28: met" in text
  assert "the same, stretched: 32.00, goal at least 35: missed" in text
  assert "than TRL default, 8 pairs: 3.00, goal at least 2.2: met" in text
  assert "than TRL tuned, 8 pairs: not measured" in text
  assert "both computing again, 8 pairs: 0.75, goal at most 0.8: met" in text
  assert "caches empty: 73.00, goal at most 60: missed" in text
  assert "caches full: 9.00, goal at most 10: met" in text
  assert "SFT samples/s: not measured" in text


def test_mfu_is_the_share_of_the_published_peak():
  rows_by_name = {"ours_8": _row("ours_8", 0.25), "trl_8": _row("trl_8", 1.0)}
  known = _WORK | {"device": {"peak TFLOP": 1000.0}}
  *_, line = rows.summary(rows_by_name, known)[0]
  assert "pivot_jax, 8 pairs 40.0 %, TRL DPOTrainer, default 10.0 %" in line


def test_sides_whose_gate_could_not_be_asked_are_not_compared():
  found = {
    "toy_torch": _row("toy_torch", 1.0, walls=(), status="does not fit"),
    "ours_8": _row("ours_8", 0.25, beside=""),
    "trl_8": _row("trl_8", 0.75, beside=""),
  }
  lines, _ = rows.summary(found, _WORK)
  assert lines[0].startswith("**The sides are not compared**")
  assert "TRL default, 8 pairs: not measured" in "\n".join(lines)
  assert "3.00x" not in verdict.table(list(found.values()), _WORK)


@pytest.fixture
def full():
  """The update that the smoke test times, with the attention of a GPU."""
  compute = layers.Compute(dtype="bfloat16", attention="cudnn")
  return ours.Update(sizes.data("dpo_8", tiny=False), compute)


def test_an_update_of_real_size_is_foreseen_to_fit_an_h200(full, monkeypatch):
  _pretend_cudnn(monkeypatch)
  found = full.estimate()
  count = sum(x.size for x in jax.tree.leaves(full.state.trainable))
  assert count == pytest.approx(1.946e9, rel=1e-3)
  # Of 139 GiB, of which jax takes 92 %.
  assert 80 < found.total / 2**30 < 0.92 * 139 - 20, str(found)


def test_an_update_of_real_size_lowers_for_a_gpu(full, monkeypatch):
  shapes = _pretend_cudnn(monkeypatch)
  text = full.lower("cuda").as_text()
  assert "jit_step_fn" in text
  # Both towers, each in a loop: blocks are traced more than once, always alike.
  assert set(shapes) == {
    ((8, 576, 16, 72), (8, 576, 16, 72)),
    ((16, 976, 12, 128), (16, 976, 2, 128)),
  }


@jax.custom_vjp
def _flash(q, k, v):
  """Have the shapes of the kernel: what it gives, and keeps for its gradient."""
  del k, v
  return q


def _forward(q, k, v):
  sums = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
  return q, (q, k, v, q + 1, sums)


def _backward(kept, gradient):
  q, k, v, *_ = kept
  return gradient + q, k, v


_flash.defvjp(_forward, _backward)


def _pretend_cudnn(monkeypatch):
  """Stand in for the kernel, whose lowering asks the machine for its cuDNN."""
  seen = []

  def kernel(q, k, v, *, implementation, **_):
    assert implementation == "cudnn" and q.dtype == "bfloat16"
    seen.append((q.shape, k.shape))
    return _flash(q, k, v)

  monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
  return seen


@pytest.mark.nightly
def test_the_smoke_test_runs_on_a_cpu(tmp_path, capsys):
  assert smoke.main(["--tiny", f"--out={tmp_path}"]) == 0
  page = (tmp_path / "gpu_smoke.md").read_text("utf-8")
  assert page.count("| pass |") == 6 and "FAIL" not in page
  for text in ("causal, 7 tokens", "in float32", "in bfloat16", "pairs/s"):
    assert text in page
  assert "10 updates of 8 pairs" in page and "1 stages and" in page
  assert str(tmp_path) not in page
  line = smoke.status(tmp_path / "gpu_smoke.md")
  assert "no GPU, jax" in line and line.endswith("6 of 6 checks passed")


def test_a_failed_check_is_told_and_ends_with_1(tmp_path, monkeypatch):
  def part(name, folder, seconds, *, tiny):
    return [(name, "off by 1", "FAIL" if name == "update" else "pass")]

  monkeypatch.setattr(smoke, "_part", part)
  assert smoke.main(["--tiny", f"--out={tmp_path}"]) == 1
  line = smoke.status(tmp_path / "gpu_smoke.md")
  assert line.endswith("2 of 3 checks passed; failed: update")


def test_a_kernel_that_is_off_fails_its_check(monkeypatch):
  known = checks.attention.attend_causal

  def off(q, k, v, lengths, *, backend):
    return 1.03 * known(q, k, v, lengths, backend=backend)

  monkeypatch.setattr(checks.attention, "attend_causal", off)
  full, causal = checks.attentions(tiny=True)
  assert full.passed and not causal.passed


def test_a_part_that_dies_or_has_no_time_fails(tmp_path):
  (line,) = smoke._part("update", tmp_path, None, tiny=True)
  assert line[2] == "FAIL" and "not run" in line[1]


@pytest.mark.skipif(bool(results.gpu()), reason="there is a GPU")
def test_without_a_gpu_the_commands_refuse_in_a_line(monkeypatch):
  with pytest.raises(SystemExit, match="there is no NVIDIA GPU here; --tiny"):
    smoke.main([])
  monkeypatch.setattr(sys, "argv", ["bench.gpu"])
  with pytest.raises(SystemExit, match="there is no NVIDIA GPU here; --tiny"):
    command.main()


def test_the_readme_tells_the_last_run_on_a_gpu():
  text = (ROOT / "README.md").read_text("utf-8")
  (line,) = re.findall(r"\(`python -m bench.gpu smoke`\): (.+)\.\n", text)
  assert line == smoke.status()


def test_a_page_that_is_not_there_means_that_nobody_ran_it(tmp_path):
  assert smoke.status(tmp_path / "none.md") == "never run on a GPU"
