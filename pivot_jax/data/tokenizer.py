"""A tokenizer folder with ChatML tokens, read without trusting the text.

Special tokens inside a text are plain text to `Tokenizer.encode`, so no row of
a data set can end a turn or start another. Templates are not known here: those
are in `chat.py`. Nothing is downloaded.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import tokenizers

from pivot_jax import files
from pivot_jax.errors import InputError

IMAGE = "<image>"
IMAGE_TOKEN = -200  # Stands for all features of one image (paper.md 1.6).
_IM_START, _IM_END, _END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIALS = (_IM_START, _IM_END, _END_OF_TEXT)
_SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A tokenizer with ChatML tokens; made by `load_tokenizer`.

  `vocab_size` counts the added tokens; a model may have more embedding rows.
  `eos_ids` are the tokens that end a generated answer.
  """

  backend: tokenizers.Tokenizer
  config: str  # tokenizer_config.json as text, written back by `save`.
  vocab_size: int
  im_start: int
  im_end: int
  end_of_text: int
  newline: int

  def __repr__(self) -> str:
    # The backend's own would print the whole vocabulary.
    return f"Tokenizer({self.vocab_size} ids, {self.fingerprint[:12]})"

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    # The library does not keep it, and special tokens in texts would act.
    self.backend.encode_special_tokens = True

  @property
  def eos_ids(self) -> tuple[int, int]:
    return (self.im_end, self.end_of_text)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the tokenizer's rules, whatever files they came from."""
    rules = json.loads(self.backend.to_str())
    text = json.dumps(rules, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def encode(self, text: str, allow_special: bool = False) -> list[int]:
    """Return the ids of `text`; ChatML tokens are text unless allowed."""
    if not allow_special:
      return encode(self, text)[0].tolist()
    ids = []
    for piece in _SPLIT.split(text):
      ids += [self.special(piece)] if piece in SPECIALS else self.encode(piece)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """Return the text of `ids`, special tokens and `<image>` spelled out."""
    text, run = "", []
    for token in map(int, ids):
      if token == IMAGE_TOKEN:
        text, run = text + self._decode(run) + IMAGE, []
      else:
        run.append(token)
    return text + self._decode(run)

  def special(self, name: str) -> int:
    """Return the id of one of the three special tokens."""
    ids = (self.im_start, self.im_end, self.end_of_text)
    return ids[SPECIALS.index(name)]

  def check_vocabulary(self, size: int, where: str) -> None:
    """Raise InputError if it has ids beyond a model's `size` embeddings."""
    if self.vocab_size > size:
      raise InputError(
        f"{where}: the tokenizer has {self.vocab_size} tokens, the language model"
        f" only {size}: give the tokenizer that belongs to it"
      )

  def save(self, folder: str | os.PathLike) -> None:
    """Write a folder that `load_tokenizer` and transformers can read."""
    folder = pathlib.Path(folder)
    files.make_folder(folder)
    files.write_text(folder / "tokenizer.json", self.backend.to_str())
    files.write_text(folder / "tokenizer_config.json", self.config)

  def _decode(self, ids: list[int]) -> str:
    return self.backend.decode(ids, skip_special_tokens=False)


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
  """Read a local tokenizer folder, with transformers if it must be converted.

  A folder with `tokenizer.json` needs no transformers; one with the older
  `vocab.json` and `merges.txt` does. Nothing is ever downloaded.

  Raises:
    InputError: no such folder, unreadable files, or no ChatML tokens in it.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise InputError(f"{folder}: no such tokenizer folder")
  has_json = (folder / "tokenizer.json").is_file()
  backend = _read_json(folder) if has_json else _convert(folder)
  backend.no_truncation()
  backend.no_padding()
  # Special tokens in user text must not act as special tokens.
  backend.encode_special_tokens = True
  vocab = backend.get_vocab(with_added_tokens=True)
  missing = [name for name in SPECIALS if name not in vocab]
  if missing:
    raise InputError(
      f"{folder}: the tokenizer lacks {', '.join(missing)};"
      " use the one of a ChatML model such as Qwen2.5"
    )
  newline = backend.encode("\n", add_special_tokens=False).ids
  if len(newline) != 1:
    raise InputError(f"{folder}: a newline must be one token, not {newline}")
  config = folder / "tokenizer_config.json"
  return Tokenizer(
    backend=backend,
    config=config.read_text("utf-8") if config.is_file() else _CONFIG,
    vocab_size=len(vocab),
    im_start=vocab[_IM_START],
    im_end=vocab[_IM_END],
    end_of_text=vocab[_END_OF_TEXT],
    newline=newline[0],
  )


@functools.lru_cache(maxsize=2**14)
def encode(tokenizer: Tokenizer, text: str):
  """Return ids, and where in `text` each token ends; both read-only."""
  encoding = tokenizer.backend.encode(text, add_special_tokens=False)
  ids = np.asarray(encoding.ids, np.int32)
  ends = np.asarray([end for _, end in encoding.offsets], np.int32)
  ids.flags.writeable = ends.flags.writeable = False
  return ids, ends


# The minimal config of a folder that came without one.
_CONFIG = json.dumps(
  {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": _IM_END,
    "pad_token": _END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
  }
)


def _read_json(folder: pathlib.Path) -> tokenizers.Tokenizer:
  path = folder / "tokenizer.json"
  try:
    text = path.read_text("utf-8")
    rules = json.loads(text)
  except ValueError as error:
    raise InputError(f"{path}: not valid JSON: {error}") from None
  if not isinstance(rules, dict) or "model" not in rules:
    raise InputError(f"{path}: not a tokenizer of the tokenizers library")
  try:
    return tokenizers.Tokenizer.from_str(text)
  # The library raises nothing more special.
  except Exception as error:  # noqa: BLE001
    raise InputError(f"{path}: not a tokenizer: {error}") from None


def _convert(folder: pathlib.Path) -> tokenizers.Tokenizer:
  # Imported here: it takes seconds, and only this kind of folder needs it. The
  # advisory is about models without torch, of which there are none here.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  try:
    loaded = transformers.AutoTokenizer.from_pretrained(
      folder, local_files_only=True, trust_remote_code=False
    )
  except (OSError, ValueError) as error:
    raise InputError(
      f"{folder}: holds no tokenizer (tokenizer.json, or vocab.json and"
      " merges.txt); put the one of the language model there"
    ) from error
  # A copy, since the loaded one would share the settings made here.
  return tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
