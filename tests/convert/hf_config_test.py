"""Configurations: what is read, and what is refused by name."""

import json

import jax
import pytest

from pivot_jax import checkpoint, errors
from pivot_jax.convert import hf
from pivot_jax.models import mllm
from tests.models import tiny


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
    hf.load(vision_folder)


@pytest.mark.parametrize(
  "fields,said",
  [
    ({"vision_feature_layer": -1}, "vision_feature_layer is -1"),
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
  hf.save_llava(tmp_path, tiny.VISION, tiny.UNTIED, params, image_token_id=60)
  _set(tmp_path, **fields)
  with pytest.raises(errors.InputError, match=said):
    hf.load(tmp_path)


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
  params = mllm.init_params(mllm.MLLM(tiny.LLM, None), jax.random.key(0))
  hf.save_llm(tmp_path, tiny.LLM, params["llm"])
  _set(tmp_path, **fields)
  with pytest.raises(errors.InputError, match=said):
    hf.load(tmp_path)


def test_a_folder_without_config_says_what_to_give(tmp_path):
  with pytest.raises(errors.InputError, match="config.json: not found; give"):
    hf.load(tmp_path)


def test_image_statistics_come_from_the_processor_file(vision_folder):
  path = vision_folder / "preprocessor_config.json"
  path.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
  config = hf.load(vision_folder)[0]["vision"]
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
