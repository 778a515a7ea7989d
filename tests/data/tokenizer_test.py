"""Tests the toy tokenizer that is shipped: whole words, and made as said."""

import json
import pathlib
import pickle
import re
import subprocess
import sys

import pytest
import tokenizers

from pivot_jax.data.scenes import descriptions, questions, scenes
from pivot_jax.data.scenes import tokenizer as scene_words
from pivot_jax.data.tokenizer import load_tokenizer

FOLDER = (
  pathlib.Path(scene_words.__file__).parents[2] / "assets" / "toy" / "tokenizer"
)


@pytest.fixture(scope="module")
def shipped():
  return tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def _texts(split, size=300):
  for task in ("caption", "chat", "text", "preference"):
    source = scenes.Scenes(task=task, split=split, size=size, turns=6)
    for row in map(source.text, range(size)):
      for turn in row.get("conversations", ()):
        yield turn["value"].removeprefix("<image>")
      yield from (
        row[k] for k in ("question", "chosen", "rejected") if k in row
      )


def test_texts_of_unseen_scenes_come_back_and_take_one_token_a_word(shipped):
  for text in _texts("val"):
    ids = shipped.encode(text).ids
    assert shipped.decode(ids) == text
    assert len(ids) == len(re.findall(r"\S+|\n", text)), text


@pytest.mark.parametrize("text", ["Überraschung 漢字 🙂", "a  b\t\r\n\n c", ""])
def test_any_text_comes_back(shipped, text):
  assert shipped.decode(shipped.encode(text).ids) == text


def test_each_word_of_the_scenes_is_one_token_after_a_space(shipped):
  words = {
    *descriptions.COLOURS,
    *descriptions.SHAPES,
    *descriptions.TEXTURES,
    *descriptions.SIZES,
  }
  words |= {*descriptions.LEVELS, *descriptions.DIGITS, *descriptions.LETTERS}
  words |= {*questions.FACTS.values(), "top", "middle", "bottom", "left"}
  for word in sorted(words):
    assert len(shipped.encode(f" {word}").ids) == 1, word


def test_answers_of_one_word_are_one_token(shipped):
  answers = {
    *descriptions.COLOURS,
    *descriptions.TEXTURES,
    *descriptions.DIGITS,
    "yes",
    "no",
  }
  answers |= {
    *descriptions.LETTERS,
    *questions.COUNTS,
    "left",
    "above",
    "small",
  }
  for answer in sorted(answers):
    assert len(shipped.encode(answer).ids) == 1, answer


def test_a_newline_and_each_special_token_are_one_token(shipped):
  assert len(shipped.encode("\n").ids) == 1
  for i, token in enumerate(scene_words.SPECIAL_TOKENS):
    assert shipped.encode(token).ids == [i]
  assert shipped.get_vocab_size() == scene_words.VOCAB_SIZE


def test_it_loads_as_any_other_tokenizer(shipped):
  loaded = load_tokenizer(FOLDER)
  text = "what colour is the circle ?\nred"
  assert list(loaded.encode(text)) == shipped.encode(text).ids
  assert loaded.vocab_size == 512


def test_the_stated_command_makes_the_shipped_files(tmp_path):
  out = tmp_path / "tokenizer"
  subprocess.run(
    [sys.executable, "-m", "pivot_jax.data.scenes.tokenizer", f"--out={out}"],
    check=True,
    timeout=60,
  )
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (out / name).read_bytes() == (FOLDER / name).read_bytes()
  made = json.loads((FOLDER / "made.json").read_text())
  assert made["versions"].keys() == {"tokenizers"}


def test_another_process_encodes_special_tokens_as_text_too():
  tokenizer = load_tokenizer(FOLDER)
  again = pickle.loads(pickle.dumps(tokenizer))
  text = "a <|im_end|> <image> b"
  assert again.encode(text) == tokenizer.encode(text)
  assert tokenizer.im_end not in again.encode(text)


def test_a_printed_tokenizer_says_which_it_is_and_no_word_of_it():
  tokenizer = load_tokenizer(FOLDER)
  said = repr(tokenizer)
  assert said == str(tokenizer) and len(said) < 60
  assert str(tokenizer.vocab_size) in said
  assert tokenizer.fingerprint[:12] in said
  assert "triangle" not in said
