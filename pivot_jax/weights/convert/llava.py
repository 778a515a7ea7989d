"""Llava folders: LLaVA-NeXT's layout read, the files beside weights written.

LLaVA-NeXT's config.json, which the paper's code writes, too, is that of the
language model and names the vision tower; what the tower is like is in that
tower's own config.json, or in the shapes of the tensors. A SigLIP tower comes
without the block behind its features.

A folder that is written says everything: without a chat template evaluation
tools silently take another model's, and without the settings of the processor
they count image tokens wrongly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from pivot_jax import errors, files, trees
from pivot_jax.data import chat
from pivot_jax.data.tokenizer import IMAGE, Tokenizer
from pivot_jax.models import bounds, qwen2, vit
from pivot_jax.weights.convert import (
  hf_config,
  open_weights,
  safetensor_files,
  towers,
)

MODEL_TYPES = ("llava_qwen", "llava_qwen2")
# A Sequential of Linear, GELU, Linear.
PROJECTOR = tuple(
  (rf"model\.mm_projector\.{index}\.({leaf})", f"projector.{name}")
  for index, name in ((0, "linear_1"), (2, "linear_2"))
  for leaf in ("weight", "bias")
)
# ChatML as `chat.encode_prompt` writes it: the system prompt of the training
# unless the conversation brings one, images before the text of their turn.
_CHAT_TEMPLATE = (
  "{% if messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\\nSYSTEM<|im_end|>\\n' }}"
  "{% endif %}"
  "{% for message in messages %}"
  "{{ '<|im_start|>' + message['role'] + '\\n' }}"
  "{% if message['content'] is string %}"
  "{{ message['content'] }}"
  "{% else %}"
  "{% for part in message['content'] if part['type'] == 'image' %}"
  "{{ '<image>\\n' }}"
  "{% endfor %}"
  "{% for part in message['content'] if part['type'] == 'text' %}"
  "{{ part['text'] }}"
  "{% endfor %}"
  "{% endif %}"
  "{{ '<|im_end|>\\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def read_next(
  folder: Path,
  config: Mapping[str, Any],
  found: open_weights.Found,
  *,
  tower: Path | None = None,
) -> hf_config.Configs:
  """Return the models of a LLaVA-NeXT folder.

  `tower` is the encoder's own folder, as `tower_folder` finds it.

  Raises:
    InputError: a projector, a tiling of images or a tower that is not computed
      here, or a tower whose shape cannot be told.
  """
  path = folder / "config.json"
  _require(
    path,
    config,
    mm_projector_type=("mlp2x_gelu",),
    mm_vision_select_feature=("patch", None),
    mm_vision_select_layer=(-2, None),
    # Tiles, padding and a newline token are another model.
    image_aspect_ratio=("square", None),
    mm_patch_merge_type=("flat", None),
    mm_use_im_start_end=(False, None),
  )
  if tower is not None:
    beside = tower / "config.json"
    inner = safetensor_files.read_json(beside)
    kind = inner.get("model_type")
    if kind in ("siglip", "clip"):
      section = f"{beside}: vision_config"
      inner = bounds.section(section, inner.get("vision_config"))
      kind = f"{kind}_vision_model"
    if kind not in ("siglip_vision_model", "clip_vision_model"):
      raise errors.InputError(
        f"{beside}: model_type is {bounds.told(kind)}; an MLLM is read with a SigLIP or a"
        " CLIP encoder"
      )
    vision = hf_config.vision(beside, inner, kind=kind, feature_layer=-2)
  else:
    vision = _from_shapes(path, _tower_name(path, config), found)
  return hf_config.Configs("llava_qwen", vision, hf_config.llm(path, config))


def tower_folder(
  folder: Path, config: Mapping[str, Any], given: Path | None
) -> Path | None:
  """Return the folder of the tower itself, None where nobody has it.

  It is `given`, or lies inside the model's where mm_vision_tower says. Another
  place that a file names is not read; a model of the hub is not looked for.

  Raises:
    InputError: mm_vision_tower is a folder elsewhere, or none is in `given`.
  """
  name = _tower_name(folder / "config.json", config)
  if given is not None:
    if not (given / "config.json").exists():
      raise errors.InputError(f"{given}: the tower has no config.json there")
    return given
  inside = folder / name
  if (inside / "config.json").exists():
    if inside.resolve().is_relative_to(folder.resolve()):
      return inside
  elif not (Path(name) / "config.json").exists():
    return None
  raise errors.InputError(
    f"{folder / 'config.json'}: mm_vision_tower is {name!r}, a folder outside the"
    " model's, which is not read unasked; to have it read write"
    f" hf:{folder}?tower={name}"
  )


def _tower_name(path: Path, config: Mapping[str, Any]) -> str:
  name = config.get("mm_vision_tower")
  if not isinstance(name, str) or "\0" in name or len(name) > 1000:
    raise errors.InputError(f"{path}: mm_vision_tower names no encoder")
  return name


def _from_shapes(path, name, found):
  """Return the tower as its published kind has it, sized by the tensors."""
  family = "clip" if "clip" in name.lower() else "siglip"
  if "siglip" in name.lower():
    family = "siglip"
  return towers.from_shapes(
    str(path),
    found.tower(),
    family=family,
    layout=family,
    named=name,
    # The paper's code saves a SigLIP tower up to the block that is read.
    cut=family == "siglip",
  )


def _require(path, config, **allowed):
  wrong = [
    f"{name} is {bounds.told(config.get(name))}"
    for name, values in allowed.items()
    if config.get(name) not in values
  ]
  if wrong:
    raise errors.InputError(
      f"{path}: {'; '.join(wrong)}; this model cannot be computed here (the"
      " paper's: mlp2x_gelu, one square image, patches of the layer -2)"
    )


def chat_template(template: str) -> str:
  """Return the Jinja template of one of `chat.TEMPLATES`."""
  return _CHAT_TEMPLATE.replace("SYSTEM", chat.system(template))


def with_image_token(
  tokenizer: Tokenizer,
) -> tuple[tokenizers.Tokenizer, int]:
  """Return a copy of a tokenizer that knows `<image>`, and its id."""
  backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
  backend.add_special_tokens([IMAGE])
  image_id = backend.token_to_id(IMAGE)
  assert image_id is not None
  return backend, image_id


def widen(
  config: qwen2.LLMConfig, llm_params: trees.Params, image_id: int, pad_id: int
) -> tuple[qwen2.LLMConfig, Any]:
  """Return the decoder with a row for `<image>`, if it had none to spare.

  The row is that of the padding token: its logit never exceeds that one's, so
  that no answer changes.
  """
  missing = image_id + 1 - config.vocab_size
  if missing <= 0:
    return config, llm_params
  params = dict(llm_params)
  table = np.asarray(params["embed_tokens"]["embedding"])
  rows = np.repeat(table[pad_id : pad_id + 1], missing, axis=0)
  params["embed_tokens"] = {"embedding": np.concatenate([table, rows])}
  if not config.tie_word_embeddings:
    head = np.asarray(params["lm_head"]["kernel"])
    columns = np.repeat(head[:, pad_id : pad_id + 1], missing, axis=1)
    params["lm_head"] = {"kernel": np.concatenate([head, columns], axis=1)}
  sizes = dict(vars(config), vocab_size=image_id + 1)
  return qwen2.LLMConfig(**sizes), params


def write_beside(
  folder: Path,
  *,
  vision: vit.VisionConfig,
  tokenizer: Tokenizer,
  template: str,
) -> None:
  """Write tokenizer, processor, chat template and generation config."""
  backend, image_id = with_image_token(tokenizer)
  write_tokenizer(folder, backend, image_token=True, template=template)
  safetensor_files.write_json(
    folder / "processor_config.json",
    {
      "processor_class": "LlavaProcessor",
      "patch_size": vision.patch_size,
      "vision_feature_select_strategy": hf_config.select_strategy(vision),
      "num_additional_image_tokens": int(vision.class_token),
      "image_token": IMAGE,
    },
  )
  write_generation(folder, tokenizer, suppress=[image_id])


def write_tokenizer(
  folder: Path,
  backend: tokenizers.Tokenizer,
  *,
  image_token: bool,
  template: str,
) -> None:
  """Write a tokenizer that transformers 4 and 5 load, with its template."""
  backend.encode_special_tokens = False
  files.make_folder(folder)
  files.write_text(folder / "tokenizer.json", backend.to_str())
  config: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 32768,
    # The class would add token_type_ids, which generate() of transformers 4
    # refuses.
    "model_input_names": ["input_ids", "attention_mask"],
    "chat_template": chat_template(template),
    # transformers 5 takes a class by config.json's model_type. That of qwen2
    # keeps vocabulary and merges, and splits by Qwen2's rules, whatever
    # tokenizer.json says, unless this stands here. No code of a folder is run
    # for it: that takes an argument of the caller.
    "trust_remote_code": True,
  }
  if image_token:
    # The class of llava reads tokenizer.json.
    del config["trust_remote_code"]
    config["processor_class"] = "LlavaProcessor"
    config["extra_special_tokens"] = {"image_token": IMAGE}
  safetensor_files.write_json(folder / "tokenizer_config.json", config)
  files.write_text(folder / "chat_template.jinja", chat_template(template))


def write_generation(
  folder: Path, tokenizer: Tokenizer, *, suppress: list[int]
) -> None:
  """Write greedy decoding that ends at either end token, as evaluated here."""
  config: dict[str, Any] = {
    "do_sample": False,
    "repetition_penalty": 1.0,
    "eos_token_id": list(tokenizer.eos_ids),
    "pad_token_id": tokenizer.end_of_text,
  }
  if suppress:
    config["suppress_tokens"] = suppress
  safetensor_files.write_json(folder / "generation_config.json", config)
