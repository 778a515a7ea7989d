"""Chat with several images, and in Qwen2.5's own template."""

import numpy as np
import pytest

from pivot_jax import addresses
from pivot_jax.data import chat
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError

IMAGE = chat.IMAGE_TOKEN
CHAT = dict(template="qwen_1_5", mask="paper")


@pytest.fixture(scope="module")
def tiny() -> chat.Tokenizer:
  return load_tokenizer(addresses.tokenizer_folder("package:toy"))


def _turns(*texts):
  roles = ("human", "gpt")
  return [{"from": roles[i % 2], "value": x} for i, x in enumerate(texts)]


# --- several images ----------------------------------------------------------


def _places(tokenizer, ids):
  return tokenizer.decode(ids).replace("<|im_start|>", "|")


def test_several_images_stay_where_their_tags_are(tiny):
  turns = _turns("a <image> b <image> c", "yes", "and <image> ?", "no")
  encoded = chat.encode_conversation(tiny, turns, images=3, **CHAT)
  said = _places(tiny, encoded.prompt)
  assert "|user\na <image> b <image> c<|im_end|>" in said
  # A turn's only tag moves to its front; here it lies in the branch.
  assert "|user\n<image>\nand  ?<|im_end|>" in _places(tiny, encoded.answers[0])
  tags = [int((x == IMAGE).sum()) for x in (encoded.prompt, *encoded.answers)]
  assert tags == [2, 1]
  assert not encoded.answer_targets[0][encoded.answers[0] == IMAGE].any()


def test_a_question_of_a_pair_keeps_several_tags(tiny):
  pair = chat.encode_pair(
    tiny, " <image> or <image>?\n", "first", "second", images=2, **CHAT
  )
  assert "|user\n<image> or <image>?<|im_end|>" in _places(tiny, pair.prompt)
  prompt = chat.encode_prompt(tiny, "<image> or <image>?", images=2)
  assert "|user\n<image> or <image>?<|im_end|>" in _places(tiny, prompt.prompt)


@pytest.mark.parametrize("text, images, have", [
  ("q", 2, "0 <image> but the row has 2 images"),
  ("<image> q", 2, "1 <image> but the row has 2 images"),
  ("<image><image><image>", 2, "3 <image> but the row has 2 images"),
])  # fmt: skip
def test_tags_of_several_images_must_be_as_many(tiny, text, images, have):
  with pytest.raises(InputError, match=have):
    chat.encode_conversation(tiny, _turns(text, "a"), images=images, **CHAT)
  with pytest.raises(InputError, match=have):
    chat.encode_prompt(tiny, text, images=images)
  plain = dict(template="plain", mask="paper")
  with pytest.raises(InputError):
    chat.encode_conversation(tiny, _turns(text, "a"), images=images, **plain)


# --- Qwen2.5's own template --------------------------------------------------


def test_qwen2_5_is_what_its_tokenizer_writes(tiny):
  """The published template's text for a question and answer without tools."""
  turns = _turns("hello", "hi")
  style = dict(template="qwen2_5", mask="answer", images=0)
  encoded = chat.encode_conversation(tiny, turns, **style)
  wanted = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful"
    " assistant.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    "<|im_start|>assistant\nhi<|im_end|>\n"
  )
  said = tiny.decode([*encoded.prompt, *encoded.answers[0]])
  assert said == wanted
  prompt = chat.encode_prompt(tiny, "hello", images=0, template="qwen2_5")
  assert tiny.decode(prompt.prompt) == wanted[: wanted.index("hi<|im_end|>")]
  pair = chat.encode_pair(tiny, "hello", "hi", "ho", **style)
  np.testing.assert_array_equal(pair.prompt, encoded.prompt)


def test_what_was_trained_on_captions_is_asked_in_chatml(tiny):
  asked = [
    chat.encode_prompt(tiny, "q", template=template).prompt
    for template in ("plain", "qwen_1_5")
  ]
  np.testing.assert_array_equal(*asked)
