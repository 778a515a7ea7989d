"""The toy MLLM and its data, for benchmarks on a CPU: random, but always equal.

Weights as transformers writes them (SigLIP tower, two-layer projector, Qwen2
language model; 8.1 M parameters at the default sizes) and token ids, images
and answers as arrays. Random weights cost what trained ones do and say nothing
about quality; every part has the proportions of a real model, none its size.

Q pairs, P patches of an image, T tokens, D and E widths, F hidden widths.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

OPTIONS = {"pairs": 8, "answer": 32, "image": 128, "layers": 4}

PATCH, PROMPT, VOCAB = 16, 24, 8192
IMAGE_ID, PAD_ID, EOS_ID = VOCAB - 1, 0, 1
VISION = dict(
  hidden_size=192,
  intermediate_size=768,
  num_attention_heads=3,
  patch_size=PATCH,
  vision_use_head=False,
)
TEXT = dict(
  vocab_size=VOCAB,
  hidden_size=256,
  intermediate_size=1024,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=64,
  rope_parameters={"rope_type": "default", "rope_theta": 1e6},
  tie_word_embeddings=True,
  bos_token_id=None,
  eos_token_id=EOS_ID,
  pad_token_id=PAD_ID,
)


@dataclasses.dataclass(frozen=True)
class Toy:
  """The model's folder, the sizes and the data; images are [Q, H, W, 3].

  Prompts hold the text alone; the image's tokens come before it.
  """

  folder: pathlib.Path
  sizes: Mapping[str, int]
  prompt: np.ndarray
  chosen: np.ndarray
  rejected: np.ndarray
  images: np.ndarray

  @property
  def patches(self) -> int:
    return (self.sizes["image"] // PATCH) ** 2

  @property
  def prompt_tokens(self) -> int:
    """The tokens before an answer, those of the image included."""
    return self.patches + PROMPT

  def work(self, answers: int) -> dict[str, float]:
    """Return the work of a step: examples, useful tokens, giga-FLOPs.

    Useful tokens are those of image, prompt and each answer, counted once and
    without padding; FLOPs are those that this many tokens cost (`flops`),
    whatever a variant computes twice.
    """
    count, answer = self.sizes["pairs"], self.sizes["answer"]
    tokens = self.prompt_tokens + answers * answer
    return {
      "pairs" if answers == 2 else "samples": count,
      "useful tokens": count * tokens,
      "GFLOP": count * flops(self.sizes, answers) / 1e9,
    }


def write(
  folder: pathlib.Path, options: Mapping[str, int], *, answers: int
) -> Mapping[str, Mapping[str, float]]:
  """Write model and data and return the work of a step."""
  import torch
  import transformers

  torch.manual_seed(0)
  model = transformers.LlavaForConditionalGeneration(_config(options))
  with torch.no_grad():
    for tensor in model.parameters():
      # Norms of one and biases of zero would hide a transposed or lost one.
      if tensor.ndim == 1:
        tensor.add_(0.02 * torch.randn_like(tensor))
  model.save_pretrained(folder / "toy")
  rng = np.random.default_rng(0)
  count, side = options["pairs"], options["image"]

  def words(length):
    return rng.integers(2, VOCAB - 100, (count, length))

  np.savez(
    folder / "data.npz",
    prompt=words(PROMPT),
    chosen=words(options["answer"]),
    rejected=words(options["answer"]),
    images=rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8),
  )
  (folder / "sizes.json").write_text(json.dumps(dict(options)))
  return {"": read(folder).work(answers)}


def setup(answers: int) -> Callable[..., Mapping[str, Mapping[str, float]]]:
  """Return `write` for a benchmark whose examples have so many answers."""
  return functools.partial(write, answers=answers)


def read(folder: pathlib.Path) -> Toy:
  """Read the files of `write`."""
  sizes = json.loads((folder / "sizes.json").read_text())
  with np.load(folder / "data.npz") as arrays:
    return Toy(folder=folder / "toy", sizes=sizes, **arrays)


def _config(options):
  import transformers

  layers = {"num_hidden_layers": options["layers"]}
  vision = transformers.SiglipVisionConfig(
    image_size=options["image"], **VISION, **layers
  )
  patches = (options["image"] // PATCH) ** 2
  longest = patches + PROMPT + options["answer"]
  text = transformers.Qwen2Config(
    max_position_embeddings=max(512, longest), **TEXT, **layers
  )
  return transformers.LlavaConfig(
    vision_config=vision,
    text_config=text,
    image_token_index=IMAGE_ID,
    image_seq_length=patches,
    # Every block of the tower is used, none computed in vain.
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
    projector_hidden_act="gelu",
    tie_word_embeddings=True,
  )


def flops(sizes: Mapping[str, int], answers: int) -> float:
  """Return the FLOPs of a training step per example, nothing done twice.

  Matrix products and attention of one forward pass, times three for the
  backward pass: the image is encoded once, prompt tokens are computed once for
  all answers, logits are those of the answer tokens.
  """
  layers, answer = sizes["layers"], sizes["answer"]
  patches = (sizes["image"] // PATCH) ** 2
  wide, hidden = VISION["hidden_size"], VISION["intermediate_size"]
  block = 4 * wide**2 + 2 * wide * hidden + 2 * patches * wide
  vision = patches * (3 * PATCH**2 * wide + layers * block)
  width, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
  projector = patches * (wide * width + width**2)
  keys = TEXT["num_key_value_heads"] * TEXT["head_dim"]
  block = 2 * width**2 + 2 * width * keys + 3 * width * inner
  prompt = patches + PROMPT
  tokens = prompt + answers * answer
  # Positions that a token sees, summed over the tokens.
  seen = prompt**2 / 2 + answers * (prompt * answer + answer**2 / 2)
  text = layers * (tokens * block + 2 * seen * width)
  head = answers * answer * width * VOCAB
  return 3 * 2 * (vision + projector + text + head)
