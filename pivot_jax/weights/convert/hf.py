"""Hugging Face checkpoints to our parameter tree, and back, strictly.

Reads the vision towers of `hf_config.py`, Qwen2ForCausalLM, and whole MLLMs:
LlavaForConditionalGeneration and the layout of LLaVA-NeXT and of the paper's
code. Straight from config.json and safetensors: neither torch nor transformers
is needed. Tokenizers are `data/chat.py`'s business.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from pivot_jax import errors
from pivot_jax.models import qwen2, vit
from pivot_jax.weights.convert import (
  hf_config,
  layouts,
  llava,
  names,
  open_weights,
  processor,
  safetensor_files,
  towers,
)

# What a folder may put before a tensor's name; the first full match decides.
_TOWER = r"((?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\..+)"
_INNER = r"(?:vision_model\.)?" + _TOWER
_TEXT = (
  r"((?:text_model|text_projection|visual_projection|logit_scale|logit_bias).*)"
)
_VIT = r"((?:embeddings|encoder|layernorm|pooler)\..+)"
_DECODER = r"((?:embed_tokens|layers|norm)\..+)"
_HEAD = r"(lm_head\.weight)"
_PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
  "siglip_vision_model": ((_INNER, "vision"),),
  "siglip": ((_INNER, "vision"), (_TEXT, "contrastive")),
  "clip_vision_model": (
    (_INNER, "vision"),
    (r"(visual_projection\..+)", "contrastive"),
  ),
  "clip": ((_INNER, "vision"), (_TEXT, "contrastive")),
  "dinov2": (
    (r"(?:dinov2\.)?" + _VIT, "vision"),
    (r"classifier\.(.+)", "classifier"),
  ),
  "vit": (
    (r"(?:vit\.)?" + _VIT, "vision"),
    (r"classifier\.(.+)", "classifier"),
  ),
  "vit_mae": (
    (r"(?:vit\.)?" + _VIT, "vision"),
    (r"decoder\.(.+)", "decoder"),
  ),
  "qwen2": ((r"(?:model\.)?" + _DECODER, "llm"), (_HEAD, "llm")),
  "llava": (
    (r"(?:model\.)?vision_tower\." + _INNER, "vision"),
    (r"(?:model\.)?multi_modal_projector\.(.+)", "projector"),
    (r"(?:model\.)?language_model\.(?:model\.)?" + _DECODER, "llm"),
    (r"(?:model\.)?(?:language_model\.)?" + _HEAD, "llm"),
  ),
  "llava_qwen": (
    (r"model\.vision_tower\.vision_tower\." + _INNER, "vision"),
    *llava.PROJECTOR,
    (r"model\.(image_newline)", "newline"),
    (r"model\." + _DECODER, "llm"),
    (_HEAD, "llm"),
  ),
}


def open_folder(
  folder: str | Path,
  *,
  choices: Mapping[str, Any] | None = None,
  tower: Path | None = None,
) -> open_weights.OpenWeights:
  """Open a checkpoint folder.

  `choices` are fields of VisionConfig that win over config.json's, such as
  feature_layer. `tower` is the folder of an MLLM's encoder, where it lies
  outside the model's.

  Raises:
    InputError: a config we do not compute, pickled or damaged weights, or
      tensors that are missing, unexpected or of a wrong shape: all are listed.
  """
  folder = Path(folder)
  _check_folder(folder)
  config = safetensor_files.read_json(folder / "config.json")
  kind = f"{config.get('model_type')}"
  official = kind in llava.MODEL_TYPES
  kind = "llava_qwen" if official else kind
  found = open_weights.Found(safetensor_files.contents(folder))
  for key in found.stored if kind in _PREFIXES else ():
    found.add(key, _PREFIXES[kind])
  if official:
    tower = llava.tower_folder(folder, config, tower)
    configs = llava.read_next(folder, config, found, tower=tower)
  elif tower is not None:
    raise errors.InputError(f"{folder}: names no encoder, which tower is")
  else:
    configs = hf_config.read(folder)
  vision, known = configs.vision, None
  if vision is not None:
    known = processor.read(folder, vision.family)
    said = dict(image_mean=known.mean, image_std=known.std) if known else {}
    vision = dataclasses.replace(vision, **said, **(choices or {}))
  opened = open_weights.from_tensors(
    str(folder),
    kind,
    found,
    vision=vision,
    llm=configs.llm,
    layout=vision.family if vision else "siglip",
    cut=official,
    processor=known,
  )
  return _with_tower(opened, tower, choices) if tower else opened


def _check_folder(folder: Path) -> None:
  if folder.is_file():
    raise errors.InputError(
      f"{folder}: is a file; give the folder that holds it and config.json, or"
      " timm:FILE.safetensors for timm's format"
    )
  if not folder.is_dir():
    raise errors.InputError(f"{folder}: no such folder")


def _with_tower(opened, tower: Path, choices) -> open_weights.OpenWeights:
  """Return the weights of an MLLM whose tower is cut, made whole.

  What was cut is read from the tower's own folder. A folder that holds the
  tower's config alone gives nothing.
  """
  if not safetensor_files.has_weights(tower):
    return opened

  def read_unread() -> dict[str, np.ndarray]:
    own = opened.read_unread()
    if not towers.unread(opened.vision).keys() - own.keys():
      return own
    return open_folder(tower, choices=choices).read_unread() | own

  return dataclasses.replace(opened, read_unread=read_unread)


def save_vision(
  folder: str | Path,
  config: vit.VisionConfig,
  vision_params: PyTree,
  *,
  unread: Mapping[str, np.ndarray] | None = None,
  resample: str = "bicubic",
  dtype: str = "float32",
) -> None:
  """Write a folder that transformers' class of the family loads.

  It has all the blocks of the published model. Those behind the layer that is
  read come from `unread` (as `OpenWeights.read_unread` gives them) or, without it,
  do nothing: zero weights, unit norms.
  """
  folder = Path(folder)
  arrays = _tower(config, vision_params, unread)
  prefix = "vision_model." if config.family in ("siglip", "clip") else ""
  safetensor_files.write(
    folder, {prefix + k: v for k, v in arrays.items()}, dtype=dtype
  )
  safetensor_files.write_json(
    folder / "config.json",
    hf_config.vision_json(config, head=_has_head(arrays), dtype=dtype),
  )
  _write_processor(folder, config, resample)


def save_llm(
  folder: str | Path,
  config: qwen2.LLMConfig,
  llm_params: PyTree,
  *,
  eos_token_id: int | None = None,
  dtype: str = "float32",
) -> None:
  """Write a folder that `transformers.Qwen2ForCausalLM` loads."""
  folder = Path(folder)
  arrays = names.to_foreign(llm_params)
  arrays = {
    k if k.startswith("lm_head.") else f"model.{k}": v
    for k, v in arrays.items()
  }
  safetensor_files.write(folder, arrays, dtype=dtype)
  safetensor_files.write_json(
    folder / "config.json",
    hf_config.llm_json(config, eos_token_id=eos_token_id, dtype=dtype),
  )


def save_llava(
  folder: str | Path,
  vision: vit.VisionConfig,
  llm: qwen2.LLMConfig,
  params: PyTree,
  *,
  image_token_id: int,
  eos_token_id: int | None = None,
  unread: Mapping[str, np.ndarray] | None = None,
  resample: str = "bicubic",
  dtype: str = "float32",
) -> None:
  """Write a folder that `transformers.LlavaForConditionalGeneration` loads.

  `image_token_id` is the vocabulary entry that stands for one patch in the
  prompt; `unread` as in `save_vision`.
  """
  folder = Path(folder)
  tower = _tower(vision, params["vision"], unread)
  config = hf_config.llava_json(
    vision,
    llm,
    head=_has_head(tower),
    image_token_id=image_token_id,
    eos_token_id=eos_token_id,
    dtype=dtype,
  )
  arrays = {f"vision_tower.vision_model.{k}": v for k, v in tower.items()}
  for k, v in names.to_foreign(params["projector"]).items():
    arrays[f"multi_modal_projector.{k}"] = v
  for k, v in names.to_foreign(params["llm"]).items():
    inner = k if k.startswith("lm_head.") else f"model.{k}"
    arrays[f"language_model.{inner}"] = v
  safetensor_files.write(folder, arrays, dtype=dtype)
  safetensor_files.write_json(folder / "config.json", config)
  _write_processor(folder, vision, resample, processor_class="LlavaProcessor")


def _tower(config, params, unread) -> dict[str, np.ndarray]:
  """Return all tensors of the published encoder, in its family's layout."""
  arrays = towers.complete(config, params, unread)
  if config.family == "vit" and "pooler.dense.weight" not in arrays:
    # transformers' ViTModel has a pooler and would make a random one.
    shapes = towers.extras(config)
    arrays |= {name: np.zeros(shapes[name], np.float32) for name in shapes}
  if config.family == "dinov2" and "mask_token" not in arrays:
    arrays["mask_token"] = np.zeros((1, config.hidden_size), np.float32)
  return layouts.to_foreign(config.family, arrays)


def _has_head(arrays: Mapping[str, np.ndarray]) -> bool:
  return any(name.startswith("head.") for name in arrays)


def _write_processor(folder, config, resample, **more: str) -> None:
  known = processor.Processor(
    resample, config.image_size, config.image_mean, config.image_std
  )
  safetensor_files.write_json(
    folder / "preprocessor_config.json",
    processor.to_json(known, config.family) | more,
  )
