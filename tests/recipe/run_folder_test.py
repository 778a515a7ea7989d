"""A run folder keeps what a run may go on with and what is not its own."""

import json
import logging
import pathlib

import ml_collections
import pytest

from pivot_jax import files
from pivot_jax.errors import InputError
from pivot_jax.recipe import run_folder

TRAIN = dict(
  batch=32,
  lr=1e-3,
  accum=1,
  mesh=dict(data=-1, fsdp=1),
  pack=dict(row=256),
  compute=dict(dtype="float32", remat="none"),
  workers=-1,
  tensorboard=False,
)


def make_step(
  workdir: pathlib.Path, name: str = "stage", kind: str = "train", **changed
) -> run_folder.Step:
  config = ml_collections.ConfigDict(TRAIN | changed)
  return run_folder.Step(name, kind, config, {}, workdir / name)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  found = (path for path in folder.rglob("*") if path.is_file())
  return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def run(step: run_folder.Step) -> None:
  inputs = run_folder.Inputs()
  run_folder.begin(step, inputs)
  run_folder.finish(step, inputs, {}, 1.0)


def interrupt(step: run_folder.Step) -> None:
  """Leave what a training that was killed after its checkpoint leaves."""
  run_folder.begin(step, run_folder.Inputs())
  for name in ("checkpoints/2", "tensorboard", "profile"):
    (step.folder / name).mkdir(parents=True)
    (step.folder / name / "file").write_text(name)
  for name in ("metrics.jsonl", "speed.jsonl", "half.txt"):
    (step.folder / name).write_text(f'{{"step": "{name}"}}\n')


# --- what is not the run's own -----------------------------------------------


def test_a_folder_that_no_run_made_is_kept_byte_for_byte(tmp_path):
  mine = tmp_path / "report"
  (mine / "figures").mkdir(parents=True)
  (mine / "thesis.tex").write_bytes(b"years of work\r\n")
  (mine / "figures" / "a.png").write_bytes(bytes(range(256)))
  before = contents(tmp_path)
  steps = [make_step(tmp_path, "stage1"), make_step(tmp_path, "report")]
  with pytest.raises(InputError, match="report.*figures"):
    run_folder.check_folders(tmp_path, steps)
  with pytest.raises(InputError, match="report.*figures"):
    run_folder.begin(steps[1], run_folder.Inputs())
  assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["reference", "seed1/reference"])
def test_what_a_link_points_to_is_kept(tmp_path, name):
  """Also if a run made it: the stage's folder, or that of its seed."""
  outside, workdir = tmp_path / "outside", tmp_path / "w"
  run(make_step(outside, "reference"))
  (outside / "reference" / "mine.txt").write_text("mine")
  before = contents(outside)
  link = workdir / name.split("/")[0]
  workdir.mkdir()
  link.symlink_to(outside if "/" in name else outside / "reference")
  step = make_step(workdir, name)
  with pytest.raises(InputError, match=f"{link}: is a symbolic link"):
    run_folder.check_folders(workdir, [step])
  assert contents(outside) == before and link.is_symlink()


@pytest.mark.parametrize("name", ["reference", "seed1/reference"])
def test_a_file_in_the_place_of_a_folder_is_kept(tmp_path, name):
  file = tmp_path / name.split("/")[0]
  file.write_text("mine")
  with pytest.raises(InputError, match=f"{file}: is a file"):
    run_folder.check_folders(tmp_path, [make_step(tmp_path, name)])
  assert file.read_text() == "mine"


def test_a_record_of_another_program_does_not_make_a_folder_the_runs(tmp_path):
  folder = tmp_path / "report"
  folder.mkdir()
  (folder / "done.json").write_text('{"todo": []}')
  with pytest.raises(InputError, match="report.*done.json"):
    run_folder.check_folders(tmp_path, [make_step(tmp_path, "report")])


def test_absent_empty_and_own_folders_are_the_runs(tmp_path):
  (tmp_path / "empty").mkdir()
  killed = make_step(tmp_path, "killed")
  killed.folder.mkdir()
  (killed.folder / "begun.json.0a1b2c3d.tmp").write_text("{")
  begun, done = make_step(tmp_path, "begun"), make_step(tmp_path, "seed1/done")
  interrupt(begun)
  run(done)
  absent, empty = make_step(tmp_path, "absent"), make_step(tmp_path, "empty")
  steps = [absent, empty, killed, begun, done]
  run_folder.check_folders(tmp_path, steps)
  run_folder.begin(empty, run_folder.Inputs())
  run_folder.begin(killed, run_folder.Inputs())


def test_a_link_in_a_stage_folder_goes_and_not_its_target(tmp_path):
  target = tmp_path / "target"
  target.mkdir()
  (target / "mine.txt").write_text("mine")
  step = make_step(tmp_path)
  run_folder.begin(step, run_folder.Inputs())
  (step.folder / "link").symlink_to(target)
  run_folder.begin(step, run_folder.Inputs())
  assert not (step.folder / "link").is_symlink()
  assert (target / "mine.txt").read_text() == "mine"


# --- going on ----------------------------------------------------------------


def test_a_resumed_training_keeps_its_rates_and_its_tensorboard(tmp_path):
  step = make_step(tmp_path)
  interrupt(step)
  before = contents(step.folder)
  run_folder.begin(step, run_folder.Inputs())
  del before["half.txt"]
  assert contents(step.folder) == before


def test_a_resume_that_is_killed_between_its_records_can_go_on(
  tmp_path, monkeypatch
):
  step = make_step(tmp_path)
  interrupt(step)
  before = contents(step.folder)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(files, "write_json", killed)
    run_folder.begin(step, run_folder.Inputs())
  run_folder.begin(step, run_folder.Inputs())
  del before["half.txt"]
  assert contents(step.folder) == before


def killed(*_, **__):
  raise KeyboardInterrupt


def test_a_training_without_checkpoints_starts_from_nothing(tmp_path):
  step = make_step(tmp_path)
  interrupt(step)
  (step.folder / "checkpoints" / "2" / "file").unlink()
  (step.folder / "checkpoints" / "2").rmdir()
  run_folder.begin(step, run_folder.Inputs())
  assert contents(step.folder).keys() == {"begun.json", "config.json"}


OTHERWISE = [
  dict(mesh=dict(data=1, fsdp=8)),
  dict(accum=4),
  dict(pack=dict(row=512)),
  dict(compute=dict(dtype="bfloat16", remat="full")),
  dict(workers=3),
  dict(tensorboard=True),
]


@pytest.mark.parametrize("changed", OTHERWISE, ids=lambda x: next(iter(x)))
def test_how_it_is_computed_makes_no_other_stage_begun_or_finished(
  tmp_path, changed, caplog
):
  begun, done = make_step(tmp_path, "begun"), make_step(tmp_path, "done")
  interrupt(begun)
  run(done)
  with caplog.at_level(logging.INFO, "pivot_jax"):
    assert run_folder.finished(
      make_step(tmp_path, "done", **changed), run_folder.Inputs()
    )
    run_folder.begin(
      make_step(tmp_path, "begun", **changed), run_folder.Inputs()
    )
  assert (begun.folder / "checkpoints" / "2").is_dir()
  shown = next(iter(changed)) not in run_folder.LOGGING_KEYS
  assert len(caplog.messages) == 2 * shown


@pytest.mark.parametrize("field", ["lr", "batch"])
def test_what_decides_the_result_makes_another_finished_stage(tmp_path, field):
  run(make_step(tmp_path))
  other = make_step(tmp_path, **{field: 16})
  with pytest.raises(InputError, match=rf"made with other .*{field}: .* -> 16"):
    run_folder.finished(other, run_folder.Inputs())


def test_an_unfinished_training_goes_on_with_another_batch_only(tmp_path):
  interrupt(make_step(tmp_path))
  run_folder.begin(make_step(tmp_path, batch=16), run_folder.Inputs())
  with pytest.raises(InputError, match=r"begun with other settings \(lr: "):
    run_folder.begin(make_step(tmp_path, lr=1e-4), run_folder.Inputs())


def test_a_batch_that_is_a_matter_of_memory_does_not_count(tmp_path):
  run(make_step(tmp_path, kind="score"))
  other = make_step(tmp_path, kind="score", batch=16)
  assert run_folder.finished(other, run_folder.Inputs())


def test_a_stage_finished_under_another_mark_of_its_settings_is_finished(
  tmp_path,
):
  """The recorded settings count, not the way they were once hashed."""
  step = make_step(tmp_path)
  run(step)
  path = step.folder / "done.json"
  done = json.loads(path.read_text()) | {"config": "0123456789abcdef"}
  path.write_text(json.dumps(done))
  assert run_folder.finished(step, run_folder.Inputs())
