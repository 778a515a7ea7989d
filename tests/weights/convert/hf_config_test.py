"""Configurations: what is read, and what is refused by name."""

import json
import logging

import jax
import pytest

from pivot_jax import errors
from pivot_jax.models import mllm
from pivot_jax.weights import checkpoint
from pivot_jax.weights.convert import hf, hf_config, processor
from tests.fixtures import tiny_models
from tests.weights.convert import folders


def _set(folder, **fields):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
  "fields,said",
  [
    ({"model_type": "siglip2"}, "model_type is 'siglip2'"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ({"num_channels": 1}, "num_channels is 1, not 3"),
    ({"num_attention_heads": 5}, "num_attention_heads 5"),
  ],
  ids=str,
)
def test_a_vision_config_we_do_not_compute_is_refused(
  vision_folder, fields, said
):
  _set(vision_folder, **fields)
  with pytest.raises(errors.InputError, match=said):
    folders.load(vision_folder)


def _json(model_type, **fields):
  return dict(model_type=model_type, num_channels=3) | fields


@pytest.mark.parametrize(
  "config,said",
  [
    (_json("vit", qkv_bias=False), "qkv_bias is False, not True"),
    (_json("dinov2", qkv_bias=False), "qkv_bias is False, not True"),
    (_json("dinov2", hidden_act="relu"), "hidden_act is 'relu'"),
    (_json("clip_vision_model", hidden_act="relu"), "hidden_act is 'relu'"),
    (_json("dinov2_with_registers"), "register tokens are not computed"),
    (_json("vit_mae", num_attention_heads=7), "num_attention_heads 7"),
    (_json("vit", num_attention_heads=0), "num_attention_heads is 0"),
    (_json("vit", image_size=[24, 24]), r"image_size is \[24, 24\]"),
    (_json("vit", patch_size=8.0), "patch_size is 8.0"),
    (_json("vit", layer_norm_eps=None), "layer_norm_eps is None"),
    (_json(["vit"]), "model_type is"),
  ],
  ids=str,
)
def test_an_encoder_of_any_family_that_we_do_not_compute_is_refused(
  tmp_path, config, said, unchecked
):
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(errors.InputError, match=said):
    hf_config.read(tmp_path)


@pytest.mark.parametrize(
  "config,wanted",
  [
    (_json("siglip_vision_model"), ("gelu_pytorch_tanh", 1e-6, 16, 3072)),
    (_json("clip_vision_model"), ("quick_gelu", 1e-5, 32, 3072)),
    (_json("dinov2"), ("gelu", 1e-6, 14, 3072)),
    (_json("dinov2", use_swiglu_ffn=True), ("gelu", 1e-6, 14, 2048)),
    (_json("vit"), ("gelu", 1e-12, 16, 3072)),
    (_json("vit_mae"), ("gelu", 1e-12, 16, 3072)),
  ],
  ids=str,
)
def test_what_a_config_leaves_out_is_the_default_of_transformers(
  tmp_path, config, wanted
):
  (tmp_path / "config.json").write_text(json.dumps(config))
  vision = hf_config.read(tmp_path).vision
  assert wanted == (
    vision.hidden_act,
    vision.layer_norm_eps,
    vision.patch_size,
    vision.intermediate_size,
  )


@pytest.mark.parametrize(
  "fields,said",
  [
    ({"vision_feature_layer": None}, "vision_feature_layer is None"),
    ({"vision_feature_layer": [-2, -1]}, "must be one number"),
    ({"vision_feature_select_strategy": "default"}, "not 'full'"),
    ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    ({"text_config": {"model_type": "llama"}}, "text_config 'llama'"),
  ],
  ids=str,
)
def test_a_multimodal_config_we_do_not_compute_is_refused(
  tmp_path, params, fields, said
):
  hf.save_llava(
    tmp_path, tiny_models.VISION, tiny_models.UNTIED, params, image_token_id=60
  )
  _set(tmp_path, **fields)
  with pytest.raises(errors.InputError, match=said):
    folders.load(tmp_path)


@pytest.mark.parametrize(
  "fields,said",
  [
    ({"use_sliding_window": True}, "use_sliding_window is True"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
  ],
  ids=str,
)
def test_a_text_config_we_do_not_compute_is_refused(tmp_path, fields, said):
  params = mllm.init_params(mllm.MLLM(tiny_models.LLM, None), jax.random.key(0))
  hf.save_llm(tmp_path, tiny_models.LLM, params["llm"])
  _set(tmp_path, **fields)
  with pytest.raises(errors.InputError, match=said):
    folders.load(tmp_path)


def test_a_folder_without_config_says_what_to_give(tmp_path):
  with pytest.raises(errors.InputError, match="config.json: not found; give"):
    folders.load(tmp_path)


def test_image_statistics_come_from_the_processor_file(vision_folder):
  path = vision_folder / "preprocessor_config.json"
  path.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
  config = folders.load(vision_folder)[0]["vision"]
  assert config.image_mean == (0.1, 0.2, 0.3)
  assert config.image_std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
  "said, known",
  [
    ({}, "bicubic"),
    ({"resample": 1}, "lanczos"),
    ({"resample": 2}, "bilinear"),
    ({"resample": 3, "do_center_crop": False}, "bicubic"),
    ({"resample": 3, "do_center_crop": True}, "crop_bicubic"),
  ],
  ids=str,
)
def test_the_resize_of_an_encoder_comes_from_the_processor_file(
  vision_folder, said, known
):
  path = vision_folder / "preprocessor_config.json"
  path.write_text(json.dumps(said))
  found = checkpoint.load(f"hf:{vision_folder}").meta.get("preprocessing", {})
  assert found.get("resample") == known


def test_a_resize_that_is_not_done_here_is_refused(vision_folder):
  path = vision_folder / "preprocessor_config.json"
  path.write_text(json.dumps({"resample": 0}))
  with pytest.raises(errors.InputError, match="resample is 0"):
    checkpoint.load(f"hf:{vision_folder}")


def test_a_vit_s_processor_without_a_class_resizes_as_vit_s_do(tmp_path):
  config = _json("vit", image_size=24, patch_size=8, hidden_size=12)
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 24}))
  assert processor.read(tmp_path, "vit").resample == "bilinear"
  assert processor.read(tmp_path, "siglip").resample == "bicubic"


def test_a_foreign_processor_does_not_stop_a_language_model(tmp_path):
  params = mllm.init_params(mllm.MLLM(tiny_models.LLM, None), jax.random.key(0))
  hf.save_llm(tmp_path, tiny_models.LLM, params["llm"])
  path = tmp_path / "preprocessor_config.json"
  path.write_text(json.dumps({"image_processor_type": "OtherProcessor"}))
  assert hf.open_folder(tmp_path).vision is None


def test_the_last_layer_of_a_llava_is_read_without_the_norm_and_said(
  tmp_path, params, caplog, monkeypatch
):
  monkeypatch.setattr(logging.getLogger("pivot_jax"), "propagate", True)
  hf.save_llava(
    tmp_path, tiny_models.VISION, tiny_models.UNTIED, params, image_token_id=60
  )
  _set(tmp_path, vision_feature_layer=-1)
  vision = hf_config.read(tmp_path).vision
  assert (vision.used_layers, vision.final_norm) == (3, False)
  assert "-1 is read as the last block without the norm" in caplog.text
