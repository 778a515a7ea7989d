"""Hugging Face config.json to our frozen configurations, and back.

No weights here (`hf.py`). A setting that our models do not compute is refused
by name rather than read past.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pivot_jax import errors
from pivot_jax.convert import tensors
from pivot_jax.models import layers, qwen2, vit

# config.json leaves out what equals the default of transformers' class.
_VISION_DEFAULTS = {
  "image_size": 224,
  "patch_size": 16,
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "hidden_act": "gelu_pytorch_tanh",
  "layer_norm_eps": 1e-6,
}
_LLM_DEFAULTS = {
  "vocab_size": 151936,
  "hidden_size": 4096,
  "intermediate_size": 22016,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "initializer_range": 0.02,
}
_LLM_THETA = 10000.0


class Configs(NamedTuple):
  """What a checkpoint folder holds; `kind` is its model_type."""

  kind: str
  vision: vit.VisionConfig | None
  llm: qwen2.LLMConfig | None


def read(folder: Path) -> Configs:
  """Reads config.json, and preprocessor_config.json for the image statistics.

  Raises:
    InputError: another kind of model, or a setting we do not compute.
  """
  path = folder / "config.json"
  config = tensors.read_json(path)
  kind = config.get("model_type")
  if kind == "siglip_vision_model":
    return Configs(kind, _vision(path, config, feature_layer=-2), None)
  if kind == "siglip":
    inner = config.get("vision_config") or {}
    return Configs(kind, _vision(path, inner, feature_layer=-2), None)
  if kind == "qwen2":
    return Configs(kind, None, _llm(path, config))
  if kind == "llava":
    return _llava(path, config)
  raise errors.InputError(
    f"{path}: model_type is {kind!r}; it can be siglip, siglip_vision_model,"
    " qwen2 or llava"
  )


def vision_json(config: vit.VisionConfig) -> dict[str, Any]:
  """Returns config.json of a SiglipVisionModel without pooling head."""
  return {
    "architectures": ["SiglipVisionModel"],
    "model_type": "siglip_vision_model",
    **{name: vars(config)[name] for name in _VISION_DEFAULTS},
    "num_channels": 3,
    "attention_dropout": 0.0,
    "vision_use_head": False,
    "torch_dtype": "float32",
  }


def resample(folder: Path) -> str | None:
  """Returns how a folder's image processor resizes, None if it does not say.

  Raises:
    InputError: a filter that `preprocessor_json` has no name for.
  """
  path = folder / "preprocessor_config.json"
  said = tensors.read_json(path) if path.exists() else {}
  if said.get("resample") is None:
    return None
  crops = bool(said.get("do_center_crop"))
  known = {
    (3, False): "bicubic",
    (2, False): "bilinear",
    (3, True): "crop_bicubic",
  }
  if (said["resample"], crops) not in known:
    raise errors.InputError(
      f"{path}: resample is {said['resample']!r}, do_center_crop {crops}; images"
      " can be resized by filter 2 or 3, or by 3 and cropped"
    )
  return known[said["resample"], crops]


def preprocessor_json(
  config: vit.VisionConfig, resample: str = "bicubic"
) -> dict[str, Any]:
  """Returns preprocessor_config.json: images framed as in training.

  "bicubic" and "bilinear" squash to the square, as SigLIP's processor does;
  "crop_bicubic" resizes the short side and cuts the middle, as CLIP's does.
  """
  side = config.image_size
  framing: dict[str, Any] = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": side, "width": side},
  }
  if resample == "crop_bicubic":
    framing = {
      "image_processor_type": "CLIPImageProcessor",
      "size": {"shortest_edge": side},
      "do_center_crop": True,
      "crop_size": {"height": side, "width": side},
      "do_convert_rgb": True,
    }
  filters = {"bicubic": 3, "crop_bicubic": 3, "bilinear": 2}
  return framing | {
    "do_resize": True,
    "resample": filters[resample],
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(config.image_mean),
    "image_std": list(config.image_std),
  }


def llm_json(
  config: qwen2.LLMConfig, *, eos_token_id: int | None
) -> dict[str, Any]:
  """Returns config.json of a Qwen2ForCausalLM."""
  return {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    **vars(config),
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "eos_token_id": eos_token_id,
    "torch_dtype": "float32",
  }


def llava_json(
  vision: vit.VisionConfig,
  llm: qwen2.LLMConfig,
  *,
  image_token_id: int,
  eos_token_id: int | None,
) -> dict[str, Any]:
  """Returns config.json of a LlavaForConditionalGeneration."""
  return {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "vision_config": vision_json(vision),
    "text_config": llm_json(llm, eos_token_id=eos_token_id),
    "image_token_index": image_token_id,
    "image_seq_length": vision.num_patches,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": vision.used_layers - vision.num_hidden_layers - 1,
    "vision_feature_select_strategy": "full",
    "tie_word_embeddings": llm.tie_word_embeddings,
    "eos_token_id": eos_token_id,
    "torch_dtype": "float32",
  }


def _llava(path: Path, config: Mapping[str, Any]) -> Configs:
  inner = {
    part: config.get(f"{part}_config") or {} for part in ("vision", "text")
  }
  kinds = {part: inner[part].get("model_type") for part in inner}
  if kinds != {"vision": "siglip_vision_model", "text": "qwen2"}:
    raise errors.InputError(
      f"{path}: vision_config is {kinds['vision']!r} and text_config"
      f" {kinds['text']!r}; they must be siglip_vision_model and qwen2"
    )
  _require(
    path,
    config,
    projector_hidden_act=("gelu", "gelu"),
    multimodal_projector_bias=(True, True),
    # "default" would drop the first patch, which is no CLS token in SigLIP.
    vision_feature_select_strategy=("full", "default"),
  )
  layer = config.get("vision_feature_layer", -2)
  if not isinstance(layer, int) or layer == -1:
    raise errors.InputError(
      f"{path}: vision_feature_layer is {layer!r}; it must be one number, and"
      " not -1, which names other features in transformers 4 than in 5"
    )
  tied = config.get("tie_word_embeddings", False)
  text = dict(inner["text"])
  text["tie_word_embeddings"] = tied or text.get("tie_word_embeddings", False)
  vision = _vision(path, inner["vision"], feature_layer=layer)
  return Configs("llava", vision, _llm(path, text))


def _vision(path, config, *, feature_layer) -> vit.VisionConfig:
  _require(path, config, num_channels=(3, 3))
  fields = {k: config.get(k, v) for k, v in _VISION_DEFAULTS.items()}
  if fields["hidden_act"] not in layers.ACTIVATIONS:
    raise errors.InputError(
      f"{path}: hidden_act is {fields['hidden_act']!r}; it can be"
      f" {', '.join(layers.ACTIVATIONS)}"
    )
  processor = path.with_name("preprocessor_config.json")
  statistics = tensors.read_json(processor) if processor.exists() else {}
  try:
    return vit.VisionConfig(
      **fields,
      feature_layer=feature_layer,
      image_mean=tuple(statistics.get("image_mean", (0.5, 0.5, 0.5))),
      image_std=tuple(statistics.get("image_std", (0.5, 0.5, 0.5))),
    )
  except (ValueError, TypeError) as error:
    raise errors.InputError(
      f"{path}: {error}; correct the vision config"
    ) from error


def _llm(path, config) -> qwen2.LLMConfig:
  _require(
    path,
    config,
    hidden_act=("silu", "silu"),
    use_sliding_window=(False, False),
    rope_scaling=(None, None),
  )
  rope = config.get("rope_parameters") or {}
  if rope.get("rope_type", "default") != "default":
    raise errors.InputError(
      f"{path}: rope_parameters.rope_type is {rope['rope_type']!r}; only"
      " default is computed"
    )
  theta = rope.get("rope_theta", config.get("rope_theta", _LLM_THETA))
  fields = {k: config.get(k, v) for k, v in _LLM_DEFAULTS.items()}
  heads = fields["num_attention_heads"]
  try:
    return qwen2.LLMConfig(
      **fields,
      num_key_value_heads=config.get("num_key_value_heads") or heads,
      head_dim=config.get("head_dim") or fields["hidden_size"] // heads,
      rope_theta=float(theta),
    )
  except (ValueError, TypeError) as error:
    raise errors.InputError(
      f"{path}: {error}; correct the text config"
    ) from error


def _require(path, config, **wanted):
  """Refuses settings; each is (the value we compute, transformers' default)."""
  wrong = [
    f"{name} is {config.get(name, default)!r}, not {value!r}"
    for name, (value, default) in wanted.items()
    if config.get(name, default) != value
  ]
  if wrong:
    raise errors.InputError(
      f"{path}: {'; '.join(wrong)}; this model cannot be computed here"
    )
