"""Settings that cannot work are answered before anything runs."""

import json
import sys

import pytest

from pivot_jax.configs import pivot
from pivot_jax.errors import InputError
from pivot_jax.recipe import plan, preflight
from pivot_jax.training import loop


def steps(tmp_path, name="", **changed):
  """Return the steps of a recipe with settings changed, `a__b` being a.b."""
  config = pivot.get_config(name)
  for key, value in changed.items():
    config.update_from_flattened_dict({key.replace("__", "."): value})
  return plan.expand(config, tmp_path).steps


@pytest.mark.parametrize("name", ["", "debug", "from_scratch", "sweep"])
def test_every_recipe_passes(tmp_path, name):
  preflight.check(steps(tmp_path, name))


@pytest.mark.parametrize("change, said", [
  (dict(stage2_dpo__batch=0), "stage2_dpo.batch=0: give 1 or more"),
  (dict(reference__chunk=0), "reference.chunk=0: give 1 or more"),
  (dict(evaluate_dpo__batch=0), "evaluate_dpo.batch=0: give 1 or more"),
  (dict(gradcam_sft__examples=0), "gradcam_sft.examples=0: give 1"),
  (dict(segment_probe_sft__epochs=0), "segment_probe_sft.epochs=0: give 1"),
  (dict(stage2_sft__clip=0.0), "stage2_sft.clip=0.0: give a number over 0"),
  (dict(stage2_dpo__beta=-1.0), "stage2_dpo.beta=-1.0: give a number over 0"),
  (dict(stage2_sft__warmup=2.0), "stage2_sft.warmup=2.0: give a share"),
  (dict(stage2_sft__lr=((".*", -1e-3),)), r"stage2_sft.lr: .* is not a rule"),
  (dict(stage2_sft__lr=(".*", 1e-3)), r"stage2_sft.lr: '.\*' is not a rule"),
  (dict(linear_probe_dpo__validation=1.0), "validation=1.0: give a share"),
  (dict(stage2_dpo__objective="mpo"), "'mpo': choose one of dpo, sft"),
  (dict(stage2_sft__template="chatml"), "'chatml': choose one of qwen_1_5"),
  (dict(stage2_sft__schedule="step"), "'step': choose one of cosine"),
  (dict(stage2_sft__moments="float16"), "'float16': choose one of float32"),
  (dict(compute__dtype="float16"), "compute.dtype='float16': choose one of"),
  (dict(resample="cubic"), "[a-z0-9_]+.resample='cubic' is none of bicubic"),
  (dict(resample="bicubic:248"), "'bicubic:248' is none .* as in crop_bicubic:"),
  (dict(segment_probe_dpo__background="void"), "'void': give the index of a"),
  (dict(segment_probe_dpo__background="11"), "there are 11 classes"),
  (dict(mesh__data=3), "needs 3 devices, there are"),
  (dict(mesh__fsdp=-1), "one may be -1"),
], ids=str)  # fmt: skip
def test_a_setting_that_cannot_work_is_named_with_what_to_give(
  tmp_path, change, said
):
  with pytest.raises(InputError, match=said):
    preflight.check(steps(tmp_path, **change))


def test_files_are_looked_for_before_the_stages_that_need_them(tmp_path):
  path = tmp_path / "rows.json"
  path.write_text("[]")
  given = dict(files__pretrain=str(path), files__images=str(tmp_path / "gone"))
  with pytest.raises(InputError, match="gone: no such folder of images"):
    preflight.check(steps(tmp_path, "files", **given))
  given["files__images"] = str(tmp_path)
  with pytest.raises(InputError, match="rows.json: the data is empty"):
    preflight.check(steps(tmp_path, "files", **given))
  given["files__eval"] = str(tmp_path / "none.json")
  path.write_text('[{"conversations": [{"from": "gpt", "value": "x"}]}]')
  with pytest.raises(InputError, match="none.json: no such file"):
    preflight.check(steps(tmp_path, "files", **given))


def test_every_row_and_the_place_of_its_image_is_looked_at(tmp_path):
  talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
  path, asked = tmp_path / "rows.json", tmp_path / "eval.json"
  path.write_text(json.dumps([dict(conversations=talk)] * 3))
  asked.write_text(
    json.dumps([dict(question="q", answer="a"), dict(question="q")])
  )
  given = dict(
    files__pretrain=str(path),
    files__eval=str(asked),
    files__images=str(tmp_path),
  )
  with pytest.raises(InputError, match="eval.json#1: answer: the field is mis"):
    preflight.check(steps(tmp_path, "files", **given))
  asked.write_text('[{"question": "q", "answer": "a", "image": "gone.png"}]')
  with pytest.raises(InputError, match="eval.json#0: .*gone.png: no such file"):
    preflight.check(steps(tmp_path, "files", **given))


def test_a_recipe_without_data_is_no_success(tmp_path):
  with pytest.raises(InputError, match="nothing to run: .*files.pretrain"):
    preflight.check(steps(tmp_path, "files"))


def test_the_objectives_must_see_the_same_rows(tmp_path):
  said = "stage2_sft and stage2_dpo differ in batch .32 and 64.: give both"
  with pytest.raises(InputError, match=said):
    preflight.check(steps(tmp_path, stage2_dpo__batch=32))


def test_a_batch_of_the_segmentation_probe_needs_as_many_images(tmp_path):
  said = "segment_probe_original.batch=32 is more than the 9 training images"
  with pytest.raises(InputError, match=said):
    preflight.check(steps(tmp_path, sources__segment_train__size=9))


def test_loops_without_a_checkpoint_end_at_sigterm(monkeypatch):
  loop.stop_if_requested("evaluate_dpo")
  monkeypatch.setattr(loop, "stop_requested", lambda: True)
  with pytest.raises(loop.Stopped, match="evaluate_dpo stopped"):
    loop.stop_if_requested("evaluate_dpo")


def test_tensorboard_needs_its_extra_before_anything_runs(
  tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(InputError, match=r"pivot_jax\[tensorboard\]"):
    preflight.check(steps(tmp_path, tensorboard=True))


def test_given_weights_are_looked_at_before_the_first_stage(tmp_path):
  with pytest.raises(InputError, match="resized as 'bicubic'.*resample="):
    preflight.check(steps(tmp_path, resample="crop_bicubic"))
  with pytest.raises(InputError, match="nowhere: no such folder"):
    preflight.check(steps(tmp_path, vision__init="hf:nowhere"))
