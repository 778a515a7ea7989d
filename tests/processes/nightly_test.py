"""More of runs of several processes, which takes longer."""

import json
import signal
import time

import pytest

from tests.processes import run_test, together

pytestmark = pytest.mark.nightly
ALONE = run_test.ALONE
alone, ended, words = run_test.alone, run_test.ended, run_test.words
MICRO = "tests/processes/micro.py"


@pytest.mark.parametrize(
  ("count", "devices", "data", "fsdp", "tensor"),
  [(4, 1, 4, 1, 1), (2, 2, 2, 2, 1), (2, 1, 1, 1, 2), (4, 1, 2, 2, 1)],
)
def test_meshes_over_processes_train_alike(
  alone, tmp_path, count, devices, data, fsdp, tensor
):
  sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
  mesh = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
  found = ended(tmp_path / "run", *mesh, count=count, devices=devices)
  run_test.check_done(found)
  run_test.check_same_metrics(
    run_test.lines(tmp_path / "run"), run_test.lines(alone)
  )
  run_test.check_same_leaves(tmp_path / "run", alone)
  digests = {
    run_test.record(one, "stage1_full")["metrics"]["rows"]
    for one in (alone, tmp_path / "run")
  }
  assert len(digests) == 1


@pytest.mark.parametrize("mesh", [(2, 1, 2), (1, 2, 1)])
def test_every_stage_runs_on_meshes_over_processes(alone, tmp_path, mesh):
  data, fsdp, devices = mesh
  found = ended(
    tmp_path / "run",
    f"--config.mesh.data={data}",
    f"--config.mesh.fsdp={fsdp if devices == 1 else devices}",
    devices=devices,
    config=MICRO,
  )
  run_test.check_done(found)
  for stage in ("reference", "linear_probe_dpo", "evaluate_dpo", "gradcam_dpo"):
    left, right = (
      run_test.record(one, stage) for one in (tmp_path / "run", alone)
    )
    run_test.check_same(left["metrics"], right["metrics"], stage)


@pytest.mark.parametrize("order", [(2, 1), (1, 2)])
def test_a_killed_run_goes_on_with_another_number(alone, tmp_path, order):
  before, after = order
  run = together.Together(
    words(tmp_path / "run", config=ALONE),
    count=before,
    given=run_test.driven(pause=0.5),
  )
  run.wait_for("at update 5\n")
  for process in range(before):
    run.signal(process, signal.SIGKILL)
  run.end()
  run_test.check_done(ended(tmp_path / "run", count=after))
  run_test.check_same_metrics(
    run_test.lines(tmp_path / "run"), run_test.lines(alone)
  )
  run_test.check_same_leaves(tmp_path / "run", alone)


@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(
  alone, tmp_path, who
):
  run = together.Together(
    words(tmp_path / "run", config=ALONE), given=run_test.driven(pause=0.5)
  )
  run.wait_for("at update 5\n")
  run.signal(who, signal.SIGKILL)
  found = run.end()
  assert found[1 - who].code in (70, -signal.SIGABRT)
  run_test.check_done(ended(tmp_path / "run"))
  run_test.check_same_leaves(tmp_path / "run", alone)


def test_ten_kills_of_both_leave_the_bytes_of_a_straight_run(tmp_path):
  straight, killed = tmp_path / "straight", tmp_path / "killed"
  more = ("--config.stage1_full.save_every=2",)
  run_test.check_done(ended(straight, *more))
  for kill in range(10):
    run = together.Together(
      words(killed, *more, config=ALONE), given=run_test.driven(pause=0.2)
    )
    until = time.monotonic() + 90
    # At other places each time: before, amid and after saves.
    while "at update" not in run.said(0) and time.monotonic() < until:
      if run.running[0].poll() is not None:
        break
      time.sleep(0.02)
    time.sleep(0.13 * kill)
    for process in (0, 1):
      run.signal(process, signal.SIGKILL)
    run.end()
  run_test.check_done(ended(killed, *more))
  left, right = (one / "stage1_full" for one in (straight, killed))
  assert run_test.lines(straight) == run_test.lines(killed)
  assert _prints(left) == _prints(right)


def _prints(folder):
  """Return the CRC32 of each leaf; model.json has paths of its run."""
  found = json.loads((folder / "fingerprint.json").read_text())
  del found["model.json"]
  return found


@pytest.mark.parametrize("stage", ["reference", "evaluate_dpo"])
def test_sigterm_in_a_stage_without_checkpoints_leaves_at_once(
  alone, tmp_path, stage
):
  run = together.Together(words(tmp_path / "run", config=MICRO))
  run.wait_for(f"{stage} (", seconds=110)
  run.signal(0, signal.SIGTERM)
  found = run.end()
  assert [one.code for one in found] == [75, 75], found[0].err[-2000:]
  run_test.check_done(ended(tmp_path / "run", config=MICRO))
  left, right = (
    run_test.record(one, "evaluate_dpo") for one in (tmp_path / "run", alone)
  )
  run_test.check_same(left["metrics"], right["metrics"], "evaluate_dpo")


def test_a_work_folder_of_each_is_an_error_in_all(tmp_path):
  both = [words(tmp_path / str(i) / "run", config=ALONE) for i in (0, 1)]
  found = together.run(both, given=run_test.driven())
  assert [one.code for one in found] == [2, 2]
  for one in found:
    assert "process 1 does not see" in one.last()
    assert one.seconds < 90


@pytest.mark.parametrize(
  ("asked", "said"),
  [
    (dict(version={"1": "0.0.1"}), "jax is"),
    (dict(source={"1": "0123"}), "training/losses.py is"),
  ],
)
def test_another_version_or_source_file_is_an_error_in_all(
  tmp_path, asked, said
):
  found = ended(tmp_path / "run", **asked)
  assert [one.code for one in found] == [2, 2]
  for one in found:
    assert said in one.last()


def test_other_data_of_one_process_is_an_error_in_all(tmp_path):
  turns = [("human", "is it red ?"), ("gpt", "yes")]
  talk = [{"from": who, "value": text} for who, text in turns]
  for index in (0, 1):
    folder = tmp_path / str(index)
    folder.mkdir()
    rows = [dict(id=str(i), conversations=talk) for i in range(40 - index)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text)
  told = words(
    tmp_path / "run",
    "--config.files.pretrain=rows.jsonl",
    config=f"{together.ROOT}/configs/pivot.py:files",
  )
  folders = [tmp_path / "0", tmp_path / "1"]
  found = together.run(told, given=run_test.driven(), folders=folders)
  assert [one.code for one in found] == [2, 2], found[0].err[-2000:]
  for one in found:
    assert "rows.jsonl is 40 rows" in one.last()
    assert "39 rows" in one.last()


def test_processes_are_joined_by_variables_of_slurm(tmp_path):
  port = together.free_port()
  shared = {
    "SLURM_JOB_ID": "17",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
  }
  each = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in (0, 1)]
  found = together.run(
    words(tmp_path / "run", "--dry_run", config=ALONE),
    given=shared | run_test.driven(),
    each=each,
    triple=False,
  )
  run_test.check_done(found)
  assert "process 0 of 2" in found[0].err


def test_the_debug_recipe_of_two_is_that_of_one(tmp_path):
  """Its own shell command, the bytes of a second run, and one's results."""
  port = together.free_port()

  def run(name, count):
    each = [
      together.main_words(
        tmp_path / name,
        f"--processes=127.0.0.1:{port},{count},{index}",
        config="configs/pivot.py:debug",
      )
      for index in range(count)
    ]
    found = together.Together(each, count=count, triple=False).end(900)
    run_test.check_done(found)

  for name, count in (("one", 1), ("two", 2), ("again", 2)):
    run(name, count)
    port = together.free_port()
  results = {
    name: json.loads((tmp_path / name / "report.json").read_text())["results"]
    for name in ("one", "two", "again")
  }
  assert results["two"] == results["again"]
  made = sorted((tmp_path / "two").glob("*/fingerprint.json"))
  assert len(made) == 16
  for path in made:
    again = tmp_path / "again" / path.parent.name
    assert _prints(path.parent) == _prints(again), path
  check_shares(results["two"], results["one"], "results")


def check_shares(left, right, where):
  """Compare results: of a share of n items at most two may differ."""
  if not isinstance(right, dict):
    return
  assert left.keys() == right.keys(), where
  if {"value", "n"} <= right.keys():
    off = abs(left["value"] - right["value"]) * right["n"]
    assert off < 2.5 or abs(left["value"] - right["value"]) < 1e-3, where
    return
  for name in right:
    check_shares(left[name], right[name], f"{where}/{name}")
