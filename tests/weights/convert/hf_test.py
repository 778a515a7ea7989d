"""Folders of Hugging Face weights, there and back, without torch."""

import dataclasses

import jax
import numpy as np
import pytest

from pivot_jax import errors
from pivot_jax.models import mllm
from pivot_jax.weights.convert import hf
from tests.fixtures import tiny_models
from tests.weights.convert import folders


def _unread(folder):
  return hf.open_folder(folder).read_unread()


KEY_BIAS = "vision_model.encoder.layers.{}.self_attn.k_proj.bias"


def test_vision_returns_with_the_same_bytes(vision_folder, params):
  configs, got, info = folders.load(vision_folder)
  assert configs == {"vision": tiny_models.VISION, "llm": None}
  folders.equal(got, {"vision": params["vision"]})
  assert info["format"] == "siglip_vision_model"
  assert len(info["not_carried"]) == 18


@pytest.mark.parametrize("config", [tiny_models.LLM, tiny_models.UNTIED])
def test_a_language_model_returns_with_the_same_bytes(tmp_path, config):
  model = mllm.MLLM(config, None)
  params = tiny_models.jitter(mllm.init_params(model, jax.random.key(0)))
  hf.save_llm(tmp_path, config, params["llm"], eos_token_id=7)
  configs, got, info = folders.load(tmp_path)
  assert configs == {"vision": None, "llm": config}
  folders.equal(got, params)
  assert info["not_carried"] == []


def test_a_multimodal_model_returns_with_the_same_bytes(tmp_path, params):
  hf.save_llava(
    tmp_path, tiny_models.VISION, tiny_models.UNTIED, params, image_token_id=60
  )
  configs, got, _ = folders.load(tmp_path)
  assert configs == {"vision": tiny_models.VISION, "llm": tiny_models.UNTIED}
  folders.equal(got, params)


# Softmax hides a lost key bias, so it is followed by name and bytes.
def test_each_key_bias_lies_under_its_own_name(vision_folder, params):
  arrays = folders.stored(vision_folder)
  bias = params["vision"]["encoder"]["layers"]["self_attn"]["k_proj"]["bias"]
  for layer in range(tiny_models.VISION.used_layers):
    np.testing.assert_array_equal(arrays[KEY_BIAS.format(layer)], bias[layer])
  assert not arrays[KEY_BIAS.format(2)].any()


def test_matrices_are_stored_as_torch_stores_them(vision_folder, params):
  arrays = folders.stored(vision_folder)
  kernel = params["vision"]["embeddings"]["patch_embedding"]["kernel"]
  stored = arrays["vision_model.embeddings.patch_embedding.weight"]
  assert stored.shape == (32, 3, 8, 8)
  assert stored[5, 2, 1, 7] == kernel[1, 7, 2, 5]
  fc1 = params["vision"]["encoder"]["layers"]["mlp"]["fc1"]["kernel"]
  stored = arrays["vision_model.encoder.layers.1.mlp.fc1.weight"]
  np.testing.assert_array_equal(stored, fc1[1].T)


def test_the_block_behind_the_features_is_the_identity(vision_folder, params):
  _, got, _ = folders.load(vision_folder)
  whole = dataclasses.replace(tiny_models.VISION, feature_layer=-1)
  rest = {
    name: array
    for name, array in _unread(vision_folder).items()
    if name.startswith("encoder.layers.2.")
  }
  layers = jax.tree_util.tree_map_with_path(
    lambda path, x: np.concatenate([x, _last(path, rest)[None]]),
    got["vision"]["encoder"]["layers"],
  )
  vision = got["vision"] | {"encoder": {"layers": layers}}
  images = tiny_models.prompts((9,), width=9, patches=9).images[0]

  def encode(config, vision):
    model = mllm.MLLM(None, config)
    return model.apply({"params": {"vision": vision}}, images, method="encode")

  folders.equal(
    encode(whole, vision), encode(tiny_models.VISION, got["vision"])
  )


def _last(path, rest):
  *module, leaf = (key.key for key in path)
  name = "weight" if leaf in ("kernel", "scale") else leaf
  array = rest[".".join(["encoder.layers.2", *module, name])]
  return array.T if leaf == "kernel" else array


def test_a_given_last_block_is_written_and_read_back(tmp_path, params):
  hf.save_vision(tmp_path / "a", tiny_models.VISION, params["vision"])
  source = _unread(tmp_path / "a")
  noisy = {k: x + 0.5 for k, x in source.items()}
  hf.save_vision(
    tmp_path / "b", tiny_models.VISION, params["vision"], unread=noisy
  )
  again = _unread(tmp_path / "b")
  folders.equal(again, noisy)


def test_an_incomplete_last_block_is_refused(tmp_path, params):
  with pytest.raises(errors.InputError, match="post_layernorm.bias absent"):
    hf.save_vision(tmp_path, tiny_models.VISION, params["vision"], unread={})


@pytest.mark.parametrize("old,new", [("vision_model.", ""), ("", "")])
def test_keys_load_with_and_without_the_prefix(vision_folder, params, old, new):
  arrays = {
    k.replace(old, new): v for k, v in folders.stored(vision_folder).items()
  }
  folders.store(vision_folder, arrays)
  folders.equal(folders.load(vision_folder)[1], {"vision": params["vision"]})


@pytest.mark.parametrize(
  "rename",
  [
    lambda k: k.replace("vision_tower.vision_model.", "vision_tower."),
    lambda k: (
      "model." + k.replace("language_model.model.", "language_model.")
      if "lm_head" not in k
      else "lm_head.weight"
    ),
  ],
  ids=["no vision_model", "model before all"],
)
def test_a_multimodal_folder_loads_under_other_prefixes(
  tmp_path, params, rename
):
  hf.save_llava(
    tmp_path, tiny_models.VISION, tiny_models.UNTIED, params, image_token_id=60
  )
  folders.store(
    tmp_path, {rename(k): v for k, v in folders.stored(tmp_path).items()}
  )
  folders.equal(folders.load(tmp_path)[1], params)


def test_every_misfit_is_listed_in_one_line(vision_folder):
  arrays = folders.stored(vision_folder)
  del arrays["vision_model.encoder.layers.0.mlp.fc1.bias"]
  del arrays["vision_model.encoder.layers.2.mlp.fc2.bias"]
  arrays["vision_model.encoder.layers.3.mlp.fc1.bias"] = np.zeros(4, "f4")
  arrays["optimizer"] = np.zeros((2, 3), "f4")
  bad = "vision_model.embeddings.position_embedding.weight"
  arrays[bad] = np.zeros((16, 32), "f4")
  folders.store(vision_folder, arrays)
  with pytest.raises(errors.InputError) as caught:
    folders.load(vision_folder)
  message = str(caught.value)
  assert "\n" not in message
  for part in (
    "missing: vision.encoder.layers.0.mlp.fc1.bias (48,)",
    "vision.encoder.layers.2.mlp.fc2.bias (32,)",
    "optimizer (2, 3)",
    "vision_model.encoder.layers.3.mlp.fc1.bias (4,)",
    f"misshapen: {bad} (16, 32) for (9, 32)",
  ):
    assert part in message


def test_a_tensor_under_two_names_is_refused(vision_folder):
  arrays = folders.stored(vision_folder)
  arrays["post_layernorm.bias"] = arrays["vision_model.post_layernorm.bias"]
  folders.store(vision_folder, arrays)
  with pytest.raises(errors.InputError, match="unexpected: .*post_layernorm"):
    folders.load(vision_folder)


def test_a_tied_head_must_equal_the_embeddings(tmp_path):
  params = mllm.init_params(mllm.MLLM(tiny_models.LLM, None), jax.random.key(0))
  hf.save_llm(tmp_path, tiny_models.LLM, params["llm"])
  arrays = folders.stored(tmp_path)
  arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
  folders.store(tmp_path, arrays)
  _, got, info = folders.load(tmp_path)
  assert "lm_head" not in got["llm"]
  assert [x["name"] for x in info["not_carried"]] == ["lm_head.weight"]
  arrays["lm_head.weight"][0, 0] += 1
  folders.store(tmp_path, arrays)
  with pytest.raises(errors.InputError, match="tie_word_embeddings"):
    folders.load(tmp_path)
