"""Hugging Face's config.json to our frozen configurations, and back.

No weights here (`hf.py`). A setting that our models do not compute is refused
by name. What is written means the same in transformers 4.57 and in 5.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pivot_jax import errors, texts
from pivot_jax.models import bounds, qwen2, vit
from pivot_jax.weights.convert import safetensor_files, towers

LOG = logging.getLogger("pivot_jax")


class _Tower(NamedTuple):
  """A kind of vision config: its family, and the defaults of config.json."""

  family: str
  patch_size: int = 16
  layer_norm_eps: float | None = None  # None: the family's


# The defaults of transformers' classes, where they are not the family's.
_DEFAULT_SIZES = {
  "image_size": 224,
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
}
_TOWERS = {
  "siglip_vision_model": _Tower("siglip"),
  "clip_vision_model": _Tower("clip", patch_size=32),
  "dinov2": _Tower("dinov2", patch_size=14),
  "vit": _Tower("vit", layer_norm_eps=1e-12),
  "vit_mae": _Tower("vit_mae", layer_norm_eps=1e-12),
}
# Contrastive models, of which the vision half is read.
_PAIRS = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}
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

_HINTS = {
  "siglip2": " (this looks like SigLIP2 NaFlex, whose images keep their shape:"
  " take a fixed-resolution one, such as siglip2-so400m-patch16-384)",
  "siglip2_vision_model": " (this looks like SigLIP2 NaFlex: take a"
  " fixed-resolution one)",
  "dinov2_with_registers": " (register tokens are not computed here)",
}


class Configs(NamedTuple):
  """The models of a checkpoint folder; `kind` is its model_type."""

  kind: str
  vision: vit.VisionConfig | None
  llm: qwen2.LLMConfig | None


def read(folder: Path) -> Configs:
  """Read config.json; image statistics are those of the published family.

  Raises:
    InputError: another kind of model, or a setting we do not compute.
  """
  path = folder / "config.json"
  config = safetensor_files.read_json(path)
  kind = texts.shown(f"{config.get('model_type')}", longest=100)
  if kind in _TOWERS:
    return Configs(kind, vision(path, config), None)
  if kind in _PAIRS:
    inner = _section(path, config, "vision_config")
    return Configs(kind, vision(path, inner, kind=_PAIRS[kind]), None)
  if kind == "qwen2":
    return Configs(kind, None, llm(path, config))
  if kind == "llava":
    return _llava(path, config)
  raise errors.InputError(
    f"{path}: model_type is {kind!r}; it can be"
    f" {', '.join([*_TOWERS, *_PAIRS, 'qwen2', 'llava'])} or llava_qwen"
    f"{_HINTS.get(kind, '')}"
  )


def _llava(path: Path, config: Mapping[str, Any]) -> Configs:
  inner = {
    part: _section(path, config, f"{part}_config")
    for part in ("vision", "text")
  }
  kinds = {part: inner[part].get("model_type") for part in inner}
  towers = tuple(_PAIRS.values())
  if kinds["vision"] not in towers or kinds["text"] != "qwen2":
    raise errors.InputError(
      f"{path}: vision_config is {bounds.told(kinds['vision'])} and text_config"
      f" {bounds.told(kinds['text'])}; they must be {' or '.join(towers)}, and qwen2"
    )
  tower = vision(path, inner["vision"])
  _require(
    path,
    config,
    projector_hidden_act=("gelu", "gelu"),
    multimodal_projector_bias=(True, True),
    # "default" drops the first token, which must be a class token and no patch.
    vision_feature_select_strategy=(
      "default" if tower.class_token else "full",
      "default",
    ),
  )
  layer = config.get("vision_feature_layer", -2)
  if not bounds.is_whole(layer):
    raise errors.InputError(
      f"{path}: vision_feature_layer is {bounds.told(layer)}; it must be one number"
    )
  if layer == -1:
    LOG.warning(
      "%s: vision_feature_layer -1 is read as the last block without the norm, as"
      " transformers 4.57.6 and 5 do; 4.57.1 applied the norm",
      path,
    )
  tied = config.get("tie_word_embeddings", False)
  text = dict(inner["text"])
  if tied is not False and tied is not None:
    text["tie_word_embeddings"] = tied
  tower = vision(path, inner["vision"], feature_layer=layer)
  return Configs("llava", tower, llm(path, text))


def vision(
  path: Path,
  config: Mapping[str, Any],
  *,
  kind: str | None = None,
  **choices: str | int | float | tuple[float, ...],
) -> vit.VisionConfig:
  """Return the encoder of a vision config, read as the paper reads its kind.

  `choices` are VisionConfig fields that win over the kind's own.
  """
  kind = kind or str(config["model_type"])
  tower = _TOWERS[kind]
  _require(path, config, num_channels=(3, 3), qkv_bias=(True, True))
  fields = dict(towers.CHOICES[tower.family], family=tower.family)
  if tower.layer_norm_eps is not None:
    fields["layer_norm_eps"] = tower.layer_norm_eps
  fields |= _DEFAULT_SIZES | {"patch_size": tower.patch_size}
  said = (*_DEFAULT_SIZES, "patch_size", "hidden_act", "layer_norm_eps")
  fields |= {name: config[name] for name in said if name in config}
  fields |= choices
  try:
    if kind == "dinov2":
      fields |= _dinov2_mlp(path, config, fields["hidden_size"])
    return vit.VisionConfig(**fields)
  except errors.InputError as error:
    raise errors.InputError(
      f"{path}: {error}; correct the vision config"
    ) from error


def _dinov2_mlp(path, config, width) -> dict[str, Any]:
  """Return the width of the MLP, which transformers computes from a ratio."""
  _require(path, config, hidden_act=("gelu", "gelu"))
  bounds.whole("hidden_size", width, bounds.WIDTH)
  ratio = bounds.real("mlp_ratio", config.get("mlp_ratio", 4), 0, 1000)
  inner = int(width * ratio)
  gated = config.get("use_swiglu_ffn", False)
  if not bounds.truth("use_swiglu_ffn", gated):
    return {"intermediate_size": inner}
  return {"intermediate_size": gated_width(inner), "gated_mlp": True}


def gated_width(inner: int) -> int:
  """Return the width of DINOv2's gated MLP: two thirds, a multiple of 8."""
  return (int(inner * 2 / 3) + 7) // 8 * 8


def llm(path: Path, config: Mapping[str, Any]) -> qwen2.LLMConfig:
  """Return the decoder of a Qwen2 config."""
  _require(
    path,
    config,
    hidden_act=("silu", "silu"),
    use_sliding_window=(False, False),
    rope_scaling=(None, None),
  )
  rope = _section(path, config, "rope_parameters")
  if rope.get("rope_type", "default") != "default":
    raise errors.InputError(
      f"{path}: rope_parameters.rope_type is"
      f" {bounds.told(rope['rope_type'])}; only default is computed"
    )
  theta = rope.get("rope_theta", config.get("rope_theta", _LLM_THETA))
  fields = {k: config.get(k, v) for k, v in _LLM_DEFAULTS.items()}
  heads = fields["num_attention_heads"]
  try:
    bounds.whole("num_attention_heads", heads, bounds.WIDTH)
    width = bounds.whole("hidden_size", fields["hidden_size"], bounds.WIDTH)
    keys, dim = (
      default if config.get(name) is None else config[name]
      for name, default in (
        ("num_key_value_heads", heads),
        ("head_dim", width // heads),
      )
    )
    return qwen2.LLMConfig(
      **fields,
      num_key_value_heads=keys,
      head_dim=dim,
      rope_theta=float(bounds.real("rope_theta", theta, 1, 1e15)),
    )
  except errors.InputError as error:
    raise errors.InputError(
      f"{path}: {error}; correct the text config"
    ) from error


def _section(path, config, name) -> dict[str, Any]:
  return bounds.section(f"{path}: {name}", config.get(name))


def _require(path, config, **wanted):
  """Refuse settings; each is (the value we compute, transformers' default)."""
  wrong = [
    f"{name} is {bounds.told(config.get(name, default))}, not {value!r}"
    for name, (value, default) in wanted.items()
    if config.get(name, default) != value
  ]
  if wrong:
    raise errors.InputError(
      f"{path}: {'; '.join(wrong)}; this model cannot be computed here"
    )


def class_of(config: vit.VisionConfig) -> str:
  """Return the name of transformers' class of an encoder."""
  return _CLASSES[config.family][0]


def vision_json(
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
    found |= _mlp_json(config)
  return found


def _mlp_json(config: vit.VisionConfig) -> dict[str, Any]:
  width, inner = config.hidden_size, config.intermediate_size
  for ratio in range(1, 17):
    wide = width * ratio
    if (gated_width(wide) if config.gated_mlp else wide) == inner:
      return {"mlp_ratio": ratio, "use_swiglu_ffn": config.gated_mlp}
  raise errors.InputError(
    f"intermediate_size {inner} of a DINOv2 of width {width} is no whole"
    " mlp_ratio, which is all that transformers' config can say"
  )


def llm_json(
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


def llava_json(
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
    "vision_config": vision_json(tower, head=head, dtype=dtype),
    "text_config": llm_json(decoder, eos_token_id=eos_token_id, dtype=dtype),
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
