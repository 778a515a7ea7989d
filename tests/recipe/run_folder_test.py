"""A run folder keeps what a run may go on with and what is not its own."""

import dataclasses
import json
import logging
import pathlib
import re
import shutil

import ml_collections
import pytest

from pivot_jax import files
from pivot_jax.errors import InputError
from pivot_jax.recipe import run_folder
from pivot_jax.recipe.inputs import Inputs, Step

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
) -> Step:
  config = ml_collections.ConfigDict(TRAIN | changed)
  return Step(name, kind, config, {}, workdir / name)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  found = (path for path in folder.rglob("*") if path.is_file())
  return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def run(step: Step) -> None:
  inputs = Inputs()
  run_folder.begin(step, inputs)
  run_folder.finish(step, inputs, {}, 1.0)


def interrupt(step: Step) -> None:
  """Leave what a training that was killed after its checkpoint leaves."""
  run_folder.begin(step, Inputs())
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
    run_folder.begin(steps[1], Inputs())
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
  run_folder.begin(empty, Inputs())
  run_folder.begin(killed, Inputs())


def test_a_link_in_a_stage_folder_goes_and_not_its_target(tmp_path):
  target = tmp_path / "target"
  target.mkdir()
  (target / "mine.txt").write_text("mine")
  step = make_step(tmp_path)
  run_folder.begin(step, Inputs())
  (step.folder / "link").symlink_to(target)
  run_folder.begin(step, Inputs())
  assert not (step.folder / "link").is_symlink()
  assert (target / "mine.txt").read_text() == "mine"


# --- going on ----------------------------------------------------------------


def test_a_resumed_training_keeps_its_rates_and_its_tensorboard(tmp_path):
  step = make_step(tmp_path)
  interrupt(step)
  before = contents(step.folder)
  run_folder.begin(step, Inputs())
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
    run_folder.begin(step, Inputs())
  run_folder.begin(step, Inputs())
  del before["half.txt"]
  assert contents(step.folder) == before


def killed(*_, **__):
  raise KeyboardInterrupt


def test_a_training_without_checkpoints_starts_from_nothing(tmp_path):
  step = make_step(tmp_path)
  interrupt(step)
  (step.folder / "checkpoints" / "2" / "file").unlink()
  (step.folder / "checkpoints" / "2").rmdir()
  run_folder.begin(step, Inputs())
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
  others = [make_step(tmp_path, x, **changed) for x in ("done", "begun")]
  with caplog.at_level(logging.INFO, "pivot_jax"):
    for other in others:
      assert run_folder.change(other, Inputs()) == ""
      run_folder.log_free_changes(other)
  run_folder.begin(others[1], Inputs())
  assert (begun.folder / "checkpoints" / "2").is_dir()
  shown = next(iter(changed)) not in run_folder.LOGGING_KEYS
  assert len(caplog.messages) == 2 * shown


@pytest.mark.parametrize("field", ["lr", "batch"])
def test_what_decides_the_result_makes_another_finished_stage(tmp_path, field):
  run(make_step(tmp_path))
  other = make_step(tmp_path, **{field: 16})
  said = run_folder.change(other, Inputs())
  assert re.fullmatch(rf"{field}: .* -> 16", said)


def test_an_unfinished_training_goes_on_with_another_batch_only(tmp_path):
  interrupt(make_step(tmp_path))
  run_folder.begin(make_step(tmp_path, batch=16), Inputs())
  other = make_step(tmp_path, lr=1e-4)
  assert run_folder.change(other, Inputs()).startswith("lr: ")


def test_a_batch_that_is_a_matter_of_memory_does_not_count(tmp_path):
  run(make_step(tmp_path, kind="score"))
  other = make_step(tmp_path, kind="score", batch=16)
  assert run_folder.change(other, Inputs()) == ""


def test_a_stage_finished_under_another_mark_of_its_settings_is_finished(
  tmp_path,
):
  """The recorded settings count, not the way they were once hashed."""
  step = make_step(tmp_path)
  run(step)
  path = step.folder / "done.json"
  done = json.loads(path.read_text()) | {"config": "0123456789abcdef"}
  path.write_text(json.dumps(done))
  assert run_folder.change(step, Inputs()) == ""


SIZES = dict(vision=dict(hidden_size=96), llm=dict(hidden_size=64))


@pytest.mark.parametrize(
  ("kind", "given", "counts"),
  [
    ("train", (), ("llm", "vision")),
    ("train", ("vision",), ("llm",)),
    ("train", ("init",), ()),
    ("linear_probe", ("init",), ()),
    ("OWN:run", ("init",), ("llm", "vision")),
  ],
)
def test_sizes_count_for_a_part_that_the_stage_makes(
  tmp_path, kind, given, counts
):
  inputs = {name: str(tmp_path / f"{name}_weights") for name in given}
  (tmp_path / "own.py").write_text("")
  kind = kind.replace("OWN", str(tmp_path / "own.py"))

  def step(**changed):
    made = make_step(tmp_path, kind=kind, **(SIZES | changed))
    return dataclasses.replace(made, inputs=inputs)

  run(step())
  for part in ("llm", "vision"):
    other = step(**{part: dict(hidden_size=128)})
    said = run_folder.change(other, Inputs())
    assert bool(said) == (part in counts) and (not said or part in said)


@pytest.mark.parametrize(("kind", "counts"), [("train", 0), ("json:load", 1)])
def test_a_setting_that_no_record_has_is_of_a_later_version(
  tmp_path, kind, counts
):
  """In a kind of the user's own, whose settings have no versions, it counts."""
  run(make_step(tmp_path, kind=kind))
  other = make_step(tmp_path, kind=kind, smoothing=0.1)
  assert bool(run_folder.change(other, Inputs())) == counts


def test_a_source_with_another_field_makes_another_stage(tmp_path):
  run(make_step(tmp_path, sources=dict(a=dict(kind="scenes", size=3))))
  now = dict(a=dict(kind="scenes", size=3, seed=1))
  other = make_step(tmp_path, sources=now)
  assert "sources.a.seed" in run_folder.change(other, Inputs())


# --- made again --------------------------------------------------------------


def test_a_result_stays_beside_what_replaces_it_until_that_is_done(tmp_path):
  step = make_step(tmp_path)
  run(step)
  before = contents(step.folder)
  run_folder.set_aside(step)
  before["replaced.json"] = b'{\n  "stage": "stage"\n}\n'
  assert not step.folder.exists()
  assert contents(run_folder.old(step).folder) == before
  # Another attempt is killed and replaced: the last result stays.
  interrupt(step)
  run_folder.set_aside(step)
  assert contents(run_folder.old(step).folder) == before
  run(step)
  run_folder.discard_old(step)
  assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_a_result_set_aside_is_taken_back_if_it_is_asked_for(tmp_path):
  step, other = make_step(tmp_path), make_step(tmp_path, lr=1.0)
  run(step)
  before = contents(step.folder)
  run_folder.set_aside(step)
  interrupt(other)
  assert not run_folder.restore(other, Inputs())
  assert run_folder.restore(step, Inputs())
  assert contents(step.folder) == before


def test_what_lies_where_a_result_would_be_set_aside_is_kept(tmp_path):
  step = make_step(tmp_path)
  run(step)
  mine = tmp_path / "stage.old"
  # A backup that the user made, with the run's own records in it.
  shutil.copytree(step.folder, mine)
  before = contents(tmp_path)
  for touch in (
    lambda: run_folder.check_folders(tmp_path, [step]),
    lambda: run_folder.set_aside(step),
    lambda: run_folder.discard_old(step),
  ):
    with pytest.raises(InputError, match="stage.old.*config.json"):
      touch()
  assert not run_folder.restore(step, Inputs())
  assert contents(tmp_path) == before
  # Nor are checkpoints deleted for want of a place to set them aside.
  shutil.rmtree(step.folder)
  interrupt(step)
  before = contents(tmp_path)
  with pytest.raises(InputError, match="stage.old.*config.json"):
    run_folder.set_aside(step)
  assert contents(tmp_path) == before


def test_a_link_where_a_result_would_be_set_aside_is_kept(tmp_path):
  step, outside = make_step(tmp_path), tmp_path / "outside"
  run(step)
  outside.mkdir()
  (tmp_path / "stage.old").symlink_to(outside)
  with pytest.raises(InputError, match="stage.old: is a symbolic link"):
    run_folder.set_aside(step)
  assert (step.folder / "done.json").exists() and outside.is_dir()


def test_checkpoints_are_set_aside_and_taken_back_like_results(tmp_path):
  step = make_step(tmp_path)
  interrupt(step)
  run_folder.set_aside(step)
  interrupt(make_step(tmp_path, lr=1.0))
  assert run_folder.restore(step, Inputs())
  assert run_folder.is_begun(step)
  assert run_folder.change(step, Inputs()) == ""


@pytest.mark.parametrize("calls", range(1, 5))
def test_a_kill_while_a_folder_is_deleted_leaves_it_the_runs(
  tmp_path, monkeypatch, calls
):
  step = make_step(tmp_path)
  run(step)
  (step.folder / "a.txt").write_text("a")
  run_folder.set_aside(step)
  run(step)
  left = iter(range(calls - 1))
  unlink = pathlib.Path.unlink

  def unlink_or_die(path, *args, **kwargs):
    if "stage.old" in str(path) and next(left, None) is None:
      raise KeyboardInterrupt
    unlink(path, *args, **kwargs)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(pathlib.Path, "unlink", unlink_or_die)
    run_folder.discard_old(step)
  run_folder.check_folders(tmp_path, [step])
  run_folder.discard_old(step)
  assert [path.name for path in tmp_path.iterdir()] == ["stage"]


@pytest.mark.parametrize("first", [True, False])
def test_what_says_that_a_folder_is_the_runs_goes_last(
  tmp_path, monkeypatch, first
):
  step, gone = make_step(tmp_path), []
  run(step)
  run_folder.set_aside(step)
  unlink, iterdir = pathlib.Path.unlink, pathlib.Path.iterdir

  def note(path, *args, **kwargs):
    gone.append(path.name)
    unlink(path, *args, **kwargs)

  def in_any_order(path):
    """A file system may list the record first, or last."""
    return iter(
      sorted(iterdir(path), key=lambda x: (x.name == "replaced.json") != first)
    )

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "unlink", note)
    patch.setattr(pathlib.Path, "iterdir", in_any_order)
    run_folder.discard_old(step)
  assert len(gone) == 3 and gone[-1] == "replaced.json"


def test_an_attempt_on_other_inputs_needs_leave_to_drop_a_result(tmp_path):
  rows = tmp_path / "rows.jsonl"
  rows.write_text("1")
  step = make_step(tmp_path, sources={"rows": {"path": str(rows)}})
  run(step)
  run_folder.set_aside(step)
  rows.write_text("2")
  run_folder.begin(step, Inputs())
  assert not run_folder.replaces_old(step, Inputs())
  rows.write_text("3")
  assert run_folder.replaces_old(step, Inputs())
  assert not run_folder.replaces_old(step, Inputs(), unknown=("rows.path",))


def test_a_checkpoint_that_is_not_whole_is_nothing_to_lose(tmp_path):
  step = make_step(tmp_path)
  run_folder.begin(step, Inputs())
  place = step.folder / "checkpoints" / "2.orbax-checkpoint-tmp"
  place.mkdir(parents=True)
  assert not run_folder.is_begun(step)
  assert run_folder.change(make_step(tmp_path, lr=1.0), Inputs()) == ""
  place.rename(place.with_name("2"))
  assert run_folder.is_begun(step)
  assert run_folder.change(make_step(tmp_path, lr=1.0), Inputs())


def test_a_file_of_the_users_in_a_result_is_named_before_it_goes(tmp_path):
  step = make_step(tmp_path)
  run(step)
  for name in (".DS_Store", f"config.json.{'0' * 16}.tmp"):
    (step.folder / name).write_text("left")
  run_folder.check_whole(step)
  for name in ("params", "plots"):
    (step.folder / name).mkdir()
  with pytest.raises(InputError, match="plots: no run wrote it.*move it away"):
    run_folder.check_whole(step)
  (step.folder / "plots").rename(step.folder / "notes.tmp")
  with pytest.raises(InputError, match="notes.tmp: no run wrote it"):
    run_folder.check_whole(step)


@pytest.mark.parametrize(
  "name", ["config.json", "plan.txt", "report.json", "report.html", "lock"]
)
def test_a_file_that_no_run_wrote_is_not_replaced(tmp_path, name):
  (tmp_path / name).write_text("mine")
  with pytest.raises(InputError, match=f"{name}: no run wrote it"):
    run_folder.check_folders(tmp_path, [make_step(tmp_path)])
  (tmp_path / name).rename(tmp_path / "notes.txt")
  run_folder.check_folders(tmp_path, [make_step(tmp_path)])


@pytest.mark.parametrize("sign", ["lock", "stage", "stage.old"])
def test_a_file_beside_a_lock_or_a_stage_is_the_runs(tmp_path, sign):
  (tmp_path / "config.json").write_text("{}")
  step = make_step(tmp_path)
  if sign == "lock":
    (tmp_path / "lock").write_text("4711")
  else:
    run(step)
  if sign == "stage.old":
    run_folder.set_aside(step)
  run_folder.check_folders(tmp_path, [step])


def test_the_title_of_a_report_counts_and_of_nothing_else(tmp_path):
  for kind, counts in (("report", True), ("train", False)):
    step = make_step(tmp_path, kind, kind, title="a")
    run(step)
    other = make_step(tmp_path, kind, kind, title="b")
    assert bool(run_folder.change(other, Inputs())) == counts


# --- code of the user's own --------------------------------------------------


@pytest.mark.parametrize("where", ["kind", "objective", "source"])
def test_code_of_the_users_own_counts_by_its_content(tmp_path, where):
  file = tmp_path / "own.py"
  file.write_text("def run(**_):\n  return None\n")
  name = f"{file}:run"
  fields = {
    "kind": dict(kind=name),
    "objective": dict(objective=name),
    "source": dict(sources=dict(a=dict(kind="scenes", path=str(file)))),
  }[where]
  step = make_step(tmp_path, **fields)
  run(step)
  assert run_folder.change(step, Inputs()) == ""
  file.write_text("def run(**_):\n  return 1\n")
  said = run_folder.change(step, Inputs())
  assert said.startswith("other ")


def test_what_a_kind_of_the_users_own_computes_with_counts(tmp_path):
  file = tmp_path / "own.py"
  file.write_text("def run():\n  pass\n")
  kind = f"{file}:run"
  run(make_step(tmp_path, kind=kind))
  for field, value in (("batch", 7), ("pack", {"row": 1}), ("accum", 9)):
    other = make_step(tmp_path, kind=kind, **{field: value})
    assert field in run_folder.change(other, Inputs())
  for field in ("tensorboard", "arm", "measure"):
    other = make_step(tmp_path, kind=kind, **{field: "x"})
    # A field that no record has counts whatever it is, but for these.
    assert not run_folder.change(other, Inputs())


def test_files_in_folders_of_an_own_kind_are_results(tmp_path):
  file = tmp_path / "own.py"
  file.write_text("def run():\n  pass\n")
  step = make_step(tmp_path, kind=f"{file}:run")
  inputs = Inputs()
  run_folder.begin(step, inputs)
  (step.folder / "hf").mkdir()
  (step.folder / "hf" / "weights").write_text("1")
  run_folder.finish(step, inputs, {}, 1.0)
  (step.folder / "hf" / "weights").write_text("2")
  with pytest.raises(InputError, match="hf/weights is not what the stage"):
    run_folder.is_done(step)
