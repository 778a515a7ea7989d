"""Whole trainings of a tiny model: what they leave, promise and refuse."""

import json
import logging
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from pivot_jax import metrics, trees
from pivot_jax.data import feed
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError
from pivot_jax.stages import train
from pivot_jax.training import loop, optimizer, recorder, starting_model
from pivot_jax.weights import artifacts, checkpoint
from pivot_jax.weights.convert import hf
from tests.fixtures import tiny_stages

# paper 3.2, beside the loss and what every update reports.
DPO_METRICS = {
  "losses/dpo",
  "rewards/chosen",
  "rewards/rejected",
  "rewards/accuracies",
  "rewards/margins",
  "logps/chosen",
  "logps/rejected",
  "ref_logps/chosen",
  "ref_logps/rejected",
}
EVERY = {"step", "losses/total", "grad_norm"}
# The encoder of these runs is frozen.
EVERY |= {f"grad_norm/{part}" for part in ("projector", "llm")}
# metrics.jsonl keeps six digits.
DIGITS = 2e-5


@pytest.fixture(scope="module")
def lines(finished):
  return {name: metrics.read(out) for name, (_, out) in finished.items()}


@pytest.fixture(scope="module")
def before(init):
  return checkpoint.load(init).params


@pytest.fixture(scope="module")
def after(finished):
  return {
    name: checkpoint.load(str(out)).params
    for name, (_, out) in finished.items()
  }


# --- what a training leaves --------------------------------------------------


def test_the_artifact_holds_the_model_its_tokenizer_and_its_choices(
  finished, init
):
  _, out = finished["dpo"]
  model = checkpoint.load_model(str(out))
  assert set(model.params) == {"vision", "projector", "llm"}
  assert (
    model.mllm.llm == tiny_stages.LLM
    and model.mllm.vision == tiny_stages.VISION
  )
  assert model.tokenizer.fingerprint == tiny_stages.TOKENIZER.fingerprint
  meta = json.loads((out / "model.json").read_text())
  wanted = {
    "parts": ["vision", "projector", "llm"],
    "preprocessing": {"resize": "squash", "resample": "bicubic"},
    "template": "qwen_1_5",
    "mask": "paper",
    "tokenizer": tiny_stages.TOKENIZER.fingerprint,
    "stage": "train",
    "sources": {"init": init, "random": []},
  }
  assert {key: meta[key] for key in wanted} == wanted


def test_every_update_has_a_line_with_the_metrics_of_its_objective(lines):
  for name, own in (
    ("sft", {"losses/sft", "logps/token"}),
    ("dpo", DPO_METRICS),
  ):
    assert [line["step"] for line in lines[name]] == [1, 2, 3, 4]
    assert all(set(line) == EVERY | own for line in lines[name]), name


def test_rewards_are_beta_times_the_distance_from_the_reference(lines):
  for line in lines["dpo"]:
    reward = {
      side: 0.1 * (line[f"logps/{side}"] - line[f"ref_logps/{side}"])
      for side in ("chosen", "rejected")
    }
    # Sums of about -100 in six digits: a reward is good to 0.1 * 1e-4.
    for side, value in reward.items():
      assert line[f"rewards/{side}"] == pytest.approx(value, abs=1e-4)
    margin = line["rewards/chosen"] - line["rewards/rejected"]
    assert line["rewards/margins"] == pytest.approx(margin, abs=DIGITS)
    assert line["losses/dpo"] == pytest.approx(line["losses/total"], abs=DIGITS)


def test_dpo_starts_at_ln_2_and_moves(lines):
  first, *_, last = lines["dpo"]
  assert first["losses/dpo"] == pytest.approx(math.log(2), abs=1e-5)
  assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
  assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
  # A hundred times the tolerance above.
  assert abs(last["rewards/margins"]) > 1e-3


def test_a_frozen_part_leaves_with_the_bits_it_came_with(
  finished, before, after
):
  for name, (found, _) in finished.items():
    prints = trees.fingerprint(after[name]["vision"])
    assert prints == trees.fingerprint(before["vision"])
    assert found["change/vision"] == 0
    for part in ("projector", "llm"):
      change = trees.relative_change(before[part], after[name][part])
      assert found[f"change/{part}"] == pytest.approx(change) and change > 1e-4


def test_a_report_counts_steps_examples_and_parameters(finished, lines):
  found, _ = finished["sft"]
  assert (found["steps"], found["examples"]) == (4, 32)
  assert found["parameters"]["llm"] == trees.count(tiny_stages.params()["llm"])
  # The mean of the last tenth of the updates: here of the last one.
  assert found["loss"] == lines["sft"][-1]["losses/total"]


def test_a_run_says_what_it_holds_and_how_fast_it_is(
  arm, tmp_path, caplog, monkeypatch
):
  # One window, however slow the machine is.
  monkeypatch.setattr(recorder, "SPEED_EVERY", math.inf)
  logger = logging.getLogger("pivot_jax")
  logger.propagate, propagated = True, logger.propagate
  with caplog.at_level(logging.INFO, "pivot_jax"):
    config, inputs = arm("dpo")
    config.profile = "1:3"
    train.run(config, inputs, tmp_path)
  logger.propagate = propagated
  (said,) = [m for m in caplog.messages if "memory:" in m]
  assert "train attends by xla; memory: parameters" in said
  assert re.search(r"activations [\d.]+ = [\d.]+ of [\d,.]+ MiB", said)
  lines = (tmp_path / "speed.jsonl").read_text().splitlines()
  last = json.loads(lines[-1])
  # The first update compiled and is no part of a rate.
  assert (last["step"], last["speed/updates"]) == (4, 3)
  assert last["speed/examples"] * last["speed/seconds"] == pytest.approx(
    24, rel=1e-4
  )
  assert last["speed/tokens"] > 10 * last["speed/examples"]
  assert 0 <= last["speed/input_wait"] <= 1 and last["speed/flops"] > 0
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_arms_of_equal_shapes_share_the_compiled_update(
  arm, finished, tmp_path
):
  """Another rate, seed or order gives another stage, not another program."""
  cache = pathlib.Path(jax.config.jax_compilation_cache_dir)

  def compiled():
    return set(cache.glob("jit_step_fn-*"))

  before = compiled()
  assert before
  rates = (("llm/.*", 3e-3), (".*", 1e-3))
  train.run(*arm("dpo", lr=rates, seed=5, data_seed=3), tmp_path)
  assert compiled() == before


# --- one checkpoint, one stream ----------------------------------------------


def test_both_arms_see_the_same_rows_from_the_same_weights(
  finished, init, before
):
  sft, dpo = (finished[name][0] for name in ("sft", "dpo"))
  assert sft["rows"] == dpo["rows"]
  assert sft["init"] == dpo["init"] == trees.digest(trees.fingerprint(before))


def test_another_data_seed_gives_other_rows_and_the_same_start(
  finished, arm, tmp_path
):
  found = train.run(*arm("sft", data_seed=1), tmp_path)
  assert found["rows"] != finished["sft"][0]["rows"]
  assert found["init"] == finished["sft"][0]["init"]


# --- a reference of something else -------------------------------------------


OTHER = dict(template="plain", mask="answer", resample="bilinear")


def other_tokenizer(folder):
  """Write the shipped tokenizer with two letters exchanged."""
  tiny_stages.TOKENIZER.save(folder)
  rules = json.loads((folder / "tokenizer.json").read_text("utf-8"))
  vocab = rules["model"]["vocab"]
  vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
  (folder / "tokenizer.json").write_text(json.dumps(rules), "utf-8")
  return str(folder)


@pytest.mark.parametrize(
  "what", ["weights", "template", "mask", "resample", "tokenizer"]
)
def test_a_reference_of_another_model_or_text_is_refused(
  arm, finished, reference, tmp_path, what
):
  config, inputs = arm("dpo")
  if what == "weights":
    inputs["init"] = str(finished["sft"][1])
  elif what in OTHER:
    config[what] = OTHER[what]
  else:
    config.tokenizer = other_tokenizer(tmp_path / "other")
  with pytest.raises(InputError, match=f"with another {what} ") as caught:
    train.run(config, inputs, tmp_path / "out")
  said = str(caught.value)
  made = json.loads((reference / "reference.json").read_text())[what]
  assert str(reference) in said and f"({made}, here " in said
  assert "run the score stage" in said


# --- a loss that is not finite -----------------------------------------------


def test_a_loss_that_is_not_finite_names_its_rows_and_keeps_the_checkpoint(
  arm, tmp_path, caplog
):
  config, inputs = arm("sft", lr=((".*", 1e38),))
  with pytest.raises(loop.NonFiniteError) as caught:
    train.run(config, inputs, tmp_path)
  # The first update moves nothing (its rate is 0), the second everything.
  said = str(caught.value)
  assert "train: the loss is not finite at step 3" in said
  stream = train.make_stream(
    config, train.make_coder(config, tiny_stages.TOKENIZER, tiny_stages.MODEL)
  )
  rows = [stream.example(i, pixels=False).id for i in range(16, 24)]
  assert f"rows {', '.join(rows)})" in said
  assert "the checkpoint of step 2 is untouched" in said
  assert [line["step"] for line in metrics.read(tmp_path)] == [1, 2]
  assert not (tmp_path / "model.json").exists()
  saved = [path.name for path in (tmp_path / "checkpoints").iterdir()]
  assert saved == ["2"]
  with caplog.at_level(logging.INFO, "pivot_jax"):
    with pytest.raises(loop.NonFiniteError, match="step 3 .*of step 2 is"):
      train.run(config, inputs, tmp_path)
  assert "resumes at step 2" in caplog.text
  assert "damaged" not in caplog.text


# --- a part that does not move -----------------------------------------------


def texts_only(arm, **fields):
  """Return (config, inputs) of a training of all parts without an image."""
  pack = dict(tokens=256, losses=240, images=1)
  config, inputs = arm("sft", trainable=(".*",), pack=pack, **fields)
  config.sources.rows = tiny_stages.source("text", 40)
  return config, inputs


def test_a_part_that_no_row_reaches_is_an_error_with_rule_and_rate(
  arm, tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(logging.getLogger("pivot_jax"), "propagate", True)
  rates = (("vision/.*", 3e-3), (".*", 1e-2))
  with pytest.raises(InputError) as caught:
    train.run(*texts_only(arm, lr=rates), tmp_path)
  said = str(caught.value)
  assert said.startswith("train: projector ") or "train: vision " in said
  assert "did not move in 4 updates: its gradient was 0" in said
  assert "images?" in said
  # The begun folder goes on with no other `trainable`.
  assert said.endswith(f"then delete {tmp_path}")
  (warned,) = [m for m in caplog.messages if "no row has reached" in m]
  assert "of projector and vision was 0 in every update up to 2:" in warned
  assert not (tmp_path / "model.json").exists()


def moved(config, before, trained, lines=(), folder=pathlib.Path("made")):
  change = trees.Change(before)
  for path, leaf in trees.flatten(trained).items():
    change.add(path, leaf)
  return optimizer.check_moved(
    ConfigDict(dict(name="s", schedule="cosine", warmup=0.03) | config),
    trained,
    change.moved,
    lines,
    folder,
  )


@pytest.mark.parametrize("part", ["vision", "llm"])
def test_a_step_that_rounding_swallows_is_an_error(part):
  before = {part: {"x": np.ones(3, np.float32)}, "rest": {"y": np.ones(2)}}
  after = {part: {"x": np.float32(before[part]["x"] + 1e-12)}}
  lines = [{"step": 1, f"grad_norm/{part}": 2.5}]
  config = dict(steps=9, lr=((f"{part}/x", 1e-12), (".*", 1.0)))
  with pytest.raises(
    InputError, match=f"s: {part} .*{part}/x': 1e-12.*float32"
  ):
    moved(config, before, after, lines)
  # One number that moved, however little, is enough.
  after[part]["x"][1] = np.nextafter(np.float32(1), np.float32(2))
  moved(config, before, after, lines)


def test_rates_of_0_are_asked_for_and_only_told(caplog, monkeypatch):
  monkeypatch.setattr(logging.getLogger("pivot_jax"), "propagate", True)
  tree = {"vision": {"x": np.ones(3, np.float32)}}
  moved(dict(steps=9, lr=(("vision/.*", 0.0), (".*", 1.0))), tree, tree)
  # The only update is the warmup's first.
  moved(dict(steps=1, lr=((".*", 1.0),)), tree, tree)
  assert [m for m in caplog.messages if "vision" in m] == caplog.messages
  assert len(caplog.messages) == 2
  with pytest.raises(InputError, match="s: vision"):
    moved(dict(steps=2, lr=((".*", 1.0),)), tree, tree)


# --- another batch size ------------------------------------------------------


@pytest.mark.nightly
def test_a_stopped_training_goes_on_at_its_example_with_another_batch(
  arm, tmp_path, monkeypatch, caplog
):
  seen = []
  read = feed.read

  def watched(stream, **place):
    for example in read(stream, **place):
      seen.append(example.id)
      yield example

  monkeypatch.setattr(feed, "read", watched)
  free = dict(pack=dict(tokens=0, losses=0))
  config, inputs = arm("sft", **free)
  stops = iter([False, True])
  with monkeypatch.context() as patch:
    patch.setattr(loop, "stop_requested", lambda: next(stops, True))
    with pytest.raises(loop.Stopped, match="saved at step 2 of 4"):
      train.run(config, inputs, tmp_path)
  taken = seen[:16]
  seen.clear()
  config, inputs = arm("sft", batch=12, **free)
  with caplog.at_level(logging.INFO, "pivot_jax"):
    found = train.run(config, inputs, tmp_path)
  assert "resumes at step 2, example 16" in caplog.text
  assert found["examples"] == 16 + 2 * 12
  stream = train.make_stream(
    config, train.make_coder(config, tiny_stages.TOKENIZER, tiny_stages.MODEL)
  )
  straight = [stream.example(i, pixels=False).id for i in range(40)]
  assert taken + seen[:24] == straight


# --- what a training starts from ---------------------------------------------


def test_parts_come_from_where_inputs_say_and_the_rest_is_drawn(
  init, finished, before
):
  dpo = str(finished["dpo"][1])
  inputs = {"vision": f"{init}:vision", "llm": f"{dpo}:llm"}
  config = tiny_stages.config("train", None, seed=5)
  start = starting_model.assemble(config, inputs, tiny_stages.TOKENIZER)
  other = starting_model.assemble(
    tiny_stages.config("train", None, seed=6), inputs, tiny_stages.TOKENIZER
  )
  trained = checkpoint.load(dpo).params
  assert trees.fingerprint(start.params["vision"]) == trees.fingerprint(
    before["vision"]
  )
  assert trees.fingerprint(start.params["llm"]) == trees.fingerprint(
    trained["llm"]
  )
  assert start.meta["sources"] == inputs | {"random": ["projector"]}
  drawn = [trees.fingerprint(x.params["projector"]) for x in (start, other)]
  assert drawn[0] != drawn[1]
  assert trees.fingerprint(before["projector"]) not in drawn


def without(values, path):
  flat = trees.flatten(values)
  del flat[path]
  return trees.unflatten(flat)


def test_weights_that_miss_a_tensor_are_refused_by_its_name(before, tmp_path):
  path = "llm/layers/mlp/gate_proj/kernel"
  address = tiny_stages.save(tmp_path, without(before, path))
  config = tiny_stages.config("train", None)
  with pytest.raises(InputError, match=f"do not fit .*: missing {path} "):
    starting_model.assemble(config, {"init": address}, tiny_stages.TOKENIZER)


def test_weights_without_a_part_are_refused_by_its_name(before, tmp_path):
  parts = {part: before[part] for part in ("vision", "projector")}
  address = tiny_stages.save(tmp_path, parts)
  with pytest.raises(InputError, match=f"{address}: holds no 'llm'"):
    starting_model.assemble(
      tiny_stages.config("train", None),
      {"init": address},
      tiny_stages.TOKENIZER,
    )


def test_more_tokens_than_the_language_model_has_are_refused(init, tmp_path):
  tiny_stages.TOKENIZER.save(tmp_path)
  rules = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
  added = dict(rules["added_tokens"][-1], id=512, content="<|more|>")
  rules["added_tokens"].append(added)
  (tmp_path / "tokenizer.json").write_text(json.dumps(rules), "utf-8")
  more = load_tokenizer(tmp_path)
  with pytest.raises(
    InputError, match=rf"{init}: .*has ids below 513, .* only 512: give the tok"
  ):
    starting_model.assemble(
      tiny_stages.config("train", None), {"init": init}, more
    )


def test_an_unknown_objective_is_answered_with_those_of_the_table(
  arm, tmp_path
):
  config, inputs = arm("ppo")
  with pytest.raises(
    InputError, match="objective='ppo': choose one of dpo, sft"
  ):
    train.run(config, inputs, tmp_path)


def test_dpo_without_a_reference_is_refused(arm, tmp_path):
  config, inputs = arm("dpo")
  del inputs["reference"]
  with pytest.raises(InputError, match="dpo needs reference log-prob"):
    train.run(config, inputs, tmp_path)


def test_an_encoder_that_saw_images_resized_otherwise_is_refused(arm, tmp_path):
  config, inputs = arm("sft")
  loaded = checkpoint.load(inputs["init"])
  meta = loaded.meta | {"preprocessing": {"resample": "bilinear"}}
  artifacts.save(tmp_path / "other", loaded.params, meta=meta)
  inputs["init"] = str(tmp_path / "other")
  with pytest.raises(InputError, match="set --config.resample=bilinear"):
    train.run(config, inputs, tmp_path / "out")


def test_an_llm_from_a_folder_without_tokenizer_does_not_get_the_toys(
  arm, tmp_path
):
  config, inputs = arm("sft")
  hf.save_llm(tmp_path / "llm", tiny_stages.LLM, tiny_stages.params()["llm"])
  inputs["llm"] = f"hf:{tmp_path / 'llm'}"
  with pytest.raises(InputError, match="has no tokenizer .*--config.tokenizer"):
    train.run(config, inputs, tmp_path / "out")


def test_an_llm_of_another_tokenizer_is_refused(arm, tmp_path):
  config, inputs = arm("sft")
  config.tokenizer = other_tokenizer(tmp_path / "other")
  loaded = checkpoint.load(inputs["init"])
  meta = loaded.meta | {"tokenizer": tiny_stages.TOKENIZER.fingerprint}
  artifacts.save(tmp_path / "known", loaded.params, meta=meta)
  inputs["init"] = str(tmp_path / "known")
  with pytest.raises(InputError, match="known: its tokenizer is not .*other"):
    train.run(config, inputs, tmp_path / "out")
