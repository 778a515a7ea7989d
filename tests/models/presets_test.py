"""The full-size models, from their shapes alone."""

import dataclasses

import jax
import numpy as np
import pytest

from pivot_jax.configs import presets
from pivot_jax.models import mllm, qwen2, vit

# Parameters of the published tower (all blocks and the last norm) and of what
# is carried here, blocks read, features of an image, and their width.
ENCODERS = {
  "siglip-b16-224": (85_797_120, 78_707_712, 11, 196, 768),
  "siglip-b16-256": (85_843_200, 78_753_792, 11, 256, 768),
  "siglip-b16-384": (86_088_960, 78_999_552, 11, 576, 768),
  "siglip-b16-512": (86_433_024, 79_343_616, 11, 1024, 768),
  "siglip-l16-256": (303_361_024, 290_762_752, 23, 256, 1024),
  "siglip-l16-384": (303_688_704, 291_090_432, 23, 576, 1024),
  "siglip-so400m14-224": (412_442_352, 397_200_544, 26, 256, 1152),
  "siglip-so400m14-384": (412_987_248, 397_745_440, 26, 729, 1152),
  "siglip2-b16-224": (85_797_120, 78_707_712, 11, 196, 768),
  "siglip2-b16-256": (85_843_200, 78_753_792, 11, 256, 768),
  "siglip2-b16-384": (86_088_960, 78_999_552, 11, 576, 768),
  "siglip2-b16-512": (86_433_024, 79_343_616, 11, 1024, 768),
  "siglip2-l16-256": (303_361_024, 290_762_752, 23, 256, 1024),
  "siglip2-l16-384": (303_688_704, 291_090_432, 23, 576, 1024),
  "siglip2-l16-512": (304_147_456, 291_549_184, 23, 1024, 1024),
  "siglip2-so400m14-224": (412_442_352, 397_200_544, 26, 256, 1152),
  "siglip2-so400m14-384": (412_987_248, 397_745_440, 26, 729, 1152),
  "siglip2-so400m16-256": (412_649_712, 397_407_904, 26, 256, 1152),
  "siglip2-so400m16-384": (413_018_352, 397_776_544, 26, 576, 1152),
  "siglip2-so400m16-512": (413_534_448, 398_292_640, 26, 1024, 1152),
  "siglip2-gopt16-256": (1_134_838_272, 1_106_503_680, 39, 256, 1536),
  "siglip2-gopt16-384": (1_135_329_792, 1_106_995_200, 39, 576, 1536),
  "clip-l14-224": (303_179_776, 290_581_504, 23, 256, 1024),
  "clip-l14-336": (303_507_456, 290_909_184, 23, 576, 1024),
  "dinov2-b14-518": (86_579_712, 86_579_712, 12, 1369, 768),
  "dinov2-l14-518": (304_367_616, 304_367_616, 24, 1369, 1024),
  "dinov2-g14-518": (1_136_479_232, 1_136_479_232, 40, 1369, 1536),
  "dinov2-g14-378": (1_135_496_192, 1_135_496_192, 40, 729, 1536),
  "dinov2-g14-336": (1_135_261_184, 1_135_261_184, 40, 576, 1536),
  "mae-b16-224": (85_798_656, 85_798_656, 12, 196, 768),
  "mae-l16-224": (303_301_632, 303_301_632, 24, 196, 1024),
  "mae-h14-224": (630_764_800, 630_764_800, 32, 256, 1280),
  "moco-v3-b16-224": (85_798_656, 85_798_656, 12, 196, 768),
  "vit-b16-in21k-224": (85_798_656, 85_798_656, 12, 196, 768),
  "vit-l16-in21k-224": (303_301_632, 303_301_632, 24, 196, 1024),
  "vit-h14-in21k-224": (630_764_800, 630_764_800, 32, 256, 1280),
}

LANGUAGE_MODELS = {
  "qwen2.5-0.5b": 494_032_768,
  "qwen2.5-1.5b": 1_543_714_304,
  "qwen2.5-3b": 3_085_938_688,
  "qwen2.5-7b": 7_615_616_512,
  "qwen2.5-14b": 14_770_033_664,
  "qwen2.5-32b": 32_763_876_352,
  "qwen2.5-72b": 72_706_203_648,
}


def _count(vision, llm):
  model = mllm.MLLM(llm, vision)
  shapes = jax.eval_shape(lambda: mllm.init_params(model, jax.random.key(0)))
  return {
    part: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
    for part, tree in shapes.items()
  }


def _vision(name):
  return vit.VisionConfig(**presets.VISION[name])


def _llm(name):
  return qwen2.LLMConfig(**presets.LLM[name])


def test_every_preset_is_counted():
  assert ENCODERS.keys() == presets.VISION.keys()
  assert LANGUAGE_MODELS.keys() == presets.LLM.keys()


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_have_the_published_size(name):
  tower, carried, blocks, tokens, width = ENCODERS[name]
  config = _vision(name)
  whole = dataclasses.replace(
    config, feature_layer=config.num_hidden_layers, final_norm=True
  )
  assert _count(whole, None) == {"vision": tower}
  assert _count(config, None) == {"vision": carried}
  assert config.used_layers == blocks
  model = mllm.MLLM(None, config)
  size = config.image_size
  features = jax.eval_shape(
    lambda params, images: model.apply(
      {"params": params}, images, method="encode"
    ),
    jax.eval_shape(lambda: mllm.init_params(model, jax.random.key(0))),
    jax.ShapeDtypeStruct((1, size, size, 3), np.uint8),
  )
  assert features.shape == (1, tokens, width)
  assert config.num_patches == tokens


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_have_the_published_size(name):
  assert _count(None, _llm(name)) == {"llm": LANGUAGE_MODELS[name]}


@pytest.mark.parametrize("name", ENCODERS)
def test_only_the_last_block_and_the_last_norm_are_ever_left_out(name):
  tower, carried, _, _, width = ENCODERS[name]
  config = _vision(name)
  mlp = config.intermediate_size
  attention = 4 * (width * width + width)
  block = attention + 2 * width * mlp + mlp + width + 4 * width
  reads_the_end = config.feature_layer == -1
  assert tower - carried == (0 if reads_the_end else block + 2 * width)


# Layer, norm, activation, epsilon, and mean and deviation of the first colour.
@pytest.mark.parametrize(
  "prefix,expected",
  [
    ("siglip", (-2, False, "gelu_pytorch_tanh", 1e-6, 0.5, 0.5)),
    ("clip", (-2, False, "quick_gelu", 1e-5, 0.48145466, 0.26862954)),
    ("dinov2", (-1, True, "gelu", 1e-6, 0.485, 0.229)),
    ("mae", (-1, True, "gelu", 1e-6, 0.485, 0.229)),
    ("moco-v3", (-1, True, "gelu", 1e-6, 0.485, 0.229)),
    ("vit", (-1, True, "gelu", 1e-6, 0.5, 0.5)),
  ],
)
def test_each_family_is_read_as_the_paper_reads_it(prefix, expected):
  names = [name for name in presets.VISION if name.startswith(prefix)]
  assert names
  for name in names:
    x = _vision(name)
    got = x.feature_layer, x.final_norm, x.hidden_act, x.layer_norm_eps
    assert (*got, x.image_mean[0], x.image_std[0]) == expected


# The number of heads changes no size.
@pytest.mark.parametrize(
  "infix,width",
  [
    ("-b1", 64),
    ("-l1", 64),
    ("so400m", 72),
    ("-h14", 80),
    ("gopt", 96),
    ("dinov2-g", 64),
  ],
)
def test_heads_are_as_wide_as_published(infix, width):
  names = [name for name in presets.VISION if infix in name]
  assert names
  for name in names:
    config = _vision(name)
    assert config.hidden_size == width * config.num_attention_heads


def test_the_paper_s_main_model_has_the_known_parts():
  parts = _count(_vision("siglip2-so400m16-384"), _llm("qwen2.5-1.5b"))
  assert parts == {
    "vision": 397_776_544,
    "projector": 4_131_840,
    "llm": 1_543_714_304,
  }
