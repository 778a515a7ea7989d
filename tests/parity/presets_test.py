"""The full-size presets against transformers' models, by number of parameters.

The reference models are made on the meta device, so that nothing is allocated.
What a published model has beyond the tower is counted there, too: its total is
known, and has to come out to the last parameter.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
import transformers

from pivot_jax.configs import presets
from pivot_jax.models import mllm, qwen2, vit

_SIZES = (
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
)

# All parameters of the published model, as MTEB records them (docs/models.md),
# and the vocabulary and positions of its text tower.
SIGLIP_MODELS = {
  "siglip-b16-224": (203_155_970, 32_000, 64),
  "siglip-b16-256": (203_202_050, 32_000, 64),
  "siglip-b16-384": (203_447_810, 32_000, 64),
  "siglip-b16-512": (203_791_874, 32_000, 64),
  "siglip-l16-256": (652_150_786, 32_000, 64),
  "siglip-l16-384": (652_478_466, 32_000, 64),
  "siglip-so400m14-224": (877_360_306, 32_000, 16),
  "siglip-so400m14-384": (877_960_498, 32_000, 64),
  "siglip2-b16-224": (375_187_970, 256_000, 64),
  "siglip2-b16-256": (375_234_050, 256_000, 64),
  "siglip2-b16-384": (375_479_810, 256_000, 64),
  "siglip2-b16-512": (375_823_874, 256_000, 64),
  "siglip2-l16-256": (881_526_786, 256_000, 64),
  "siglip2-l16-384": (881_854_466, 256_000, 64),
  "siglip2-l16-512": (882_313_218, 256_000, 64),
  "siglip2-so400m14-224": (1_135_463_602, 256_000, 64),
  "siglip2-so400m14-384": (1_136_008_498, 256_000, 64),
  "siglip2-so400m16-256": (1_135_670_962, 256_000, 64),
  "siglip2-so400m16-384": (1_136_039_602, 256_000, 64),
  "siglip2-so400m16-512": (1_136_555_698, 256_000, 64),
  "siglip2-gopt16-256": (1_871_393_906, 256_000, 64),
  "siglip2-gopt16-384": (1_871_885_426, 256_000, 64),
}


def _ours(vision, llm):
  model = mllm.MLLM(llm, vision)
  shapes = jax.eval_shape(lambda: mllm.init_params(model, jax.random.key(0)))
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))


def _tower(name):
  """Counts all published blocks and the last norm."""
  config = vit.VisionConfig(**presets.VISION[name])
  return _ours(
    dataclasses.replace(
      config, feature_layer=config.num_hidden_layers, final_norm=True
    ),
    None,
  )


def _numel(model, without=()):
  return sum(
    x.numel() for name, x in model.named_parameters() if name not in without
  )


def _sizes(name, *more):
  preset = presets.VISION[name]
  return {key: preset[key] for key in (*_SIZES, *more)}


def _image(name):
  return _sizes(name, "image_size", "patch_size")


def _siglip(name):
  config = transformers.SiglipVisionConfig(
    **_image(name), vision_use_head=False
  )
  return _numel(transformers.SiglipVisionModel(config))


def _clip(name):
  config = transformers.CLIPVisionConfig(**_image(name))
  return _numel(transformers.CLIPVisionModel(config))


def _dinov2(name):
  sizes = _image(name)
  # Their width of the MLP follows from ratio and gate.
  del sizes["intermediate_size"]
  config = transformers.Dinov2Config(
    **sizes, mlp_ratio=4, use_swiglu_ffn=name.startswith("dinov2-g")
  )
  model = transformers.Dinov2Model(config)
  return _numel(model, without=("embeddings.mask_token",))


def _vit(name):
  config = transformers.ViTConfig(**_image(name))
  return _numel(transformers.ViTModel(config, add_pooling_layer=False))


def _vit_mae(name):
  config = transformers.ViTMAEConfig(**_image(name))
  return _numel(transformers.ViTMAEModel(config))


REFERENCES = {
  "siglip": _siglip,
  "clip": _clip,
  "dinov2": _dinov2,
  "vit": _vit,
  "vit_mae": _vit_mae,
}


@pytest.mark.parametrize("name", presets.VISION)
def test_encoders_are_as_large_as_transformers_models(name):
  with torch.device("meta"):
    expected = REFERENCES[presets.VISION[name]["family"]](name)
  assert _tower(name) == expected


@pytest.mark.parametrize("name", presets.LLM)
def test_language_models_are_as_large_as_transformers_models(name):
  preset = presets.LLM[name]
  assert preset["head_dim"] == (
    preset["hidden_size"] // preset["num_attention_heads"]
  )
  keys = (*_SIZES, "num_key_value_heads", "vocab_size", "tie_word_embeddings")
  with torch.device("meta"):
    model = transformers.Qwen2ForCausalLM(
      transformers.Qwen2Config(**{key: preset[key] for key in keys})
    )
  # A tied head is listed once.
  assert _ours(None, qwen2.LLMConfig(**preset)) == _numel(model)


@functools.cache
def _pooling_head(size):
  with torch.device("meta"):
    model = transformers.SiglipVisionModel(
      transformers.SiglipVisionConfig(**dict(size))
    )
  return _numel(model.head)


@functools.cache
def _text_tower(size, vocab_size, positions, projection_size):
  with torch.device("meta"):
    model = transformers.SiglipTextModel(
      transformers.SiglipTextConfig(
        **dict(size),
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        projection_size=projection_size,
      )
    )
  return _numel(model)


@pytest.mark.parametrize("name", SIGLIP_MODELS)
def test_siglip_is_the_tower_a_pooling_head_and_a_text_tower(name):
  total, vocab_size, positions = SIGLIP_MODELS[name]
  size = _sizes(name)
  # The giant came with the text tower of the So400m.
  giant = name.startswith("siglip2-gopt16")
  text = _sizes("siglip2-so400m16-384") if giant else size
  rest = _pooling_head(tuple(size.items())) + _text_tower(
    tuple(text.items()), vocab_size, positions, size["hidden_size"]
  )
  # Two scalars: temperature and bias of the loss.
  assert _tower(name) + rest + 2 == total


def test_every_siglip_preset_has_its_total():
  names = {x for x in presets.VISION if x.startswith("siglip")}
  assert names == SIGLIP_MODELS.keys()


# At 518 pixels, as MTEB records them; the paper's resolutions of the giant
# interpolate the positions of the same model.
@pytest.mark.parametrize(
  "name,total",
  [
    ("dinov2-b14-518", 86_580_480),
    ("dinov2-l14-518", 304_368_640),
    ("dinov2-g14-518", 1_136_480_768),
  ],
)
def test_dinov2_is_the_tower_and_a_mask_token(name, total):
  assert _tower(name) + presets.VISION[name]["hidden_size"] == total


@pytest.mark.parametrize(
  "name,total", [("clip-l14-224", 427_616_513), ("clip-l14-336", 427_944_193)]
)
def test_clip_is_the_tower_a_text_tower_and_two_projections(name, total):
  config = transformers.CLIPTextConfig(
    vocab_size=49_408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
  )
  with torch.device("meta"):
    text = _numel(transformers.CLIPTextModel(config))
  # One scalar: the temperature of the loss.
  assert _tower(name) + 1024 * 768 + text + 768 * 768 + 1 == total
