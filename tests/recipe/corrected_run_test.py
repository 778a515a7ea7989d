"""A changed setting runs again what it concerns, if it may, and nothing else."""

import json
import shutil

import pytest

from pivot_jax.configs import common, pivot
from pivot_jax.errors import InputError
from pivot_jax.recipe import plan, run_folder

STAGE = """
import json
import pathlib


def run(config, inputs, out):
  values = [
    json.loads((pathlib.Path(x) / "value.json").read_text())
    for x in inputs.values()
  ]
  (out / "value.json").write_text(json.dumps(sum(values) + config.value))
  with pathlib.Path(config.ran).open("a") as file:
    file.write(config.name + " ")
  return {"value": sum(values) + config.value}
"""
VALUES = dict(first=1, second=2, third=4)


@pytest.fixture
def chain(tmp_path):
  """Return fn(*rerun, first=..., ...) -> the stages that ran, by name.

  Three stages, each of which adds its value to that of the one before.
  """
  file, ran = tmp_path / "adds.py", tmp_path / "ran"
  file.write_text(STAGE)

  def start(*rerun, note="", killed="", **values):
    ran.write_text("")
    config = pivot.get_config()
    before = ""
    for name, value in (VALUES | values).items():
      config[name] = common.stage(
        f"{file}:run",
        inputs=dict(before=f"@{before}") if before else {},
        value=value,
        ran=str(ran),
        note=note if name == "first" else "",
      )
      before = name
    config.order = tuple(VALUES)
    planned = plan.expand(config, tmp_path / "w")
    with pytest.MonkeyPatch.context() as patch:
      if killed:
        patch.setattr(run_folder, "begin", kill_in(killed))
      plan.run(planned, tmp_path / "w", config, rerun)
    return ran.read_text().split()

  start.folder = tmp_path / "w"
  return start


def kill_in(name):
  """Return a `begin` that is killed once it has begun a stage."""
  begin = run_folder.begin

  def begin_or_die(step, inputs):
    begin(step, inputs)
    if step.name == name:
      raise KeyboardInterrupt

  return begin_or_die


def value(folder):
  return json.loads((folder / "value.json").read_text())


def test_a_changed_stage_runs_again_with_what_reads_it_and_nothing_else(chain):
  assert chain() == ["first", "second", "third"]
  assert chain("second", second=3) == ["second", "third"]
  assert value(chain.folder / "third") == 8
  # A scheduler may give the same command again.
  assert chain("second", second=3) == []
  assert sorted(x.name for x in chain.folder.iterdir() if x.is_dir()) == sorted(
    VALUES
  )


def test_a_stage_whose_result_is_the_same_leaves_its_readers_alone(chain):
  chain()
  assert chain("first", note="another") == ["first"]


def test_a_stage_that_has_not_begun_changes_silently(chain):
  with pytest.raises(KeyboardInterrupt):
    chain(killed="second")
  assert chain(second=7, third=8) == ["second", "third"]


def test_what_would_run_again_is_listed_and_nothing_touched(chain):
  chain()
  with pytest.raises(
    InputError,
    match=r"second \(value: 2 -> 3\); third \(reads second\).*"
    r"--rerun=second \(or all\)",
  ):
    chain(second=3)
  assert value(chain.folder / "third") == 7
  # Not what the stage before it allows.
  with pytest.raises(InputError, match="--rerun=second"):
    chain("third", second=3)
  assert chain("all", second=3) == ["second", "third"]


def test_a_name_of_no_stage_is_an_error(chain):
  with pytest.raises(InputError, match="--rerun=fourth: no such stage.*third"):
    chain("fourth")


def test_a_third_setting_needs_leave_to_drop_what_was_set_aside(chain):
  chain()
  with pytest.raises(KeyboardInterrupt):
    chain("second", second=3, killed="second")
  with pytest.raises(InputError, match=r"second \(replaces second.old\)"):
    chain(second=9)
  # What was allowed once may go on without being named again.
  with pytest.raises(InputError, match="third.*--rerun=third"):
    chain(second=3)
  assert value(chain.folder / "second") == 4


def test_settings_are_taken_back_though_the_attempt_has_checkpoints(chain):
  chain()
  with pytest.raises(KeyboardInterrupt):
    chain("second", second=3, killed="second")
  (chain.folder / "second" / "checkpoints" / "1").mkdir(parents=True)
  with pytest.raises(InputError, match="second"):
    chain(second=9)
  # The checkpoints would go, which only their owner may say.
  with pytest.raises(
    InputError,
    match=r"run again: second \(its checkpoints go and [^;]*give the settings of",
  ):
    chain()
  assert (chain.folder / "second" / "checkpoints" / "1").exists()
  assert chain("second") == []
  assert value(chain.folder / "second") == 3


def test_a_stage_of_every_seed_is_allowed_by_its_name(tmp_path):
  config = pivot.get_config()
  config.seeds = 2
  planned = plan.expand(config, tmp_path)
  both = plan.allowed(planned, ["stage2_dpo"])
  assert {"stage2_dpo", "seed1/stage2_dpo", "seed1/detach_dpo"} <= both
  one = plan.allowed(planned, ["seed1/stage2_dpo"])
  assert "seed1/detach_dpo" in one and not {"stage2_dpo", "detach_dpo"} & one
  assert "report" in plan.allowed(planned, [])


def test_killed_while_it_is_made_again_nothing_is_lost(chain):
  chain()
  with pytest.raises(KeyboardInterrupt):
    chain("second", second=3, killed="second")
  assert value(chain.folder / "second.old") == 3
  assert value(chain.folder / "third") == 7
  # The settings are taken back: so is the result.
  assert chain() == []
  assert value(chain.folder / "second") == 3
  assert not (chain.folder / "second.old").exists()
  with pytest.raises(KeyboardInterrupt):
    chain("second", second=3, killed="second")
  assert chain("second", second=3) == ["second", "third"]
  assert not (chain.folder / "second.old").exists()


def test_a_stage_deleted_by_hand_is_made_again(chain):
  chain()
  shutil.rmtree(chain.folder / "second")
  assert chain() == ["second"]


def test_a_reader_of_files_that_a_stage_makes_sees_the_new_ones(tmp_path):
  file, ran = tmp_path / "adds.py", tmp_path / "ran"
  file.write_text(STAGE)
  workdir = tmp_path / "w"

  def start(*rerun, first):
    ran.write_text("")
    config = pivot.get_config()
    fields = dict(ran=str(ran), note="")
    config.first = common.stage(f"{file}:run", value=first, **fields)
    # No edge, but a folder that the stage before it makes.
    made = dict(kind="classify", path=str(workdir / "first"))
    config.sources.made = made
    config.second = common.stage(f"{file}:run", value=1, data="made", **fields)
    config.order = ("first", "second")
    plan.run(plan.expand(config, workdir), workdir, config, rerun)
    return ran.read_text().split()

  assert start(first=1) == ["first", "second"]
  assert start(first=1) == []
  assert start("first", "second", first=2) == ["first", "second"]


def test_a_file_of_the_users_stays_where_the_stage_before_is_gone(chain):
  chain()
  shutil.rmtree(chain.folder / "first")
  mine = chain.folder / "second" / "mine.txt"
  mine.write_text("mine")
  # That it runs again is known when the stage before it has run.
  with pytest.raises(InputError, match="mine.txt: no run wrote it"):
    chain("second", first=5)
  assert mine.read_text() == "mine"
  mine.unlink()
  assert chain("second", first=5) == ["second", "third"]
