"""Prompts for generation: one a row, counted and shown with its picture."""

import numpy as np

from pivot_jax.data import chat, feed
from tests.data.feed_test import PATCHES, TOKENIZER, coder, source


def test_a_prompt_stands_alone_in_its_row_with_its_picture():
  found = source("eval")
  longest = feed.longest_prompt(found, coder(), PATCHES)
  batch = feed.prompts(found, [5, 2], coder(), tokens=longest, patches=PATCHES)
  for row, index in enumerate((5, 2)):
    encoded = chat.encode_prompt(TOKENIZER, found[index]["question"])
    count = len(encoded.prompt) + PATCHES - 1
    assert (batch.segments[row] == (np.arange(longest) < count)).all()
    image = batch.image_index[row] >= 0
    assert image.sum() == PATCHES
    text = batch.tokens[row][(batch.segments[row] > 0) & ~image]
    said = TOKENIZER.decode(text)
    assert found[index]["question"] in said
    assert said.endswith("<|im_start|>assistant\n")
    np.testing.assert_array_equal(batch.images[row, 0], found[index]["image"])


def test_the_longest_prompt_is_counted_with_its_picture():
  found = source("eval")
  counts = [
    len(chat.encode_prompt(TOKENIZER, found[i]["question"]).prompt)
    for i in range(len(found))
  ]
  longest = feed.longest_prompt(found, coder(), PATCHES)
  assert longest == max(counts) + PATCHES - 1 and len(set(counts)) > 1
