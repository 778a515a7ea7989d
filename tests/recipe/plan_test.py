"""A recipe expands, refuses wrong edges, skips what is done, and locks."""

import json
import logging
import pathlib

import ml_collections
import pytest

from pivot_jax.configs import common, pivot
from pivot_jax.errors import InputError
from pivot_jax.recipe import lock, plan
from pivot_jax.stages import detach, report, train


def test_the_default_recipe_has_every_arm_and_no_stage_zero(tmp_path):
  planned = plan.expand(pivot.get_config(), tmp_path)
  names = [step.name for step in planned.steps]
  for arm in ("original", "stage1", "sft", "dpo"):
    assert f"detach_{arm}" in names and f"evaluate_pivot_{arm}" in names
  assert names[0] == "stage1_proj" and names[-1] == "report"
  assert planned.left_out["stage0_llm"] == "its weights are given"


def test_from_scratch_makes_stage_zero_first(tmp_path):
  planned = plan.expand(pivot.get_config("from_scratch"), tmp_path)
  assert [s.name for s in planned.steps[:2]] == ["stage0_llm", "stage0_vision"]


def test_both_arms_start_from_one_checkpoint_on_one_stream(tmp_path):
  planned = plan.expand(pivot.get_config(), tmp_path)
  step = {s.name: s for s in planned.steps}
  sft, dpo = step["stage2_sft"], step["stage2_dpo"]
  assert sft.inputs["init"] == dpo.inputs["init"]
  for field in ("data", "data_seed", "batch", "steps", "sources"):
    assert sft.config[field] == dpo.config[field]


def test_seeds_repeat_the_arms_only_and_the_report_is_last(tmp_path):
  config = pivot.get_config()
  config.seeds = 2
  planned = plan.expand(config, tmp_path)
  names = [step.name for step in planned.steps]
  assert "seed1/stage2_dpo" in names and "seed1/stage1_full" not in names
  assert names[-1] == "report" and names.count("report") == 1
  step = {s.name: s for s in planned.steps}
  assert step["seed1/stage2_dpo"].inputs["init"] == "package:toy/stage1"
  assert step["seed1/detach_dpo"].inputs["init"] == str(
    tmp_path / "seed1" / "stage2_dpo"
  )
  assert step["seed1/stage2_dpo"].config.seed != step["stage2_dpo"].config.seed


def test_an_edge_to_a_later_stage_is_refused(tmp_path):
  config = pivot.get_config()
  config.stage1_full.inputs.init = "@stage2_dpo"
  with pytest.raises(InputError, match="does not run before"):
    plan.expand(config, tmp_path)


def test_stages_without_data_are_left_out_with_what_to_set(tmp_path):
  config = pivot.get_config("files")
  config.files.pretrain = "pairs.json"
  planned = plan.expand(config, tmp_path)
  names = {step.name for step in planned.steps}
  assert "stage1_full" in names and "stage2_dpo" not in names
  assert "--config.files.preference" in planned.left_out["stage2_dpo"]
  assert planned.left_out["detach_dpo"] == "needs stage2_dpo, which is skipped"


def test_another_tokenizer_trains_the_llm_anew(tmp_path):
  config = pivot.get_config()
  config.tokenizer = "elsewhere"
  planned = plan.expand(config, tmp_path)
  step = {s.name: s for s in planned.steps}
  assert "stage0_llm" in step and "stage0_vision" not in step
  assert step["pivot_proj_dpo"].inputs["llm"] == str(
    tmp_path / "stage0_llm:llm"
  )


@pytest.mark.parametrize("tokenizer", ["package:toy", "some/folder"])
def test_a_plan_leaves_the_config_as_it_was(tmp_path, tokenizer):
  config = pivot.get_config()
  config.tokenizer, config.seeds = tokenizer, 2
  before = config.to_dict()
  plan.expand(config, tmp_path)
  assert config.to_dict() == before
  resolved = plan.resolve(config)
  assert config.to_dict() == before
  # The plan of what was resolved is the plan of the config.
  assert plan.expand(resolved, tmp_path) == plan.expand(config, tmp_path)


@pytest.fixture
def small(tmp_path, monkeypatch):
  """A recipe of one stage that counts its runs."""
  runs = []

  def run(config, inputs, out):
    runs.append(config.name)
    (out / "result.txt").write_text("42")
    return {"parameters": 42}

  monkeypatch.setattr(detach, "run", run)
  config = pivot.get_config()
  config.order = ("detach_dpo",)
  config.detach_dpo.inputs = ml_collections.ConfigDict(
    {"init": "package:toy:vision"}
  )
  return config, tmp_path / "w", runs


def _run(config, workdir):
  plan.run(plan.expand(config, workdir), workdir, config)


def test_a_finished_stage_is_skipped(small):
  config, workdir, runs = small
  _run(config, workdir)
  _run(config, workdir)
  assert runs == ["detach_dpo"]
  done = json.loads((workdir / "detach_dpo" / "done.json").read_text())
  assert done["metrics"] == {"parameters": 42} and done["outputs"]


def test_a_result_that_was_changed_afterwards_is_no_result(small):
  config, workdir, _ = small
  _run(config, workdir)
  (workdir / "detach_dpo" / "result.txt").write_text("43")
  with pytest.raises(
    InputError, match="result.txt is not what the stage wrote"
  ):
    _run(config, workdir)


def test_half_a_result_without_a_checkpoint_is_made_again(small):
  """Also if it was begun from other data, as from a file since mended."""
  config, workdir, runs = small
  folder = workdir / "detach_dpo"
  folder.mkdir(parents=True)
  (folder / "begun.json").write_text('{"config": "other", "inputs": {}}')
  (folder / "half.txt").write_text("half")
  _run(config, workdir)
  assert runs == ["detach_dpo"] and not (folder / "half.txt").exists()
  assert not (folder / "begun.json").exists()


def test_a_folder_of_another_is_an_error_before_anything_is_touched(small):
  config, workdir, runs = small
  config.order = ("detach_dpo", "report")
  (workdir / "report").mkdir(parents=True)
  (workdir / "report" / "thesis.tex").write_text("mine")
  with pytest.raises(InputError, match="report.*thesis.tex"):
    _run(config, workdir)
  assert runs == [] and [p.name for p in workdir.iterdir()] == ["report"]
  assert (workdir / "report" / "thesis.tex").read_text() == "mine"


def test_a_finished_stage_that_changed_is_not_replaced_unasked(small):
  config, workdir, runs = small
  _run(config, workdir)
  config.detach_dpo.seed = 5
  with pytest.raises(
    InputError, match=r"detach_dpo \(seed: 0 -> 5\).*--rerun=detach_dpo"
  ):
    _run(config, workdir)
  assert len(runs) == 1


def test_logging_keys_do_not_make_another_configuration(small):
  config, workdir, runs = small
  _run(config, workdir)
  config.tensorboard = True
  _run(config, workdir)
  assert len(runs) == 1


def test_a_workdir_in_use_is_refused(small):
  config, workdir, _ = small
  workdir.mkdir()
  with lock.hold(workdir), pytest.raises(InputError, match="in use"):
    _run(config, workdir)


# --- arms and kinds -----------------------------------------------------------


@pytest.mark.parametrize("name", ["lock", "seed1"])
def test_a_stage_may_not_be_called_as_what_a_run_writes(tmp_path, name):
  config = pivot.get_config()
  config[name] = config.detach_dpo
  config.order = (*config.order, name)
  with pytest.raises(InputError, match=f"{name}.*call the stage otherwise"):
    plan.expand(config, tmp_path)


def test_a_report_that_is_lost_is_put_back(tmp_path, monkeypatch):
  def run(config, inputs, out):
    for folder in (out, out.parent):
      (folder / "report.json").write_text("{}")
      (folder / "report.html").write_text("<p>")
    return {}

  monkeypatch.setattr(report, "run", run)
  config, workdir = pivot.get_config(), tmp_path / "w"
  config.order = ("detach_dpo", "report")
  config.detach_dpo.inputs = ml_collections.ConfigDict(
    {"init": "package:toy:vision"}
  )
  monkeypatch.setattr(detach, "run", lambda *_: {})
  _run(config, workdir)
  (workdir / "report.html").unlink()
  _run(config, workdir)
  assert (workdir / "report.html").read_text() == "<p>"


def test_a_kind_that_returns_no_numbers_is_an_error(tmp_path):
  config, file = pivot.get_config(), tmp_path / "nothing.py"
  file.write_text("def run(*_):\n  return None\n")
  config.first = common.stage(f"{file}:run")
  config.order = ("first",)
  planned = plan.expand(config, tmp_path / "w")
  with pytest.raises(InputError, match="first.kind.*returned NoneType"):
    plan.run(planned, tmp_path / "w", config)


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (dict(arm="dop"), "linear_probe_dpo.arm='dop': the arms are original"),
    (dict(measure="vqa"), "linear_probe_dpo.measure='vqa': choose one of lin"),
    (dict(arm="sft"), "linear_probe_dpo and linear_probe_sft both measure"),
  ],
)
def test_a_stage_that_measures_the_wrong_thing_is_an_error(
  tmp_path, change, says
):
  config = pivot.get_config()
  config.linear_probe_dpo.update(change)
  with pytest.raises(InputError, match=says):
    plan.expand(config, tmp_path)


def test_arms_have_names_of_their_own_and_pairs_are_of_arms(tmp_path):
  config = pivot.get_config()
  config.arms = (*pivot.ARMS, common.arm("x", model="m", label="SFT"))
  with pytest.raises(InputError, match="two have the label 'SFT'"):
    plan.expand(config, tmp_path)
  config.arms = pivot.ARMS
  for pair, says in (
    (common.pair("dpo", "nobody"), "'nobody' is no arm"),
    (dict(one="dpo", other="sft"), "has no 'same_rows'"),
  ):
    config.compared = (pair,)
    with pytest.raises(InputError, match=says):
      plan.expand(config, tmp_path)


def test_one_more_arm_is_measured_and_compared(tmp_path):
  config = pivot.get_config()
  arm = common.arm("again", model="stage2_dpo", label="the same again")
  pivot.add_arm(config, arm)
  names = [step.name for step in plan.expand(config, tmp_path).steps]
  assert names[-1] == "report" and names.count("report") == 1
  for kind in (
    "detach",
    "linear_probe",
    "segment_probe",
    "gradcam",
    "evaluate",
  ):
    assert f"{kind}_again" in names
  report = plan.expand(config, tmp_path).steps[-1].config
  assert report.compared[-1]["one"] == "again"


def test_a_kind_that_is_nobodys_is_an_error_at_once(tmp_path):
  config = pivot.get_config()
  config.order = ("mine",)
  for kind, says in (
    ("linear_prob", "mine.kind='linear_prob': choose one of"),
    ("nowhere.py:run", "mine.kind: nowhere.py: no such file"),
    ("json:run", "mine.kind='json:run': json has no 'run'"),
  ):
    config.mine = common.stage("a:b")
    config.mine.kind = kind
    with pytest.raises(InputError, match=says):
      plan.expand(config, tmp_path)


# --- results that ship with the package --------------------------------------


def shipped(**overrides):
  config = pivot.get_config()
  for key, value in overrides.items():
    config.update_from_flattened_dict({key.replace("__", "."): value})
  planned = plan.expand(config, pathlib.Path("run"))
  ran = {step.name: step for step in planned.steps}
  return ran, planned.left_out


def test_the_default_starts_from_the_shipped_stage_1():
  ran, left_out = shipped()
  assert "stage1_full" not in ran and "shipped" in left_out["stage1_full"]
  address = "package:toy/stage1"
  assert ran["reference"].inputs["init"] == address
  assert ran["stage2_sft"].inputs["init"] == address
  assert ran["detach_stage1"].inputs["init"] == address


@pytest.mark.parametrize(
  "change",
  [
    dict(stage1_full__steps=7),
    dict(stage1_full__seed=3),
    dict(stage1_proj__steps=7),
    dict(sources__chat__turns=2),
    dict(vision__init="hf:somewhere"),
    dict(llm__init=""),
    dict(compute__dtype="bfloat16"),
    dict(tokenizer="elsewhere"),
  ],
)
def test_a_changed_stage_1_runs_instead_of_the_shipped_one(change):
  ran, _ = shipped(**change)
  assert ran["stage2_dpo"].inputs["init"].endswith("run/stage1_full")
  assert ran["stage1_full"].inputs["init"].endswith("run/stage1_proj")


def test_where_it_runs_does_not_unmake_the_shipped_stage_1():
  ran, _ = shipped(
    mesh__fsdp=8,
    compute__remat="full",
    stage1_full__accum=4,
    stage1_proj__pack__row=512,
  )
  assert "stage1_full" not in ran


def with_new_defaults() -> ml_collections.ConfigDict:
  """The recipe of a later version, which knows more settings."""
  config = pivot.get_config()
  for section in (config.stage1_full, config.stage1_proj):
    section.smoothing = 0.0
  config.sources.chat.style = "plain"
  config.llm.sliding_window = 0
  return config


def test_a_setting_that_no_record_has_does_not_unmake_the_shipped_stage_1():
  planned = plan.expand(with_new_defaults(), pathlib.Path("run"))
  assert "shipped" in planned.left_out["stage1_full"]


@pytest.mark.parametrize(
  "change",
  [
    dict(stage1_full__warmup=0.5),
    dict(sources__chat__turns=2),
    dict(llm__rope_theta=1e4),
  ],
  ids=str,
)
def test_a_recorded_setting_unmakes_it_among_new_ones_too(change):
  config = with_new_defaults()
  for key, value in change.items():
    config.update_from_flattened_dict({key.replace("__", "."): value})
  planned = plan.expand(config, pathlib.Path("run"))
  assert "stage1_full" not in planned.left_out


def test_another_input_unmakes_the_shipped_stage_1():
  config = with_new_defaults()
  config.stage1_full.inputs.projector = "elsewhere"
  planned = plan.expand(config, pathlib.Path("run"))
  assert "stage1_full" not in planned.left_out


def test_a_stage_begun_from_other_data_is_not_continued(tmp_path, monkeypatch):
  file = tmp_path / "rows.jsonl"
  file.write_text("{}\n")
  config = pivot.get_config()
  config.order = ("detach_original",)
  config.detach_original.inputs.init = "package:toy:vision"
  planned = plan.expand(config, tmp_path / "w")
  (step,) = planned.steps
  step.config.sources = {"rows": {"kind": "preference", "path": str(file)}}

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(detach, "run", killed)
  with pytest.raises(KeyboardInterrupt):
    plan.run(planned, tmp_path / "w", config)
  (step.folder / "checkpoints" / "2").mkdir(parents=True)
  file.write_text('{"another": 1}\n')
  with pytest.raises(InputError, match=r"detach_original \(other rows.path\)"):
    plan.run(planned, tmp_path / "w", config)


def test_an_unfinished_stage_goes_on_with_another_batch_and_says_so(
  tmp_path, monkeypatch, caplog
):
  config = pivot.get_config()
  config.order = ("stage1_proj",)
  planned = plan.expand(config, tmp_path / "w")

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(train, "run", killed)
  with pytest.raises(KeyboardInterrupt):
    plan.run(planned, tmp_path / "w", config)
  (planned.steps[0].folder / "checkpoints" / "2").mkdir(parents=True)
  config = pivot.get_config()
  config.order = ("stage1_proj",)
  config.stage1_proj.batch = 16
  planned = plan.expand(config, tmp_path / "w")
  with caplog.at_level(logging.INFO, "pivot_jax"):
    with pytest.raises(KeyboardInterrupt):
      plan.run(planned, tmp_path / "w", config)
  assert (
    "stage1_proj goes on with other settings: batch: 32 -> 16" in caplog.text
  )
  config.stage1_proj.beta = 0.5
  planned = plan.expand(config, tmp_path / "w")
  with pytest.raises(InputError, match=r"stage1_proj \(.*beta: 0.1"):
    plan.run(planned, tmp_path / "w", config)


def test_seeds_and_kinds_are_checked(tmp_path):
  config = pivot.get_config()
  config.seeds = 0
  with pytest.raises(InputError, match="seeds=0: give 1 or more"):
    plan.expand(config, tmp_path)
  config = pivot.get_config()
  config.detach_dpo.kind = "detatch"
  with pytest.raises(InputError, match="kind='detatch': choose one of"):
    plan.expand(config, tmp_path)
