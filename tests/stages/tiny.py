"""A tiny multimodal model on disk, and configs of the stages that read it.

The model reads the scenes through the shipped tokenizer. What a test expects
is computed in the test.
"""

import dataclasses

import jax
import numpy as np
from PIL import Image

from configs import common
from pivot_jax.data import chat
from pivot_jax.models import mllm
from pivot_jax.weights import artifacts, checkpoint
from tests import tiny
from tests.models import tiny as tiny_models

TOKENIZER = chat.load_tokenizer(checkpoint.tokenizer_folder("package:toy"))
PATCHES = tiny.PATCHES
VISION = tiny.VISION
LLM = dataclasses.replace(tiny.LLM, vocab_size=TOKENIZER.vocab_size)
MODEL = mllm.MLLM(llm=LLM, vision=VISION)
# What stands before every question (`qwen_1_5`, paper 1.8).
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def params(model=MODEL, *, scale=4.0):
  """Returns host parameters, large enough that the image reaches the answer."""
  drawn = mllm.init_params(model, jax.random.PRNGKey(0))
  return jax.device_get(tiny_models.jitter(drawn, scale=scale))


def save(folder, values, model=MODEL):
  """Writes an artifact as a training stage does; returns its address."""
  meta = {
    "vision": dataclasses.asdict(model.vision),
    "llm": dataclasses.asdict(model.llm),
    "sources": {},
    "not_carried": [],
  }
  artifacts.save(folder, values, meta=meta)
  TOKENIZER.save(folder / "tokenizer")
  return str(folder)


def source(task, size, split="train"):
  return dict(kind="scenes", task=task, split=split, size=size)


def config(kind, rows, **fields):
  """Returns the config of a stage as `recipe.expand` hands it over."""
  made = common.stage(kind, **fields | ({"data": "rows"} if rows else {}))
  shared = dict(
    name=kind,
    tokenizer="package:toy",
    resample="bicubic",
    vision=dataclasses.asdict(VISION) | {"init": ""},
    llm=dataclasses.asdict(LLM) | {"init": ""},
    compute=dict(dtype="float32", remat="none", scan=False, attention="auto"),
    mesh=dict(data=-1, fsdp=1, tensor=1),
    tensorboard=False,
    profile="",
    sources={"rows": rows} if rows else {},
  )
  del made.inputs
  return common.ConfigDict(shared | made.to_dict())


def ids(text):
  """Returns (the tokens of a text, where the patches of its `<image>` are)."""
  before, tag, after = text.partition("<image>")
  left, right = (
    TOKENIZER.encode(part, allow_special=True) for part in (before, after)
  )
  patches = [0] * PATCHES if tag else []
  return left + patches + right, len(left)


def sequences(found, images, *, width):
  """Returns a batch of plain causal sequences, one of `ids` a row."""
  lengths = np.array([len(tokens) for tokens, _ in found])[:, None]
  place = np.arange(width)[None]
  at = place - np.array([start for _, start in found])[:, None]
  tokens = np.zeros((len(found), width), np.int32)
  for row, (values, _) in enumerate(found):
    tokens[row, : len(values)] = values
  return tiny_models.Batch(
    *jax.tree.map(
      lambda x: jax.numpy.asarray(x, "int32"),
      (
        tokens,
        np.where(place < lengths, place, 0),
        place < lengths,
        np.zeros_like(tokens),
        np.where((at >= 0) & (at < PATCHES), at, -1),
      ),
    ),
    images=jax.numpy.asarray(images)[:, None],
  )


def pixels(image):
  """Returns a scene at the size of the encoder, as Pillow squashes it."""
  size = (VISION.image_size,) * 2
  return np.array(Image.fromarray(image).resize(size, Image.BICUBIC))
