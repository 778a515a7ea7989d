"""Our frozen configurations to the config.json of Hugging Face's classes.

What `hf_config.py` reads back. Two versions of transformers are served: names
and settings that mean the same in 4.57 and in 5.
"""

from typing import Any

from pivot_jax import errors
from pivot_jax.models import qwen2, vit
from pivot_jax.weights.convert import hf_config

# The class that loads a folder, and its model_type, by family.
_CLASSES = {
  "siglip": ("SiglipVisionModel", "siglip_vision_model"),
  "clip": ("CLIPVisionModel", "clip_vision_model"),
  "dinov2": ("Dinov2Model", "dinov2"),
  "vit": ("ViTModel", "vit"),
  "vit_mae": ("ViTMAEModel", "vit_mae"),
}
_SIZES = (
  *("image_size", "patch_size", "hidden_size", "intermediate_size"),
  *("num_hidden_layers", "num_attention_heads"),
)


def class_of(config: vit.VisionConfig) -> str:
  """Return the name of transformers' class of an encoder."""
  return _CLASSES[config.family][0]


def vision(
  config: vit.VisionConfig, *, head: bool, dtype: str = "float32"
) -> dict[str, Any]:
  """Return config.json of a vision tower; `head`: with SigLIP's pooling."""
  architecture, model_type = _CLASSES[config.family]
  found = {
    "architectures": [architecture],
    "model_type": model_type,
    **{name: vars(config)[name] for name in _SIZES},
    "hidden_act": config.hidden_act,
    "layer_norm_eps": config.layer_norm_eps,
    "num_channels": 3,
    "torch_dtype": dtype,
  }
  if config.family in ("siglip", "clip"):
    found["attention_dropout"] = 0.0
  if config.family == "siglip":
    found["vision_use_head"] = head
  if config.family in ("vit", "vit_mae", "dinov2"):
    found["qkv_bias"] = True
  if config.family == "vit_mae":
    found["mask_ratio"] = 0.0  # An encoder sees every patch.
  if config.family == "dinov2":
    del found["intermediate_size"]
    found |= _dinov2_mlp(config)
  return found


def _dinov2_mlp(config: vit.VisionConfig) -> dict[str, Any]:
  width, inner = config.hidden_size, config.intermediate_size
  for ratio in range(1, 17):
    wide = width * ratio
    if (hf_config.gated_width(wide) if config.gated_mlp else wide) == inner:
      return {"mlp_ratio": ratio, "use_swiglu_ffn": config.gated_mlp}
  raise errors.InputError(
    f"intermediate_size {inner} of a DINOv2 of width {width} is no whole"
    " mlp_ratio, which is all that transformers' config can say"
  )


def llm(
  config: qwen2.LLMConfig, *, eos_token_id: int | None, dtype: str = "float32"
) -> dict[str, Any]:
  """Return config.json of a Qwen2ForCausalLM."""
  return {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    **vars(config),
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "eos_token_id": eos_token_id,
    "torch_dtype": dtype,
  }


def llava(
  tower: vit.VisionConfig,
  decoder: qwen2.LLMConfig,
  *,
  head: bool,
  image_token_id: int,
  eos_token_id: int | None,
  dtype: str = "float32",
) -> dict[str, Any]:
  """Return config.json of a LlavaForConditionalGeneration.

  Raises:
    InputError: features that it cannot name: after the last block, where
      releases of transformers differ in the norm, after a final norm, or resized.
  """
  last = tower.used_layers == tower.num_hidden_layers
  if tower.final_norm or last or tower.feature_tokens:
    raise errors.InputError(
      f"a Llava checkpoint cannot name the features of this {tower.family}"
      " encoder (after the last block, its norm, or a resize of the tokens);"
      " export the encoder alone, or an MLLM on a SigLIP or CLIP encoder"
    )
  return {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "vision_config": vision(tower, head=head, dtype=dtype),
    "text_config": llm(decoder, eos_token_id=eos_token_id, dtype=dtype),
    "image_token_index": image_token_id,
    "image_seq_length": tower.num_patches,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": tower.used_layers - tower.num_hidden_layers - 1,
    "vision_feature_select_strategy": select_strategy(tower),
    "tie_word_embeddings": decoder.tie_word_embeddings,
    "eos_token_id": eos_token_id,
    "torch_dtype": dtype,
  }


def select_strategy(tower: vit.VisionConfig) -> str:
  """Return "default", which drops the class token, or "full" without one."""
  return "default" if tower.class_token else "full"
