"""What a Llava folder holds beside weights: tokenizer, processor, template.

Without a chat template evaluation tools silently take another model's, and
without these settings of the processor they count image tokens wrongly: the
folder says everything.
"""

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from pivot_jax import trees
from pivot_jax.data import chat
from pivot_jax.data.tokenizer import IMAGE, Tokenizer
from pivot_jax.models import qwen2, vit
from pivot_jax.weights.convert import hf_json, safetensor_files

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


def chat_template(template: str) -> str:
  """Return the Jinja template of one of `chat.TEMPLATES`."""
  return _CHAT_TEMPLATE.replace("SYSTEM", chat.system(template))


def with_image_token(
  tokenizer: Tokenizer,
) -> tuple[tokenizers.Tokenizer, int]:
  """Return a copy of a tokenizer that knows `<image>`, and its id."""
  backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
  backend.add_special_tokens([IMAGE])
  return backend, backend.token_to_id(IMAGE)


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


def write(
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
      "vision_feature_select_strategy": hf_json.select_strategy(vision),
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
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
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
  path = folder / "chat_template.jinja"
  path.write_text(chat_template(template), encoding="utf-8")


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
