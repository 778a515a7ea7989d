"""timm's files, there and back, without timm and without torch.

What timm itself makes of them: `tests/parity/timm_check.py`, whose names and
shapes are in `tests/golden/timm_keys.txt`.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest

from pivot_jax import errors
from pivot_jax.configs import presets
from pivot_jax.models import mllm, vit
from pivot_jax.weights import checkpoint
from pivot_jax.weights.convert import timm, towers
from tests.fixtures import tiny_models
from tests.weights.convert import folders

_TESTS = pathlib.Path(__file__).parents[2]
_LAST = dict(class_token=True, feature_layer=-1, final_norm=True)
_IMAGENET = dict(
  image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225)
)
_DINOV2 = dict(
  family="dinov2", hidden_act="gelu", layer_scale=True, **_LAST, **_IMAGENET
)
_CLIP = dict(
  family="clip",
  class_token=True,
  layer_norm_eps=1e-5,
  patch_bias=False,
  pre_norm=True,
)
# The models of timm_check.py: what differs from the tiny SigLIP.
CASES = {
  "siglip_map": {},
  "siglip_gap": {},
  "clip_quickgelu": dict(_CLIP, hidden_act="quick_gelu"),
  "clip": dict(_CLIP, hidden_act="gelu"),
  "dinov2": _DINOV2,
  "dinov2_giant": dict(_DINOV2, gated_mlp=True),
  "vit": dict(family="vit", hidden_act="gelu", **_LAST),
  "mae": dict(family="vit_mae", hidden_act="gelu", **_LAST, **_IMAGENET),
}


@functools.cache
def _case(name):
  """(config, params, the tensors that are not computed with)."""
  config = dataclasses.replace(tiny_models.VISION, **CASES[name])
  fresh = mllm.init_params(mllm.MLLM(None, config), jax.random.key(0))
  params = jax.tree.map(np.asarray, tiny_models.jitter(fresh))["vision"]
  shapes = dict(towers.unread(config))
  if name == "siglip_map":
    shapes |= towers.extras(config)
  rng = np.random.default_rng(1)
  behind = {n: rng.random(s, np.float32) for n, s in shapes.items()}
  return config, params, behind


def _save(folder, name, **choices):
  config, params, behind = _case(name)
  timm.save(folder, config, params, unread=behind, **choices)
  return config, params, behind


def _change(folder, **fields):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _golden(name):
  found = {}
  lines = (_TESTS / "golden" / "timm_keys.txt").read_text().splitlines()
  for case, key, shape in map(str.split, lines):
    if case == name:
      found[key] = tuple(map(int, shape.split("x")))
  return found


@pytest.mark.parametrize("name", CASES)
def test_the_tensors_are_those_of_timms_model(tmp_path, name):
  _save(tmp_path, name)
  found = {k: x.shape for k, x in folders.stored(tmp_path).items()}
  assert found == _golden(name)


@pytest.mark.parametrize("name", CASES)
def test_an_encoder_returns_with_the_same_bytes(tmp_path, name):
  config, params, behind = _save(tmp_path, name)
  opened = timm.open_file(tmp_path)
  assert opened.vision == config
  folders.equal(opened.params(), {"vision": params})
  folders.equal(opened.read_unread(), behind)
  again = checkpoint.load(f"timm:{tmp_path / 'model.safetensors'}")
  folders.equal(again.params, {"vision": params})


@pytest.mark.parametrize(
  "resample", ["bicubic", "bilinear", "crop_bicubic", "crop_bicubic:31"]
)
def test_the_framing_returns(tmp_path, resample):
  _save(tmp_path, "vit", resample=resample)
  assert timm.open_file(tmp_path).processor.resample == resample


def test_half_precision_is_rounded_and_read(tmp_path):
  _, params, _ = _save(tmp_path, "clip", dtype="bfloat16")
  rounded = jax.tree.map(
    lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params
  )
  folders.equal(timm.open_file(tmp_path).params(), {"vision": rounded})


def test_fused_rows_are_query_key_value_and_gate_up(tmp_path):
  _, params, _ = _save(tmp_path, "dinov2_giant")
  arrays = folders.stored(tmp_path)
  layers = params["encoder"]["layers"]
  for name, part, at in (
    ("attn.qkv", layers["self_attn"]["k_proj"], slice(32, 64)),
    ("mlp.fc1", layers["mlp"]["up_proj"], slice(48, 96)),
  ):
    np.testing.assert_array_equal(
      arrays[f"blocks.1.{name}.weight"][at], part["kernel"][1].T
    )
    np.testing.assert_array_equal(
      arrays[f"blocks.1.{name}.bias"][at], part["bias"][1]
    )


def _published():
  """(preset, timm's model) as the check by hand printed them."""
  lines = (_TESTS / "parity" / "timm_check.txt").read_text().splitlines()
  rows = [line.split() for line in lines]
  return [row[:2] for row in rows if row and row[0] in presets.VISION]


def test_published_encoders_go_by_their_names():
  wanted = dict(_published())
  assert wanted.keys() == presets.VISION.keys()
  for name, architecture in wanted.items():
    config = vit.VisionConfig(**presets.VISION[name])
    pooled = config.family == "siglip"
    assert timm.architecture(config, pooled=pooled) == architecture


def test_an_unknown_width_without_config_asks_for_the_heads(tmp_path):
  _save(tmp_path, "siglip_map")
  (tmp_path / "config.json").unlink()
  with pytest.raises(errors.InputError, match="width 32.*num_heads"):
    timm.open_file(tmp_path)


def test_a_clip_whose_gelu_nothing_tells_is_refused(tmp_path):
  _save(tmp_path, "clip_quickgelu")
  _change(tmp_path, architecture="", model_args={"num_heads": 4})
  with pytest.raises(errors.InputError, match="which GELU this CLIP"):
    timm.open_file(tmp_path)
  _change(tmp_path, architecture="vit_large_patch14_clip_quickgelu_336")
  assert timm.open_file(tmp_path).vision.hidden_act == "quick_gelu"
  _change(tmp_path, architecture="vit_large_patch14_clip_336")
  assert timm.open_file(tmp_path).vision.hidden_act == "gelu"


def test_an_encoder_without_class_token_is_no_siglip_unless_named_so(tmp_path):
  _save(tmp_path, "siglip_gap")
  _change(tmp_path, architecture="vit_huge_patch14_gap_224")
  with pytest.raises(errors.InputError, match="may be SigLIP or another"):
    timm.open_file(tmp_path)


def test_an_activation_that_is_not_computed_is_refused(tmp_path):
  _save(tmp_path, "vit")
  _change(tmp_path, model_args={"num_heads": 4, "act_layer": "relu"})
  with pytest.raises(errors.InputError, match="act_layer is 'relu'"):
    timm.open_file(tmp_path)


def test_a_head_is_named_as_not_carried(tmp_path):
  _save(tmp_path, "vit")
  heads = {
    "head.weight": np.zeros((7, 32), "f4"),
    "head.bias": np.zeros(7, "f4"),
  }
  folders.store(tmp_path, folders.stored(tmp_path) | heads)
  assert timm.open_file(tmp_path).not_carried == (
    {"name": "head.bias", "reason": "classification head"},
    {"name": "head.weight", "reason": "classification head"},
  )


def test_the_image_tower_of_an_open_clip_file_is_read(tmp_path):
  config, params, _ = _save(tmp_path, "siglip_map")
  arrays = {f"visual.trunk.{k}": x for k, x in folders.stored(tmp_path).items()}
  arrays["text.text_projection.bias"] = np.zeros(4, "f4")
  arrays["logit_scale"] = np.zeros((), "f4")
  folders.store(tmp_path, arrays)
  opened = timm.open_file(tmp_path)
  assert opened.vision == config
  folders.equal(opened.params(), {"vision": params})
  reasons = {x["name"]: x["reason"] for x in opened.not_carried}
  text = "text half of the contrastive model"
  assert reasons["logit_scale"] == reasons["text.text_projection.bias"] == text


def test_moco_v3_has_the_colours_of_imagenet(tmp_path):
  _, params, _ = _save(tmp_path, "vit")
  config = tmp_path / "config.json"
  config.write_text(json.dumps({"model_args": {"num_heads": 4}}))
  path = tmp_path / "moco_v3.safetensors"
  (tmp_path / "model.safetensors").rename(path)
  opened = timm.open_file(path)
  assert opened.vision.image_mean == _IMAGENET["image_mean"]
  folders.equal(opened.params(), {"vision": params})


@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.pt"])
def test_pickles_are_refused(tmp_path, name):
  (tmp_path / name).write_bytes(b"\x80\x04.")
  for path in (tmp_path, tmp_path / name):
    with pytest.raises(errors.InputError, match="a pickle can run code"):
      timm.open_file(path)


def test_every_misfit_is_listed(tmp_path):
  _save(tmp_path, "vit")
  arrays = folders.stored(tmp_path)
  del arrays["blocks.1.attn.proj.bias"]
  arrays["reg_token"] = np.zeros((1, 4, 32), "f4")
  folders.store(tmp_path, arrays)
  with pytest.raises(errors.InputError) as caught:
    timm.open_file(tmp_path)
  for part in ("missing: ", "blocks.1.attn.proj.bias", "reg_token (1, 4, 32)"):
    assert part in str(caught.value)


@pytest.mark.parametrize(
  "tag,wanted",
  [
    ("openai", "quick_gelu"),
    ("dfn2b", "quick_gelu"),
    ("metaclip_400m", "quick_gelu"),
    ("laion2b", "gelu"),
    # Fine-tuned with the exact one.
    ("openai_ft_in1k", "gelu"),
  ],
)
def test_weights_trained_with_quick_gelu_have_it_whatever_their_name(
  tmp_path, tag, wanted
):
  _save(tmp_path, "clip")
  arguments = json.loads((tmp_path / "config.json").read_text())["model_args"]
  arguments.pop("act_layer", None)
  _change(
    tmp_path,
    architecture="vit_large_patch14_clip_224",
    pretrained_cfg={"tag": tag, "input_size": [3, 28, 28], "crop_pct": 1.0},
    model_args=arguments,
  )
  assert timm.open_file(tmp_path).vision.hidden_act == wanted


@pytest.mark.parametrize("name,heads", [("moco_s", 12), ("vit_small", 6)])
def test_moco_s_small_vit_has_heads_of_its_own(tmp_path, name, heads):
  config = dataclasses.replace(
    _case("vit")[0], hidden_size=384, num_attention_heads=heads
  )
  params = mllm.init_params(mllm.MLLM(None, config), jax.random.key(0))
  timm.save(tmp_path / "x", config, jax.device_get(params)["vision"])
  path = tmp_path / f"{name}.safetensors"
  (tmp_path / "x" / "model.safetensors").rename(path)
  assert timm.open_file(path).vision.num_attention_heads == heads


def test_mae_is_a_word_of_a_name(tmp_path):
  _save(tmp_path, "vit")
  _change(tmp_path, architecture="vit_base_patch8_224.smaerter")
  assert timm.open_file(tmp_path).vision.family == "vit"
