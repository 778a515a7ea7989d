"""Hugging Face checkpoints to our parameter tree, and back, strictly.

Reads SiglipVisionModel, SiglipModel (its vision half), Qwen2ForCausalLM and
LlavaForConditionalGeneration of the two, straight from config.json and
safetensors: neither torch nor transformers is needed. Tokenizers are
`data/chat.py`'s business, downloads are the user's.

Every tensor of a folder is either carried, or named in the returned info with
the reason why not, or an error.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from pivot_jax import errors
from pivot_jax.convert import hf_config, names, tensors
from pivot_jax.models import mllm, qwen2, vit

# What a folder may put before our names; the first full match decides.
_VISION = r"(?:vision_model\.)?((?:embeddings|encoder|post_layernorm|head)\..+)"
_DECODER = r"((?:embed_tokens|layers|norm)\..+)"
_HEAD = r"(lm_head\.weight)"
_PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
  "siglip_vision_model": ((_VISION, "vision"),),
  "siglip": (
    (_VISION, "vision"),
    # The contrastive half of SigLIP, which an image encoder does not have.
    (r"(text_model\..+|logit_scale|logit_bias)", "contrastive"),
  ),
  "qwen2": ((r"(?:model\.)?" + _DECODER, "llm"), (_HEAD, "llm")),
  "llava": (
    (r"(?:model\.)?vision_tower\." + _VISION, "vision"),
    (r"(?:model\.)?multi_modal_projector\.(.+)", "projector"),
    (r"(?:model\.)?language_model\.(?:model\.)?" + _DECODER, "llm"),
    (r"(?:model\.)?(?:language_model\.)?" + _HEAD, "llm"),
  ),
}

# Tensors that are not carried, with the reason; the rest are the blocks and
# the norm behind the layer that is read, see `_unread`.
_NOT_CARRIED = (
  (r"contrastive\..+", "text half of the contrastive model"),
  (r"vision\.head\..+", "attention pooling head, not read"),
  (r"vision\.embeddings\.position_ids", "a constant"),
  (r"llm\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "a constant"),
)
_UNREAD = "behind the layer that is read"
_TIED = "equals embed_tokens, to which it is tied"


def load(
  folder: str | Path,
) -> tuple[dict[str, Any], PyTree, dict[str, Any]]:
  """Reads a checkpoint folder.

  Returns:
    The configs {"vision": VisionConfig | None, "llm": LLMConfig | None}; the
    float32 numpy params with the subtrees vision, projector and llm that the
    folder has; and info {"source": the folder, "format": its model_type,
    "not_carried": [{"name", "reason"}, ...]}.

  Raises:
    InputError: a config we do not compute, pickled or damaged weights, or
      tensors that are missing, unexpected or of a wrong shape: all are listed.
  """
  folder = Path(folder)
  configs = hf_config.read(folder)
  shapes = _shapes(configs.vision, configs.llm)
  stored = tensors.contents(folder)
  keys, unexpected = _canonical(configs.kind, stored)
  wanted = names.slots(shapes)
  unread = _unread(configs.vision, wanted)
  dropped = {name: _reason(name, configs.llm, unread) for name in keys}
  dropped = {name: reason for name, reason in dropped.items() if reason}
  expected = wanted | unread
  _check(
    folder,
    missing=[f"{n} {expected[n].shape}" for n in expected if n not in keys],
    unexpected=unexpected
    + [
      f"{keys[n]} {stored[keys[n]].shape}"
      for n in keys
      if n not in wanted and n not in dropped
    ],
    misshapen=[
      f"{keys[n]} {stored[keys[n]].shape} for {slot.shape}"
      for n, slot in expected.items()
      if n in keys and stored[keys[n]].shape != slot.shape
    ],
  )

  def read(group: list[str]) -> dict[str, np.ndarray]:
    arrays = tensors.read(stored, [keys[name] for name in group])
    return {name: arrays[keys[name]] for name in group}

  _check_tied(folder, dropped, read)
  params = names.from_foreign(shapes, read)
  info = {
    "source": str(folder),
    "format": configs.kind,
    "not_carried": [
      {"name": keys[name], "reason": reason}
      for name, reason in sorted(dropped.items())
    ],
  }
  return {"vision": configs.vision, "llm": configs.llm}, params, info


def read_unread_vision(folder: str | Path) -> dict[str, np.ndarray]:
  """Returns the vision tensors behind the layer that is read.

  They are the last block and post_layernorm for feature_layer -2, named as in
  a SiglipVisionModel without prefix: what `save_vision` takes as `last_block`.
  """
  folder = Path(folder)
  configs = hf_config.read(folder)
  if configs.vision is None:
    raise errors.InputError(f"{folder}: holds no vision encoder")
  stored = tensors.contents(folder)
  keys, _ = _canonical(configs.kind, stored)
  wanted = names.slots(_shapes(configs.vision, None))
  unread = [n for n in _unread(configs.vision, wanted) if n in keys]
  arrays = tensors.read(stored, [keys[name] for name in unread])
  return {n.removeprefix("vision."): arrays[keys[n]] for n in unread}


def save_vision(
  folder: str | Path,
  config: vit.VisionConfig,
  vision_params: PyTree,
  *,
  last_block: Mapping[str, np.ndarray] | None = None,
  resample: str = "bicubic",
) -> None:
  """Writes a folder that `transformers.SiglipVisionModel` loads.

  It has all the blocks of the published model. Those behind the layer that is
  read come from `last_block` (flat, with post_layernorm, with or without
  `vision_model.`) or, without it, do nothing: zero weights, unit norms.
  """
  folder = Path(folder)
  arrays = _vision_tensors(config, vision_params, last_block)
  tensors.write(folder, {f"vision_model.{k}": v for k, v in arrays.items()})
  tensors.write_json(folder / "config.json", hf_config.vision_json(config))
  tensors.write_json(
    folder / "preprocessor_config.json",
    hf_config.preprocessor_json(config, resample),
  )


def save_llm(
  folder: str | Path,
  config: qwen2.LLMConfig,
  llm_params: PyTree,
  *,
  eos_token_id: int | None = None,
) -> None:
  """Writes a folder that `transformers.Qwen2ForCausalLM` loads."""
  folder = Path(folder)
  arrays = names.to_foreign(llm_params)
  tensors.write(
    folder,
    {
      k if k.startswith("lm_head.") else f"model.{k}": v
      for k, v in arrays.items()
    },
  )
  tensors.write_json(
    folder / "config.json",
    hf_config.llm_json(config, eos_token_id=eos_token_id),
  )


def save_llava(
  folder: str | Path,
  vision: vit.VisionConfig,
  llm: qwen2.LLMConfig,
  params: PyTree,
  *,
  image_token_id: int,
  eos_token_id: int | None = None,
  last_block: Mapping[str, np.ndarray] | None = None,
) -> None:
  """Writes a folder that `transformers.LlavaForConditionalGeneration` loads.

  `image_token_id` is the vocabulary entry that stands for one patch in the
  prompt; `last_block` as in `save_vision`.
  """
  if vision.final_norm or vision.used_layers == vision.num_hidden_layers:
    raise ValueError(
      "the last layer has no portable form in a Llava checkpoint"
    )
  folder = Path(folder)
  arrays = {
    f"vision_tower.vision_model.{k}": v
    for k, v in _vision_tensors(vision, params["vision"], last_block).items()
  }
  for k, v in names.to_foreign(params["projector"]).items():
    arrays[f"multi_modal_projector.{k}"] = v
  for k, v in names.to_foreign(params["llm"]).items():
    inner = k if k.startswith("lm_head.") else f"model.{k}"
    arrays[f"language_model.{inner}"] = v
  tensors.write(folder, arrays)
  config = hf_config.llava_json(
    vision, llm, image_token_id=image_token_id, eos_token_id=eos_token_id
  )
  tensors.write_json(folder / "config.json", config)
  tensors.write_json(
    folder / "preprocessor_config.json", hf_config.preprocessor_json(vision)
  )


def _shapes(vision, llm) -> PyTree:
  model = mllm.MLLM(llm, vision)
  return jax.eval_shape(lambda: mllm.init_params(model, jax.random.key(0)))


def _full(config: vit.VisionConfig) -> vit.VisionConfig:
  """The whole published encoder: every block and the final norm."""
  return dataclasses.replace(
    config, feature_layer=config.num_hidden_layers, final_norm=True
  )


def _unread(
  vision: vit.VisionConfig | None, wanted: Mapping[str, names.Slot]
) -> dict[str, names.Slot]:
  if vision is None:
    return {}
  whole = names.slots(_shapes(_full(vision), None))
  return {name: slot for name, slot in whole.items() if name not in wanted}


def _canonical(
  kind: str, stored: Mapping[str, tensors.Stored]
) -> tuple[dict[str, str], list[str]]:
  """Maps our names (part.name) to the folder's; lists what fits no rule."""
  keys: dict[str, str] = {}
  unexpected = []
  for key, place in stored.items():
    for pattern, part in _PREFIXES[kind]:
      match = re.fullmatch(pattern, key)
      if match and f"{part}.{match[1]}" not in keys:
        keys[f"{part}.{match[1]}"] = key
        break
    else:
      unexpected.append(f"{key} {place.shape}")
  return keys, unexpected


def _reason(name, llm, unread) -> str | None:
  """Why a tensor is not carried, or None."""
  if name in unread:
    return _UNREAD
  if name == "llm.lm_head.weight" and llm and llm.tie_word_embeddings:
    return _TIED
  for pattern, reason in _NOT_CARRIED:
    if re.fullmatch(pattern, name):
      return reason
  return None


def _check(folder: Path, **problems: list[str]) -> None:
  found = [f"{kind}: {', '.join(p)}" for kind, p in problems.items() if p]
  if found:
    raise errors.InputError(
      f"{folder}: the tensors do not fit config.json; {'; '.join(found)};"
      " give weights and config.json of the same model, complete"
    )


def _check_tied(folder, dropped, read) -> None:
  head, table = "llm.lm_head.weight", "llm.embed_tokens.weight"
  if head in dropped and not np.array_equal(
    read([head])[head], read([table])[table]
  ):
    raise errors.InputError(
      f"{folder}: lm_head.weight differs from embed_tokens.weight, but"
      " config.json sets tie_word_embeddings; set it to false"
    )


def _vision_tensors(config, params, last_block) -> dict[str, np.ndarray]:
  """All tensors of the published encoder, without prefix."""
  whole = names.slots(_shapes(_full(config), None)["vision"])
  arrays = names.to_foreign(params)
  rest = {name: slot for name, slot in whole.items() if name not in arrays}
  if last_block is None:
    given = {name: _inert(name, slot.shape) for name, slot in rest.items()}
  else:
    given = {k.removeprefix("vision_model."): v for k, v in last_block.items()}
  wrong = [
    f"{name} {given[name].shape if name in given else 'absent'}"
    f" for {slot.shape}"
    for name, slot in rest.items()
    if name not in given or given[name].shape != slot.shape
  ]
  wrong += [f"{name} not wanted" for name in given if name not in rest]
  if wrong:
    raise ValueError(f"last_block does not fit: {', '.join(wrong)}")
  return {name: arrays.get(name, given.get(name)) for name in whole}


def _inert(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A block of these adds zero twice: the identity."""
  is_norm = re.search(r"layer_?norm\d?\.weight$", name)
  return np.ones(shape, np.float32) if is_norm else np.zeros(shape, np.float32)
