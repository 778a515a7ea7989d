"""The kinds of source that a config can name, and what is no source."""

import json

import pytest

from pivot_jax import checkpoint
from pivot_jax.data import chat, pipeline, registry
from pivot_jax.errors import InputError

TOKENIZER = chat.load_tokenizer(checkpoint.tokenizer_folder("package:toy"))


def test_an_empty_source_is_refused_by_name(tmp_path):
  path = tmp_path / "none.jsonl"
  path.write_text("")
  with pytest.raises(InputError, match=r"none\.jsonl: the data is empty"):
    registry.open_source(dict(kind="preference", path=str(path)))


def test_a_kind_that_is_not_there_is_answered_with_the_kinds():
  with pytest.raises(InputError, match=r"'lava': choose one of .*'llava'"):
    registry.open_source(dict(kind="lava", path="x.json"))


@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_conversations_without_images_keep_their_words(tmp_path, keys):
  roles = ("human", "gpt") if keys[0] == "from" else ("user", "assistant")
  turns = [
    dict(zip(keys, turn)) for turn in zip(roles, ("<image>\nHow many?", "two"))
  ]
  record = dict(id="x", image="nowhere.png", conversations=turns)
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps(record) + "\n")
  found = registry.open_source(dict(kind="llava_text", path=str(path)))
  row = found[0]
  assert row == found.text(0) and row["id"] == "x" and row["image"] is None
  coder = pipeline.Coder(
    tokenizer=TOKENIZER,
    template="qwen_1_5",
    mask="paper",
    pairs=False,
    image_size=48,
  )
  example = pipeline.Stream([(found, 1.0)], coder, seed=0).example(0)
  said = TOKENIZER.decode(example.prompt)
  assert example.image is None and "<image>" not in said
  assert "user\nHow many?" in said
