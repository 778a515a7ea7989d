"""The model card says what model.json says, and nothing of the machine."""

import pytest

from pivot_jax.weights import card

VISION = {
  **dict(family="siglip", feature_layer=-2, final_norm=False, image_size=24),
  **dict(num_hidden_layers=3, patch_size=8, hidden_size=16),
  **dict(layer_norm_eps=1e-6, image_mean=[0.5] * 3, image_std=[0.25] * 3),
}
UNREAD = {
  "address": "hf:/home/me/siglip?feature_layer=-2",
  "fingerprint": "0123abcd",
  "modules": ["head", "pooler"],
}


def text(use, vision=VISION, unread=UNREAD, **meta):
  meta = {"vision": vision, "unread": unread, "versions": {"jax": "1"}} | meta
  return card.text(meta, None, "/home/me/run/detach:vision", use)


def test_an_encoder_names_its_features_and_what_was_not_trained():
  said = " ".join(text("SiglipVisionModel").split())
  for part in (
    "library_name: transformers pipeline_tag: image-feature-extraction",
    "after block 2 of 3, without the final norm:",
    "`hidden_states[-2]`",
    "not computed with: head, pooler. They",
    "(`hf:siglip?feature_layer=-2`, CRC32 0123abcd)",
    "Weights from: not recorded.",
    "Exported from `detach:vision` by pivot_jax. jax 1.",
  ):
    assert part in said, part
  assert "/home" not in said


def test_a_choice_that_was_made_is_told():
  vision = VISION | {"feature_tokens": 4, "layer_norm_eps": 1e-5}
  resample = {"resample": "crop_bicubic:27"}
  said = " ".join(text("timm", vision, preprocessing=resample).split())
  assert "library_name: timm" in said
  assert "resized to 4 features" in said
  assert "`crop_bicubic:27`, then scaled to mean [0.5, 0.5, 0.5] and" in said
  assert "standard deviation [0.25, 0.25, 0.25]" in said
  assert "epsilon 1e-05; timm has 1e-06" in said
  assert "not computed with: head. They" in said  # timm has no pooler.
  assert "hidden_states" not in said


@pytest.mark.parametrize(
  "final_norm,part",
  [(True, "Nothing: every part"), (False, "those in the file do nothing")],
)
def test_an_encoder_without_a_rest_says_so(final_norm, part):
  vision = VISION | {"final_norm": final_norm, "feature_layer": -1}
  said = " ".join(text("SiglipVisionModel", vision, None).split())
  assert part in said


def test_a_language_model_has_no_word_of_images():
  said = text("Qwen2ForCausalLM", sources={"llm": "hf:/home/me/qwen"})
  assert "pipeline_tag: text-generation" in said
  assert "llm `hf:qwen`" in said
  assert "images" not in said and "not trained" not in said
