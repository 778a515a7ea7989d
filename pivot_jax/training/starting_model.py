"""The model that a training starts from: its parts from where inputs say.

Each part is given by an address or starts at random; what does not go together
(another tokenizer, another resize, another shape) is an error before the first
step. Nothing is read here: leaves are `trees.Deferred`.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from pivot_jax import trees
from pivot_jax.data import chat, framing
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError
from pivot_jax.models import layers, mllm, qwen2, vit
from pivot_jax.weights import checkpoint

LOG = logging.getLogger("pivot_jax")


def assemble(
  config: ConfigDict, inputs: Mapping[str, str], tokenizer: chat.Tokenizer
) -> checkpoint.Model:
  """Return the model a stage starts from, its parts from where inputs say.

  `init` gives a whole model; `vision`, `projector` and `llm` give one part; a
  part in `config.parts` that no input gives starts at random.
  """
  found = {
    name: checkpoint.load(inputs[name], deferred=True)
    for name in weights_of(inputs)
  }
  vision = llm = unread = None
  for name, loaded in found.items():
    if name in ("init", "vision") and "vision" in loaded.params:
      vision, unread = loaded.vision, loaded.meta.get("unread")
    if name in ("init", "llm") and "llm" in loaded.params:
      llm = loaded.llm
    check_given(name, inputs[name], loaded, config, tokenizer)
  if "vision" in config.parts:
    vision = vision or vit.VisionConfig(**_fields(config.vision))
  if "llm" in config.parts:
    llm = llm or _new_llm(config, tokenizer)
  given: dict[str, Any] = {}
  for name, loaded in found.items():
    given |= {part: loaded.params[part] for part in _wanted(name, config)}
  model = mllm.MLLM(
    llm=llm if "llm" in config.parts else None,
    vision=vision if "vision" in config.parts else None,
    compute=layers.Compute(**config.compute.to_dict()),
  )
  model = mllm.settled(model)
  params = _complete(model, given, config.seed)
  if llm is not None:
    where = inputs.get("llm") or inputs.get("init") or "a new model"
    tokenizer.check_vocabulary(llm.vocab_size, where)
  sources = {name: str(inputs[name]) for name in found}
  not_carried = [x for y in found.values() for x in y.meta["not_carried"]]
  meta = {
    "vision": None if vision is None else dataclasses.asdict(vision),
    "llm": None if llm is None else dataclasses.asdict(llm),
    "sources": sources | {"random": sorted(set(config.parts) - given.keys())},
    "not_carried": not_carried,
    "unread": unread,
  }
  return checkpoint.Model(model, params, tokenizer, meta)


def weights_of(inputs: Mapping[str, str]) -> list[str]:
  """Return the inputs of a training that give weights."""
  return [n for n in inputs if n in ("init", *checkpoint.PARTS)]


def log_start(
  config: ConfigDict, start: checkpoint.Model, prints: Mapping[str, str]
) -> None:
  """Say which weights a training starts from, and what of them trains."""
  sources = start.meta["sources"]
  where = {
    part: sources.get(part) or sources.get("init", "random")
    for part in start.params
    if part not in sources["random"]
  }
  table = trees.table(prints, start.params, where, config.trainable)
  for line in (f"{config.name} starts from", *table.split("\n")):
    LOG.info("%s", line)


def _wanted(name: str, config: ConfigDict) -> tuple[str, ...]:
  """Return the parts that a training takes from an input."""
  return tuple(config.parts) if name == "init" else (name,)


def _fields(section: ConfigDict) -> dict[str, Any]:
  return {k: v for k, v in section.to_dict().items() if k != "init"}


def _new_llm(config, tokenizer) -> qwen2.LLMConfig:
  fields = _fields(config.llm)
  if not fields["vocab_size"]:
    fields["vocab_size"] = -(-tokenizer.vocab_size // 64) * 64
  return qwen2.LLMConfig(**fields)


def check_given(
  name: str,
  address: str,
  loaded: checkpoint.Loaded,
  config: ConfigDict,
  tokenizer: chat.Tokenizer,
) -> None:
  """Raise InputError for given weights that do not go with the settings.

  Nor may a part be absent that the training takes from them.
  """
  checkpoint.check_parts(address, loaded, _wanted(name, config))
  if name in ("init", "vision") and "vision" in loaded.params:
    _check_resample(address, loaded, config)
  if name in ("init", "llm") and "llm" in loaded.params:
    _check_tokenizer(address, loaded, config, tokenizer)


def _check_resample(address, loaded, config) -> None:
  """Raise if an encoder is known to have seen images resized otherwise."""
  known = checkpoint.resample(loaded.meta)
  size = loaded.vision.image_size
  if known and not framing.same(known, config.resample, size):
    raise InputError(
      f"{address}: this encoder reads images resized as {known!r}, and "
      f"resample={config.resample!r}: set --config.resample={known}"
    )


def _check_tokenizer(address, loaded, config, tokenizer) -> None:
  """Raise if an LLM is known to have been trained with another tokenizer."""
  known = loaded.meta.get("tokenizer")
  folder = loaded.folder
  names = ("tokenizer.json", "vocab.json")
  if known is None and any((folder / name).exists() for name in names):
    known = load_tokenizer(folder).fingerprint
  foreign = address.startswith("hf:")
  if known is None and foreign and config.tokenizer.startswith("package:"):
    raise InputError(
      f"{address}: has no tokenizer beside its weights, and {config.tokenizer} is "
      "not its own: give the one it was trained with, as --config.tokenizer=DIR"
    )
  if known not in (None, tokenizer.fingerprint):
    raise InputError(
      f"{address}: its tokenizer is not {config.tokenizer}: give the one it was "
      "trained with, as --config.tokenizer=DIR"
    )


def _complete(model: mllm.MLLM, given, seed: int):
  """Return full parameters: given parts checked, absent ones initialised."""
  shapes = jax.eval_shape(
    functools.partial(mllm.init_params, model), jax.random.PRNGKey(0)
  )
  problems = trees.diff({part: shapes[part] for part in given}, given)
  if problems:
    raise InputError(
      f"the weights do not fit the model: {'; '.join(problems[:8])}"
    )
  if given.keys() == shapes.keys():
    return given

  def absent(rng):
    # Of the parts that are given nothing is drawn.
    drawn = mllm.init_params(model, rng)
    return {part: drawn[part] for part in shapes if part not in given}

  fresh = jax.device_get(jax.jit(absent)(jax.random.PRNGKey(seed)))
  return {part: given.get(part) or fresh[part] for part in shapes}
