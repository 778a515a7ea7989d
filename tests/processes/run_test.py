"""A whole recipe of two processes: results, stops, failures, disagreements."""

import json
import os
import signal

import numpy as np
import pytest

from pivot_jax import trees
from pivot_jax.weights import checkpoint
from tests.processes import micro, together

# A training alone, which the two faults below concern.
ALONE = "tests/processes/micro.py:train"


def words(workdir, *more, config="tests/processes/micro.py"):
  """Return the words of a run that DRIVEN may disturb."""
  told = [f"--config={config}", f"--workdir={workdir}", *more]
  return ["-m", "tests.processes.driven", *told]


def driven(**asked):
  return {"DRIVEN": json.dumps(asked)}


def ended(workdir, *more, count=2, config=ALONE, devices=1, **asked):
  """Return how processes end that are left alone."""
  return together.run(
    words(workdir, *more, config=config),
    count=count,
    devices=devices,
    given=driven(**asked),
  )


def check_done(found):
  assert [one.code for one in found] == [0] * len(found), found[0].err[-3000:]


def record(workdir, stage):
  return json.loads((workdir / stage / "done.json").read_text())


def lines(workdir, stage="stage1_full"):
  text = (workdir / stage / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def check_same_metrics(found, wanted):
  """Compare the metrics of trainings, to 2e-6 of what they are."""
  assert [one["step"] for one in found] == [one["step"] for one in wanted]
  for left, right in zip(found, wanted, strict=True):
    assert left.keys() == right.keys()
    for name, value in right.items():
      # Margins are differences of sums of some hundred.
      assert left[name] == pytest.approx(value, rel=2e-6, abs=2e-5), name


def check_same_leaves(found, wanted, stage="stage1_full"):
  left, right = (
    trees.flatten(checkpoint.load(str(one / stage)).params)
    for one in (found, wanted)
  )
  assert left.keys() == right.keys()
  for name, leaf in right.items():
    # No loss depends on a key's bias: Adam scales the rounding of its gradient.
    limit = 1e-5 if name.endswith("k_proj/bias") else 1e-6
    np.testing.assert_allclose(
      left[name], leaf, rtol=0, atol=limit, err_msg=name
    )


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
  """Return the work folder of the recipe in one process."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  check_done(ended(workdir, count=1, config="tests/processes/micro.py"))
  return workdir


@pytest.fixture(scope="session")
def two(tmp_path_factory):
  """Return the work folder of the recipe in two, and what they counted."""
  folder = tmp_path_factory.mktemp("two")
  found = ended(
    folder / "run", config="tests/processes/micro.py", counts=str(folder)
  )
  check_done(found)
  told = [json.loads((folder / f"{i}.json").read_text()) for i in (0, 1)]
  return folder / "run", told


def test_each_stage_has_the_results_of_one_process(alone, two):
  for stage in micro.get_config().order:
    left, right = record(two[0], stage), record(alone, stage)
    check_same(left["metrics"], right["metrics"], stage)


def check_same(left, right, where):
  """Compare numbers of two stages; texts are hashes of weights."""
  if isinstance(right, dict):
    assert left.keys() == right.keys(), where
    for name in right:
      check_same(left[name], right[name], f"{where}/{name}")
  elif isinstance(right, float):
    assert left == pytest.approx(right, rel=1e-5, abs=1e-6), where
  elif not where.endswith(("init", "fingerprint")):
    assert left == right, where


def test_the_digest_of_rows_does_not_depend_on_the_processes(alone, two):
  for stage in ("stage1_full", "stage2_sft", "stage2_dpo"):
    digests = {record(x, stage)["metrics"]["rows"] for x in (alone, two[0])}
    assert len(digests) == 1


def test_trainings_have_the_metrics_and_leaves_of_one_process(alone, two):
  for stage in ("stage1_full", "stage2_sft"):
    check_same_metrics(lines(two[0], stage), lines(alone, stage))
    check_same_leaves(two[0], alone, stage)


def test_log_probabilities_are_those_of_one_process_in_its_order(alone, two):
  left, right = (
    np.load(one / "reference" / "reference.npz") for one in (two[0], alone)
  )
  assert left["id"].tolist() == right["id"].tolist()
  assert left["crc"].tolist() == right["crc"].tolist()
  np.testing.assert_allclose(left["logps"], right["logps"], rtol=0, atol=1e-4)


def test_what_is_predicted_is_the_same(alone, two):
  left, right = (
    (one / "evaluate_dpo" / "predictions.jsonl").read_text()
    for one in (two[0], alone)
  )
  assert left == right
  left, right = (
    np.load(one / "linear_probe_dpo" / "predictions.npz")
    for one in (two[0], alone)
  )
  for name in right.files:
    assert left[name].tolist() == right[name].tolist(), name
  left, right = (
    np.load(one / "segment_probe_dpo" / "counts.npz") for one in (two[0], alone)
  )
  assert left["id"].tolist() == right["id"].tolist()
  left, right = (
    np.load(one / "gradcam_dpo" / "values.npz") for one in (two[0], alone)
  )
  assert left["id"].tolist() == right["id"].tolist()


def test_only_the_first_process_opens_a_file_to_write(two):
  first, second = two[1]
  assert first["written"]
  assert second["written"] == []


def test_each_process_reads_its_share_of_the_rows_and_no_more(two):
  """Three trainings of 8 updates of 8 examples, and 20 pairs scored."""
  trained = 3 * micro.STEPS * 8
  # Of batches of 6 pairs each has 3, of the last one 2 are there.
  assert [one["rows"]["pixels"] for one in two[1]] == [
    trained // 2 + 11,
    trained // 2 + 9,
  ]
  # Their sizes are read as texts, and three rows that are compared.
  for one in two[1]:
    assert one["rows"]["texts"] <= trained // 2 + 11


def test_parameters_spread_over_two_processes_train_alike(alone, tmp_path):
  mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2")
  found = ended(tmp_path / "run", *mesh)
  check_done(found)
  check_same_metrics(lines(tmp_path / "run"), lines(alone))
  check_same_leaves(tmp_path / "run", alone)


@pytest.mark.parametrize("update", [1, 4])
def test_sigterm_to_one_stops_all_at_one_update_and_goes_on_with_one(
  alone, tmp_path, update
):
  run = together.Together(
    words(tmp_path / "run", config=ALONE), given=driven(pause=0.5)
  )
  run.wait_for(f"at update {update}\n", process=1)
  run.signal(1, signal.SIGTERM)
  found = run.end()
  assert [one.code for one in found] == [75, 75], found
  said = [x for x in found[0].err.splitlines() if "saved at step" in x]
  assert len(said) == 1
  kept = sorted(os.listdir(tmp_path / "run" / "stage1_full" / "checkpoints"))
  assert f"saved at step {kept[-1]} of" in said[0]
  check_done(ended(tmp_path / "run", count=1))
  check_same_metrics(lines(tmp_path / "run"), lines(alone))
  check_same_leaves(tmp_path / "run", alone)


def test_a_bad_row_of_one_process_ends_all_with_its_line(tmp_path):
  found = ended(tmp_path / "run", fail={"1": 10})
  assert [one.code for one in found] == [2, 2]
  for one in found:
    assert "rows.jsonl:3" in one.last()
  assert "process 1 (" in found[0].last()


def test_a_reader_that_hangs_is_named_and_ends_all(tmp_path):
  found = ended(tmp_path / "run", "--config.watchdog=6", hang={"1": 10})
  assert [one.code for one in found] == [70, 70]
  for one in found:
    assert "process 1 (" in one.last() and "reading rows" in one.last()
  stuck = tmp_path / "run" / "stuck"
  assert sorted(x.name for x in stuck.iterdir()) == ["0.txt", "1.txt"]


def test_another_setting_of_one_process_is_an_error_in_all(tmp_path):
  rate = '--config.stage1_full.lr=((".*", 0.25),)'
  both = [
    words(tmp_path / "run", *more, config=ALONE) for more in ((), (rate,))
  ]
  found = together.run(both, given=driven())
  assert [one.code for one in found] == [2, 2]
  for one in found:
    assert "stage1_full.lr is" in one.last() and "0.25" in one.last()
  assert not (tmp_path / "run").exists()


def test_a_wrong_flag_of_one_process_ends_all(tmp_path):
  both = [words(tmp_path / "run", *x, config=ALONE) for x in ((), ("--nofla",))]
  found = together.run(both, given=driven())
  assert [one.code for one in found] == [2, 2]
  assert "nofla" in found[0].last()


def test_a_dry_run_of_two_is_said_once_and_writes_nothing(tmp_path):
  found = ended(tmp_path / "run", "--dry_run")
  check_done(found)
  assert "stage1_full" in found[0].out
  assert found[1].out == ""
  assert list(tmp_path.iterdir()) == [] or not (tmp_path / "run").exists()


def test_a_dry_run_of_one_alone_is_an_error_in_all(tmp_path):
  both = [
    words(tmp_path / "run", *x, config=ALONE) for x in ((), ("--dry_run",))
  ]
  found = together.run(both, given=driven())
  assert [one.code for one in found] == [2, 2]
  for one in found:
    assert "dry_run is" in one.last()


def test_an_address_alone_says_what_is_missing(tmp_path):
  found = together.run(
    words(tmp_path / "run", config=ALONE),
    count=1,
    given={"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"},
  )
  assert found[0].code == 2
  assert "JAX_NUM_PROCESSES" in found[0].last()
