"""Nothing of a run folder is written through a link; errors touch nothing."""

import os
import pathlib

import ml_collections
import pytest

from pivot_jax import files
from pivot_jax.errors import InputError
from pivot_jax.recipe import lock, plan, run_folder
from pivot_jax.recipe.inputs import Inputs, Step


def make_step(workdir: pathlib.Path) -> Step:
  config = ml_collections.ConfigDict({"batch": 2})
  return Step("one", "train", config, {}, workdir / "one")


@pytest.fixture
def outside(tmp_path) -> pathlib.Path:
  """Return a folder of the user's, which must stay as it is."""
  folder = tmp_path / "outside"
  (folder / "deep").mkdir(parents=True)
  (folder / "file").write_text("mine")
  return folder


@pytest.mark.parametrize(
  "name, target",
  [
    ("checkpoints", "."),
    ("checkpoints/7/state", "deep"),
    ("metrics.jsonl", "file"),
    ("speed.jsonl", "absent"),
    ("tensorboard", "."),
    ("writers/mine", "file"),
    ("profile/plugins", "deep"),
  ],
)
def test_a_run_that_would_go_on_through_a_link_is_refused(
  tmp_path, outside, name, target
):
  workdir = tmp_path / "w"
  step, inputs = make_step(workdir), Inputs()
  run_folder.begin(step, inputs)
  (step.folder / "checkpoints" / "2").mkdir(parents=True)
  link = step.folder / name
  if name == "checkpoints":
    (step.folder / name / "2").rmdir()
    (step.folder / name).rmdir()
  link.parent.mkdir(parents=True, exist_ok=True)
  link.symlink_to(outside / target)
  before = sorted(workdir.rglob("*"))
  planned = plan.Plan((step,), {})
  for refuse in (
    lambda: run_folder.check_folders(workdir, [step]),
    lambda: run_folder.begin(step, inputs),
    lambda: run_folder.set_aside(step),
    lambda: plan.run(planned, workdir, step.config),
  ):
    with pytest.raises(InputError, match=f"{link}: is a symbolic link"):
      refuse()
  assert sorted(workdir.rglob("*")) == before
  assert (outside / "file").read_text() == "mine"
  assert sorted(p.name for p in outside.iterdir()) == ["deep", "file"]


def test_what_a_finished_stage_only_reads_may_lie_elsewhere(tmp_path, outside):
  step, inputs = make_step(tmp_path / "w"), Inputs()
  run_folder.begin(step, inputs)
  (step.folder / "tensorboard").symlink_to(outside)
  run_folder.finish(step, inputs, {}, 1.0)
  run_folder.check_folders(tmp_path / "w", [step])


def test_a_workdir_may_be_a_link_itself(tmp_path, outside):
  workdir = tmp_path / "w"
  workdir.symlink_to(outside / "deep")
  step = make_step(workdir)
  run_folder.check_folders(workdir, [step])
  with lock.hold(workdir):
    run_folder.begin(step, Inputs())
  assert (outside / "deep" / "one" / "begun.json").is_file()


@pytest.mark.parametrize("target", ["file", "absent", "deep"])
def test_the_lock_is_not_opened_through_a_link(tmp_path, outside, target):
  (tmp_path / "lock").symlink_to(outside / target)
  with (
    pytest.raises(InputError, match="lock: cannot be written .a symbolic"),
    lock.hold(tmp_path),
  ):
    pass
  assert (outside / "file").read_text() == "mine"
  assert not (outside / "absent").exists()


def test_the_lock_of_another_name_is_held_and_not_written(tmp_path, outside):
  os.link(outside / "file", tmp_path / "lock")
  with lock.hold(tmp_path):
    pass
  assert (outside / "file").read_text() == "mine"


def test_a_lock_tells_who_holds_it_and_not_who_asks(tmp_path):
  place = tmp_path / "lock"
  place.write_text("x" * 100)
  with lock.hold(tmp_path):
    assert place.read_text() == str(os.getpid())
    place.write_text("held")
    with pytest.raises(InputError, match="in use"), lock.hold(tmp_path):
      pass
    assert place.read_text() == "held"


def test_a_pipe_in_place_of_the_lock_is_refused_at_once(tmp_path):
  os.mkfifo(tmp_path / "lock")
  with (
    pytest.raises(InputError, match="lock: cannot be written"),
    lock.hold(tmp_path),
  ):
    pass


def test_a_folder_in_place_of_the_plan_is_an_error_in_a_line(tmp_path):
  (tmp_path / "plan.txt").mkdir()
  with pytest.raises(InputError, match="plan.txt: is a folder"):
    files.write_text(tmp_path / "plan.txt", "text")
  assert [p.name for p in tmp_path.iterdir()] == ["plan.txt"]
