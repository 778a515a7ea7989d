"""The encoder against transformers' SiglipVisionModel."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers

from pivot_jax.data import images as images_
from pivot_jax.models import mllm
from pivot_jax.weights.convert import hf
from tests.parity import foreign
from tests.weights.convert import folders


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  torch.manual_seed(0)
  config = transformers.SiglipVisionConfig(**foreign.VISION)
  model = foreign.roughen(transformers.SiglipVisionModel(config), 1)
  folder = tmp_path_factory.mktemp("siglip")
  model.save_pretrained(folder)
  images = foreign.images(3)
  with torch.no_grad():
    states = model(
      foreign.pixels(images), output_hidden_states=True
    ).hidden_states
  return folder, images, states[-2].numpy()


def _encode(config, params, images):
  model = mllm.MLLM(None, config)
  run = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))
  return np.asarray(run(params, images))


def test_features_are_the_penultimate_hidden_state_of_the_intact_model(case):
  folder, images, expected = case
  configs, params, info = folders.load(folder)
  got = _encode(configs["vision"], params, images)
  assert 0.5 < np.abs(expected).max() < 20
  assert foreign.difference(got, expected) < foreign.TOLERANCE
  reasons = {x["name"]: x["reason"] for x in info["not_carried"]}
  assert "encoder.layers.2.mlp.fc2.bias" in reasons
  assert "post_layernorm.weight" in reasons
  assert any(name.startswith("head.") for name in reasons)


@pytest.mark.parametrize(
  "change",
  [
    {"layer_norm_eps": 1e-5},
    {"hidden_act": "gelu"},
    {"hidden_act": "quick_gelu"},
    {"final_norm": True},
    {"feature_layer": -1},
    {"feature_layer": -3},
    {"image_mean": (0.48, 0.5, 0.5)},
  ],
  ids=str,
)
def test_a_wrong_choice_misses_by_ten_tolerances(case, change):
  folder, images, expected = case
  right, _, _ = folders.load(folder)
  config = dataclasses.replace(right["vision"], **change)
  params = foreign.whole_vision(folder, config)
  got = _encode(config, params, images)
  assert foreign.difference(got, expected) > foreign.MISS


# A key bias adds the same to every score of a query, and softmax does not see
# it; that one is proven by name and bytes in tests/weights/convert/hf_test.py.
@pytest.mark.parametrize(
  "module",
  [
    ("self_attn", "q_proj"),
    ("self_attn", "v_proj"),
    ("self_attn", "out_proj"),
    ("mlp", "fc1"),
    ("mlp", "fc2"),
  ],
  ids="/".join,
)
def test_a_dropped_bias_misses_by_ten_tolerances(case, module):
  folder, images, expected = case
  configs, params, _ = folders.load(folder)
  outer, inner = module
  params["vision"]["encoder"]["layers"][outer][inner]["bias"][:] = 0
  got = _encode(configs["vision"], params, images)
  assert foreign.difference(got, expected) > foreign.MISS


def test_the_vision_half_of_a_siglip_model_loads_alike(case, tmp_path):
  folder, _, _ = case
  source = transformers.SiglipVisionModel.from_pretrained(folder)
  config = transformers.SiglipConfig(
    text_config=dict(
      vocab_size=20,
      hidden_size=32,
      intermediate_size=40,
      num_hidden_layers=1,
      num_attention_heads=2,
    ),
    vision_config=foreign.VISION,
  )
  whole = transformers.SiglipModel(config)
  whole.vision_model.load_state_dict(source.state_dict())
  whole.save_pretrained(tmp_path)
  _, expected, _ = folders.load(folder)
  _, got, info = folders.load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  dropped = {x["name"] for x in info["not_carried"]}
  assert {"logit_scale", "logit_bias"} <= dropped


@pytest.mark.parametrize("keep_last", [False, True])
def test_transformers_loads_our_export_without_loss(case, tmp_path, keep_last):
  folder, images, expected = case
  configs, params, _ = folders.load(folder)
  last = None
  if keep_last:
    last = {
      name: array
      for name, array in hf.open_folder(folder).read_unread().items()
      if not name.startswith("head.")
    }
  hf.save_vision(tmp_path, configs["vision"], params["vision"], unread=last)
  model = foreign.loaded_without_loss(transformers.SiglipVisionModel, tmp_path)
  with torch.no_grad():
    states = model(foreign.pixels(images), output_hidden_states=True)
  states = states.hidden_states
  np.testing.assert_allclose(
    states[-2].numpy(), expected, rtol=0, atol=foreign.TOLERANCE
  )
  unchanged = torch.equal(states[-2], states[-1])
  assert unchanged != keep_last  # the inert block is the identity


def test_the_exported_image_processor_normalises_as_we_do(case, tmp_path):
  folder, images, _ = case
  configs, params, _ = folders.load(folder)
  hf.save_vision(tmp_path, configs["vision"], params["vision"])
  processor = transformers.AutoImageProcessor.from_pretrained(
    tmp_path, backend="pil"
  )
  got = processor(images=list(images), return_tensors="np")["pixel_values"]
  np.testing.assert_allclose(
    got, foreign.pixels(images).numpy(), rtol=0, atol=1e-6
  )


@pytest.mark.parametrize("resample", ("bicubic", "bilinear", "crop_bicubic"))
def test_the_exported_image_processor_frames_as_we_do(case, tmp_path, resample):
  folder, _, _ = case
  configs, params, _ = folders.load(folder)
  vision = configs["vision"]
  hf.save_vision(tmp_path, vision, params["vision"], resample=resample)
  processor = transformers.AutoImageProcessor.from_pretrained(
    tmp_path, backend="pil"
  )
  wide = np.random.default_rng(0).integers(0, 256, (41, 67, 3), np.uint8)
  ours = images_.resize(wide, vision.image_size, resample=resample)
  got = processor(images=[wide], return_tensors="np")["pixel_values"]
  np.testing.assert_allclose(
    got, foreign.pixels(ours[None]).numpy(), rtol=0, atol=1e-6
  )
