"""SFT and DPO read a preference row as one prompt and one chosen answer."""

import numpy as np
import pytest

from pivot_jax import addresses, sharding
from pivot_jax.data import feed
from pivot_jax.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(addresses.tokenizer_folder("package:toy"))
PATCHES = 36


def coder(*, pairs, mask="paper"):
  return feed.Coder(
    tokenizer=TOKENIZER,
    template="qwen_1_5",
    mask=mask,
    pairs=pairs,
    image_size=48,
    patches=PATCHES,
  )


@pytest.mark.parametrize("mask", ["paper", "answer"])
@pytest.mark.parametrize("asked", [
  "what ?", "<image>\nwhat ?", "<image> what ?", "<image>what ?",
  "<image>\n\nwhat ?", "what ?<image>", " what ?\n",
  "QA_GT_caption_based_noisy what ?",
])  # fmt: skip
def test_both_objectives_read_one_prompt_and_answer_off_a_pair(asked, mask):
  row = dict(image=True, question=asked, chosen="three", rejected="four")
  sft, dpo = (coder(pairs=pairs, mask=mask).encode(row) for pairs in (0, 1))
  np.testing.assert_array_equal(sft.prompt, dpo.prompt)
  assert len(sft.answers) == 1 and len(dpo.answers) == 2
  np.testing.assert_array_equal(sft.answers[0], dpo.answers[0])
  np.testing.assert_array_equal(sft.answer_targets[0], dpo.answer_targets[0])
  # What DPO leaves out cancels between its answers; SFT learns it (paper 3.2).
  assert sft.prompt_targets.any() == (mask == "paper")
  assert not dpo.prompt_targets.any()


def test_the_digest_of_an_update_tells_texts_apart_and_not_objectives():
  def digest(chosen="three", pairs=False):
    row = dict(id="a", image=None, question="q", chosen=chosen, rejected="x")
    rows = _Rows([row])
    found = feed.Stream([(rows, 1.0)], coder(pairs=pairs), seed=0)
    pack = dict(tokens=64, losses=64, images=0)
    made = feed.choose_layout(
      found, coder(pairs=pairs), pack=pack, batch=1, steps=1, shards=1,
    )  # fmt: skip
    one = sharding.make_mesh({"tensor": -1})
    stream = feed.updates(found, made, batch=1, start=0, mesh=one, sft_group=2)
    return feed.digest([next(stream).seen])

  assert digest() == digest(pairs=True) != digest(chosen="four")


class _Rows(list):
  """Rows in memory, as a source."""

  def text(self, index):
    return self[index]

  def name(self, index):
    return f"row {index}"
