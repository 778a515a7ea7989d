"""Makes the tokenizer of the toy model: byte-level BPE over the scenes' words.

    python -m pivot_jax.data.scenes.tokenizer --out=pivot_jax/assets/toy/tokenizer

Not for published models, which bring their own. The result loads with
transformers' AutoTokenizer. It has 512 entries: 3 special tokens as in Qwen2's
chat format, 256 bytes, and as many merges as it takes for each word of the
scenes, with its leading space or at the start of a line, to be one token.
"""

import argparse
import pathlib
import shlex
import time
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from pivot_jax import files
from pivot_jax.data.scenes import scenes
from pivot_jax.errors import InputError

SEED = 0
ROWS = 2000  # of each task whose text is read
VOCAB_SIZE = 512
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
TEMPLATE_WORDS = ("system", "user", "assistant", "You are a helpful assistant.")


def texts() -> Iterator[str]:
  """Yield what the tokenizer is trained on: every turn, and the template."""
  for task in ("chat", "text"):
    source = scenes.Scenes(
      task=task, seed=SEED, split="tokenizer", size=ROWS, turns=6
    )
    for row in source:
      for turn in row["conversations"]:
        yield turn["value"].removeprefix("<image>")
      yield from TEMPLATE_WORDS


def train() -> tokenizers.Tokenizer:
  """Return the trained tokenizer; the same texts give the same merges."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=VOCAB_SIZE,
    special_tokens=list(SPECIAL_TOKENS),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts(), trainer)
  return tokenizer


def write(tokenizer: tokenizers.Tokenizer, out: pathlib.Path) -> None:
  """Write the folder that AutoTokenizer reads."""
  out.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(out / "tokenizer.json"))
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 2048,
  }
  files.write_json(out / "tokenizer_config.json", settings, sort_keys=False)


def main() -> None:
  parser = argparse.ArgumentParser(description="Trains the toy tokenizer.")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  arguments = parser.parse_args()
  try:
    files.local_path(arguments.out, "--out")
  except InputError as error:
    parser.error(str(error))
  start = time.perf_counter()
  write(train(), arguments.out)
  made = {
    "command": shlex.join(
      ("python", "-m", __spec__.name, f"--out={arguments.out.as_posix()}")
    ),
    "seed": SEED,
    "versions": {"tokenizers": tokenizers.__version__},
    "seconds": round(time.perf_counter() - start, 1),
  }
  files.write_json(arguments.out / "made.json", made, sort_keys=False)


if __name__ == "__main__":
  main()
