"""Model sizes and data of the benchmark on a GPU: the same for both sides.

Sizes come from configs/presets.py; with `tiny` they shrink to what a CPU runs
in a moment. Nothing here imports jax or torch.

Q pairs (or samples), P patches of an image.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pivot_jax.configs import presets

VISION, LLM = "siglip2-so400m16-384", "qwen2.5-1.5b"

_TINY_VISION = dict(
  image_size=32,
  hidden_size=48,
  intermediate_size=96,
  num_hidden_layers=3,
  num_attention_heads=2,
)
_TINY_LLM = dict(
  vocab_size=512,
  hidden_size=64,
  intermediate_size=96,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=16,
)
# Large enough that a GPU takes the paths that real sizes take; a CPU computes
# the same numbers in seconds.
_MIDDLE_VISION = dict(
  image_size=128,
  hidden_size=192,
  intermediate_size=768,
  num_hidden_layers=5,
  num_attention_heads=3,
)
_MIDDLE_LLM = dict(
  vocab_size=8192,
  hidden_size=256,
  intermediate_size=1024,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=64,
)
# Of the logarithm of a length, as measured on preference data.
_SIGMA = 0.6


@dataclasses.dataclass(frozen=True)
class Workload:
  """The data of a step: `count` examples of an image and `text` tokens.

  answers: tokens of each answer, two for a pair. ragged: these are medians of a
  log-normal length, else every example has them.
  """

  count: int
  text: int
  answers: tuple[int, ...]
  ragged: bool = False

  def shrunk(self) -> "Workload":
    """Return it with lengths for a CPU."""
    answers = tuple(length // 16 for length in self.answers)
    return dataclasses.replace(self, text=self.text // 16, answers=answers)


# 576 tokens of the image and 91 of text make a prompt of 667.
_PAIR = dict(text=91, answers=(280, 309))
WORKLOADS = {
  "dpo_8": Workload(8, **_PAIR),
  "dpo_16": Workload(16, **_PAIR),
  "dpo_ragged": Workload(8, **_PAIR, ragged=True),
  "sft_16": Workload(16, text=90, answers=(60,)),
}


@dataclasses.dataclass(frozen=True)
class Data:
  """Token ids and images; `vision` and `llm` are fields of the configurations.

  Prompts hold the text alone; the image's tokens come before it. `rejected` is
  empty where there is one answer.
  """

  vision: Mapping[str, Any]
  llm: Mapping[str, Any]
  prompt: list[np.ndarray]
  chosen: list[np.ndarray]
  rejected: list[np.ndarray]
  images: np.ndarray

  @property
  def patches(self) -> int:
    return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

  @property
  def image_id(self) -> int:
    """The token id that stands for a patch where one is needed."""
    return self.llm["vocab_size"] - 1

  @property
  def answers(self) -> tuple[str, ...]:
    return ("chosen", "rejected") if self.rejected else ("chosen",)

  @property
  def reference(self) -> np.ndarray:
    """Log-probabilities that a reference of random weights would about give.

    As if each token were as likely as any: margins are then small and the
    gradients of an ordinary size, which those of a lost pair are not.
    """
    columns = [self.chosen, self.rejected or self.chosen]
    lengths = np.array([[len(x) for x in column] for column in columns]).T
    return -math.log(self.llm["vocab_size"]) * lengths


def data(name: str, *, tiny: bool) -> Data:
  """Return the data of a workload: random, but always equal."""
  work = WORKLOADS[name]
  vision, llm = presets.VISION[VISION], presets.LLM[LLM]
  if tiny:
    work, vision, llm = work.shrunk(), vision | _TINY_VISION, llm | _TINY_LLM
  return _draw(work, vision, llm)


def middle() -> Data:
  """Return ragged pairs for a model that a CPU can follow."""
  work = Workload(8, text=24, answers=(32, 40), ragged=True)
  vision, llm = presets.VISION[VISION], presets.LLM[LLM]
  return _draw(work, vision | _MIDDLE_VISION, llm | _MIDDLE_LLM)


def _draw(
  work: Workload, vision: Mapping[str, Any], llm: Mapping[str, Any]
) -> Data:
  rng = np.random.default_rng(0)

  def words(length):
    scale = np.exp(_SIGMA * rng.standard_normal(work.count))
    lengths = length * scale if work.ragged else np.full(work.count, length)
    # The last ids are left to what is no word.
    return [
      rng.integers(2, llm["vocab_size"] - 100, max(1, int(n))) for n in lengths
    ]

  side = vision["image_size"]
  prompt, *answers = map(words, (work.text, *work.answers))
  return Data(
    vision=vision,
    llm=llm,
    prompt=prompt,
    chosen=answers[0],
    rejected=answers[1] if len(answers) > 1 else [],
    images=rng.integers(0, 256, (work.count, side, side, 3), dtype=np.uint8),
  )
