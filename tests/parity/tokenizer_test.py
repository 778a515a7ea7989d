"""Exported folders give AutoTokenizer the tokens that a model was trained on."""

import pathlib

import pytest

from pivot_jax import addresses
from pivot_jax.data import chat
from pivot_jax.data.tokenizer import load_tokenizer
from tests.parity import transformers_4_57 as tiny


def exported(
  root: pathlib.Path, tokenizer: chat.Tokenizer, form: str
) -> tuple[pathlib.Path, dict[str, list]]:
  """Return a folder with a tokenizer, and the tokens it has to give."""
  size = -(-tokenizer.vocab_size // 512) * 512
  sizes = dict(vocab_size=size, hidden_size=16, num_attention_heads=2)
  model = (
    tiny.language_model(size)
    if form == "hf"
    else tiny.multimodal("siglip", tied=True, **sizes)
  )
  out = root / "out"
  source = root / "source"
  return out, tiny.export_tokenizer(model, tokenizer, source, out, form)


def test_there_are_200_texts_and_no_two_alike():
  assert len(tiny.texts()) == len(set(tiny.texts())) == 200


@pytest.mark.parametrize(
  "form", ["hf", pytest.param("llava", marks=pytest.mark.nightly)]
)
def test_the_exported_tokenizer_is_the_one_of_the_training(tmp_path, form):
  toy = load_tokenizer(addresses.tokenizer_folder("package:toy"))
  out, expected = exported(tmp_path, toy, form)
  assert tiny.same_tokens(out, expected) == 200
  for trust in (False, True):
    assert tiny.same_tokens(out, expected, trust_remote_code=trust) == 200


@pytest.mark.parametrize("form", ["hf", "llava"])
def test_the_exported_tokenizer_of_qwen2_is_its_own(tmp_path, test_data, form):
  qwen = load_tokenizer(test_data / "tokenizer_qwen2")
  out, expected = exported(tmp_path, qwen, form)
  assert tiny.same_tokens(out, expected) == 200
