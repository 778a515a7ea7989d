"""Exports as transformers opens them, and exports there and back."""

import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import safetensors
import torch
import transformers
from absl import flags
from ml_collections import ConfigDict

import pivot_jax
from pivot_jax import addresses, files
from pivot_jax.data import chat
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError
from pivot_jax.recipe import run_folder
from pivot_jax.recipe.inputs import Inputs, Step
from pivot_jax.weights import export
from tests.parity import foreign
from tests.parity import transformers_4_57 as tiny
from tests.weights.convert import folders

LLAVA = transformers.LlavaForConditionalGeneration
TOLERANCE = 1e-5  # float32, absolute, outputs of order three
TOKENIZER = load_tokenizer(addresses.tokenizer_folder("package:toy"))


# A Llava of transformers, ours of it, and the folder that we export.
Case = namedtuple("Case", "original model params folder exported prompt pixels")


def _case(root, tower, tokenizer, **sizes):
  torch.manual_seed(0)
  original = tiny.multimodal(tower, **sizes)
  foreign.roughen(original, 3).save_pretrained(root / "source")
  tokenizer.save(root / "source")
  model, params = pivot_jax.load(f"hf:{root / 'source'}")
  pivot_jax.save(root / "artifact", model, params)
  out = export.export(str(root / "artifact"), root / "llava", format="llava")
  exported = foreign.loaded_without_loss(LLAVA, out)
  prompt = chat.encode_prompt(tokenizer, tiny.QUESTION).prompt
  prompt = tiny.expanded(prompt, model)
  pixels = model.preprocess([tiny.picture()])
  return Case(original, model, params, out, exported, prompt, pixels)


@pytest.fixture(
  scope="module",
  params=[("siglip", True), ("siglip", False), ("clip", True), ("clip", False)],
  ids="{0[0]} tied {0[1]}".format,
)
def case(request, tmp_path_factory):
  tower, tied = request.param
  return _case(tmp_path_factory.mktemp("case"), tower, TOKENIZER, tied=tied)


def _pixel_values(model, pixels):
  vision = model.vision
  return foreign.pixels(pixels, (vision.image_mean, vision.image_std))


def _inputs(case, model):
  """The prompt with `model`'s own token for a patch."""
  ids = np.where(case.prompt < 0, model.config.image_token_index, case.prompt)
  return dict(
    input_ids=torch.tensor(ids)[None].long(),
    attention_mask=torch.ones(1, len(ids), dtype=torch.long),
    pixel_values=_pixel_values(case.model, case.pixels),
  )


def _logits(case, model):
  with torch.no_grad():
    return model(**_inputs(case, model)).logits[0].numpy()


def test_logits_are_those_of_the_original_and_ours(case):
  expected = _logits(case, case.original)
  got = _logits(case, case.exported)
  ours = case.model.apply(
    {"params": case.params}, case.prompt[None], case.pixels
  )
  assert 0.5 < np.abs(expected).max() < 20
  # The toy's vocabulary is full, so that the export has one column more.
  assert got.shape[1] == expected.shape[1] + 1
  assert foreign.difference(got[:, :-1], expected) < TOLERANCE
  assert foreign.difference(got[:, :-1], ours[0]) < TOLERANCE
  # Never generated: greedy decoding takes the first of equal columns.
  np.testing.assert_array_equal(got[:, -1], got[:, TOKENIZER.end_of_text])


def test_greedy_answers_are_those_of_the_original_and_ours(case):
  ours = tiny.answer(case.model, case.params, case.prompt, case.pixels)
  assert len(set(ours.tolist())) > 3
  for model in (case.exported, case.original):
    found = model.generate(
      **_inputs(case, model),
      max_new_tokens=tiny.NEW_TOKENS,
      pad_token_id=0,
    )
    np.testing.assert_array_equal(found[0, len(case.prompt) :], ours)


def test_what_is_not_read_changes_nothing(case):
  before = _logits(case, case.exported)
  changed = foreign.loaded_without_loss(LLAVA, case.folder)
  head = 11 if case.model.vision.family == "siglip" else 0
  assert tiny.change_what_is_not_read(changed) == 16 + 2 + head
  np.testing.assert_array_equal(_logits(case, changed), before)


def test_the_processor_makes_our_prompt_and_our_pixels(case):
  processor = transformers.AutoProcessor.from_pretrained(case.folder)
  text = tiny.prompt_text(processor)
  assert text == (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n<image>\n{tiny.QUESTION}<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  got = processor(text=text, images=[tiny.picture()], return_tensors="pt")
  expected = _inputs(case, case.exported)
  assert got.keys() == expected.keys()
  assert torch.equal(got["input_ids"], expected["input_ids"])
  miss = foreign.difference(got["pixel_values"], expected["pixel_values"])
  assert miss < 1e-6


def test_the_files_say_what_tools_read(case):
  read = {p.stem: json.loads(p.read_text()) for p in case.folder.glob("*.json")}
  tokenizer = read["tokenizer_config"]
  assert "<|im_start|>" in tokenizer["chat_template"]
  # generate() of transformers 4 refuses another.
  assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
  config = read["config"]
  assert (config["image_token_index"], config["image_seq_length"]) == (512, 9)
  assert config["vision_feature_layer"] == -2
  clip = case.model.vision.family == "clip"
  for name in ("config", "processor_config"):
    strategy = read[name]["vision_feature_select_strategy"]
    assert strategy == ("default" if clip else "full")
  assert read["processor_config"]["num_additional_image_tokens"] == clip
  generation = read["generation_config"]
  assert generation["eos_token_id"] == list(TOKENIZER.eos_ids)
  assert generation["suppress_tokens"] == [512]
  assert generation["do_sample"] is False


@pytest.mark.nightly
def test_the_real_tokenizer_needs_no_new_row(tmp_path, test_data):
  real = load_tokenizer(test_data / "tokenizer_qwen2")
  sizes = dict(vocab_size=151936, hidden_size=16, num_attention_heads=2)
  case = _case(tmp_path, "siglip", real, tied=True, **sizes)
  assert case.exported.config.image_token_index == real.vocab_size
  expected = _logits(case, case.original)
  assert foreign.difference(_logits(case, case.exported), expected) < TOLERANCE
  test_the_processor_makes_our_prompt_and_our_pixels(case)


def _encoder(name, folder):
  torch.manual_seed(0)
  model = foreign.roughen(tiny.encoder(name), 1)
  model.save_pretrained(folder)
  return model


def _tensors(folder):
  """The tensors of a folder, without the prefix that transformers 4 needs."""
  found = folders.stored(folder)
  return {k.removeprefix("vision_model."): x for k, x in found.items()}


@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_an_encoder_leaves_as_it_came(tmp_path, name):
  original = _encoder(name, tmp_path / "source")
  model, params = pivot_jax.load(f"hf:{tmp_path / 'source'}")
  pivot_jax.save(tmp_path / "artifact", model, params)
  out = export.export(str(tmp_path / "artifact"), tmp_path / "hf", format="hf")
  folders.equal(_tensors(out), _tensors(tmp_path / "source"))
  if name in ("siglip", "clip"):
    assert all(k.startswith("vision_model.") for k in folders.stored(out))
  theirs = foreign.loaded_without_loss(type(original), out)
  assert name != "siglip" or theirs.config.vision_use_head is True
  pixels = model.preprocess([tiny.picture()])
  expected = model.apply({"params": params}, pixels)
  got = tiny.features(theirs, _pixel_values(model, pixels))
  assert 0.5 < np.abs(expected).max() < 20
  assert foreign.difference(got, expected) < TOLERANCE
  again, given = pivot_jax.load(f"hf:{out}")
  assert again.vision == model.vision
  folders.equal(given, params)


@pytest.mark.parametrize(
  "form, file", [("timm", "timm:{}"), ("big_vision", "bv:{}/siglip_28.npz")]
)
def test_a_siglip_returns_from_other_formats(tmp_path, form, file):
  _encoder("siglip", tmp_path / "source")
  out = export.export(f"hf:{tmp_path / 'source'}", tmp_path / "a", format=form)
  back = export.export(file.format(out), tmp_path / "b", format="hf")
  folders.equal(_tensors(back), _tensors(tmp_path / "source"))


@pytest.fixture
def artifact(tmp_path):
  _encoder("siglip", tmp_path / "source")
  model, params = pivot_jax.load(f"hf:{tmp_path / 'source'}")
  pivot_jax.save(tmp_path / "artifact", model, params)
  return tmp_path / "artifact"


def _command(artifact, out, *more):
  command = (sys.executable, "-m", "pivot_jax.export", "--format=hf")
  done = subprocess.run(
    [*command, f"--from={artifact}", f"--to={out}", *more],
    capture_output=True,
    text=True,
  )
  return done.returncode, done.stdout + done.stderr


def test_the_command_asks_for_a_source_that_moved(artifact, tmp_path):
  moved = (tmp_path / "source").rename(tmp_path / "moved")
  out = tmp_path / "out"
  code, said = _command(artifact, out)
  assert code == 2
  assert re.fullmatch(rf"error: .* --source=hf:{tmp_path}/source .*\n", said)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact", "moved"]
  wrote = f"wrote {out}\nwhat was not trained is read from hf:{moved}\n"
  assert _command(artifact, out, f"--source=hf:{moved}") == (0, wrote)
  folders.equal(_tensors(out), _tensors(moved))
  # A program that calls `load` may have a flag of this name.
  assert "source" not in flags.FLAGS


def test_a_changed_source_is_refused(artifact, tmp_path):
  arrays = folders.stored(tmp_path / "source")
  next(x for k, x in arrays.items() if k.endswith("head.probe"))[0, 0, 0] += 1
  folders.store(tmp_path / "source", arrays)
  with pytest.raises(InputError, match="another fingerprint"):
    export.export(str(artifact), tmp_path / "out", format="hf")


def test_what_is_refused_leaves_and_touches_nothing(tmp_path):
  _encoder("clip", tmp_path / "clip")
  for name, said in (("out", "format is SigLIP's"), ("clip", "there already")):
    with pytest.raises(InputError, match=said):
      address = f"hf:{tmp_path / 'clip'}"
      export.export(address, tmp_path / name, format="big_vision")
  assert {p.name for p in tmp_path.iterdir()} == {"clip"}


def test_bfloat16_is_written_and_loaded(artifact, tmp_path):
  out = tmp_path / "out"
  export.export(str(artifact), out, format="hf", dtype="bfloat16")
  with safetensors.safe_open(out / "model.safetensors", "np") as file:
    assert {file.get_slice(k).get_dtype() for k in file.keys()} == {"BF16"}
  model = foreign.loaded_without_loss(transformers.SiglipVisionModel, out)
  assert model.dtype == torch.bfloat16


STAGES = {
  "stage2_dpo": dict(
    kind="train",
    inputs={"init": "hf:where/it/began"},
    **dict(objective="dpo", batch=8, steps=70, data=[["pairs", 1.0]]),
    lr=[["vision/.*", 2e-6]],
  ),
  "detach_dpo": dict(kind="detach", inputs={"init": "@stage2_dpo"}),
  "probe_dpo": dict(kind="linear_probe", inputs={"vision": "@detach_dpo"}),
  "probe_sft": dict(kind="linear_probe", inputs={"vision": "@detach_sft"}),
}


def test_the_card_tells_recipe_data_and_measurements(artifact, tmp_path):
  run, inputs = tmp_path / "run", Inputs()
  config = ConfigDict(STAGES | {"sources": {"pairs": {"kind": "scenes"}}})
  for name, fields in STAGES.items():
    step = Step(name, fields["kind"], config[name], {}, run / name)
    run_folder.begin(step, inputs)
    if name == "detach_dpo":
      shutil.copytree(artifact, step.folder, dirs_exist_ok=True)
    metrics = {"accuracy": {"value": 0.625, "se": 0.01, "n": 40}}
    run_folder.finish(step, inputs, metrics, 1.0)
  files.write_json(run / "config.json", config.to_dict())
  (run / "plan.txt").write_text("")
  out = export.export(str(run / "detach_dpo"), tmp_path / "out", format="hf")
  card = (out / "README.md").read_text()
  for part in (
    "Loads as `SiglipVisionModel`",
    "after block 2 of 3, without the final norm",
    "`hidden_states[-2]`",
    "encoder.layers.2, head, post_layernorm",
    "`hf:source`",
    "| dpo | pairs (embedded scenes) | 8 | 70 | `vision/.*` 2e-06 |",
    "| start | `hf:where/it/began` |",
    "| probe_dpo | accuracy | 0.625 ± 0.01 | 40 |",
  ):
    assert part in card, part
  assert "probe_sft" not in card
