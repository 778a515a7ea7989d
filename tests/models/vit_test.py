"""The encoder's own choices; its numbers are proven in tests/parity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pivot_jax.models import layers, mllm, vit
from tests.fixtures import tiny_models


def _images(count=2, size=28, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, 256, (count, size, size, 3)), jnp.uint8)


def test_patch_embedding_is_a_valid_convolution():
  module = vit.PatchEmbedding(tiny_models.VISION, layers.Compute())
  pixels = vit.normalize(_images(), tiny_models.VISION)
  params = tiny_models.jitter(module.init(jax.random.key(0), pixels))
  got = module.apply(params, pixels)
  expected = jax.lax.conv_general_dilated(
    pixels,
    params["params"]["kernel"],
    (8, 8),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  expected = expected.reshape(2, 9, 32) + params["params"]["bias"][None, None]
  np.testing.assert_allclose(got, expected, rtol=0, atol=5e-6)


def test_pixels_are_scaled_from_minus_one_to_one():
  images = jnp.asarray([0, 255, 51], jnp.uint8).reshape(1, 1, 3, 1)
  images = jnp.broadcast_to(images, (1, 1, 3, 3))
  got = vit.normalize(images, tiny_models.VISION)[0, 0, :, 0]
  np.testing.assert_allclose(got, [-1, 1, -0.6], atol=1e-6)


def test_pixels_beyond_the_last_whole_patch_are_not_read():
  model = mllm.MLLM(None, tiny_models.VISION)
  params = {"params": mllm.init_params(model, jax.random.key(0))}
  images = _images()
  changed = images.at[:, 24:].set(0).at[:, :, 24:].set(0)
  encode = jax.jit(functools.partial(model.apply, method="encode"))
  np.testing.assert_array_equal(encode(params, images), encode(params, changed))


def test_images_of_another_size_are_refused():
  model = mllm.MLLM(None, tiny_models.VISION)
  params = {"params": mllm.init_params(model, jax.random.key(0))}
  with pytest.raises(ValueError, match=r"\(32, 32, 3\).*\(28, 28, 3\)"):
    model.apply(params, _images(size=32), method="encode")


@pytest.mark.parametrize(
  "layer,used", [(-2, 2), (-1, 3), (-3, 1), (1, 1), (3, 3)]
)
def test_feature_layer_counts_as_hidden_states(layer, used):
  config = dataclasses.replace(tiny_models.VISION, feature_layer=layer)
  assert config.used_layers == used


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_feature_layer_without_blocks_is_refused(layer):
  with pytest.raises(ValueError, match="feature_layer"):
    dataclasses.replace(tiny_models.VISION, feature_layer=layer)


def test_only_the_blocks_that_are_read_have_parameters():
  model = mllm.MLLM(None, tiny_models.VISION)
  vision = mllm.init_params(model, jax.random.key(0))["vision"]
  assert "post_layernorm" not in vision
  assert vision["encoder"]["layers"]["mlp"]["fc1"]["kernel"].shape == (
    2,
    32,
    48,
  )


def test_every_block_s_output_can_be_captured():
  model = mllm.MLLM(None, tiny_models.VISION)
  params = mllm.init_params(model, jax.random.key(0))
  features, kept = model.apply(
    {"params": params},
    _images(),
    method="encode",
    mutable=["intermediates"],
  )
  (outputs,) = kept["intermediates"]["vision"]["encoder"]["layers"]["output"]
  assert outputs.shape == (2, 2, 9, 32)
  np.testing.assert_array_equal(outputs[-1], features)


def test_a_config_from_json_lists_is_hashable_and_equal():
  fields = dataclasses.asdict(tiny_models.VISION) | {"image_mean": [0.5] * 3}
  assert hash(vit.VisionConfig(**fields)) == hash(tiny_models.VISION)


def test_an_unknown_activation_is_refused():
  with pytest.raises(ValueError, match="hidden_act is 'relu'"):
    dataclasses.replace(tiny_models.VISION, hidden_act="relu")
