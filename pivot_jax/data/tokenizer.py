"""A tokenizer folder with ChatML tokens, read without trusting the text.

Special tokens inside a text are plain text to `Tokenizer.encode`, so no row of
a data set can end a turn or start another; a tokenizer by whose rules a text
gives one all the same is refused. Templates are not known here: those are in
`chat.py`. Nothing is downloaded.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tokenizers

from pivot_jax import files, texts
from pivot_jax.errors import InputError

IMAGE = "<image>"
IMAGE_TOKEN = -200  # Stands for all features of one image (paper.md 1.6).
_IM_START, _IM_END, _END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIALS = (_IM_START, _IM_END, _END_OF_TEXT)
_LARGEST_ID = 2**31 - 1  # of int32
_SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A tokenizer with ChatML tokens; made by `load_tokenizer`.

  `vocab_size` is the largest id + 1; a model may have more embedding rows.
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
  def acting(self) -> frozenset[int]:
    """The ids that no text may give."""
    return frozenset((self.im_start, self.im_end, self.end_of_text))

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
        f"{where}: the tokenizer has ids below {self.vocab_size}, the language model"
        f" only {size}: give the tokenizer that belongs to it"
      )

  def save(self, folder: str | os.PathLike) -> None:
    """Write a folder that `load_tokenizer` and transformers can read."""
    folder = pathlib.Path(folder)
    files.make_folder(folder)
    files.write_text(folder / "tokenizer.json", self.backend.to_str())
    files.write_text(folder / "tokenizer_config.json", self.config)

  def _decode(self, ids: list[int]) -> str:
    with _no_panic(str(ids)):
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
  tokenizer = Tokenizer(
    backend=backend,
    config=_config(folder),
    vocab_size=max(vocab.values()) + 1,
    im_start=vocab[_IM_START],
    im_end=vocab[_IM_END],
    end_of_text=vocab[_END_OF_TEXT],
    newline=-1,
  )
  if tokenizer.vocab_size > _LARGEST_ID:
    raise InputError(f"{folder}: an id is beyond int32; use another tokenizer")
  try:
    for name in SPECIALS:
      encode(tokenizer, name)
    newline = tokenizer.encode("\n")
  except InputError as error:
    raise InputError(f"{folder}: {error}") from error
  if len(newline) != 1:
    raise InputError(f"{folder}: a newline must be one token, not {newline}")
  return dataclasses.replace(tokenizer, newline=newline[0])


@functools.lru_cache(maxsize=2**14)
def encode(tokenizer: Tokenizer, text: str):
  """Return ids, and where in `text` each token ends; both read-only.

  Raises:
    InputError: the text gives a ChatML token by the tokenizer's own rules, or
      these rules cannot be carried out on it.
  """
  with _no_panic(text):
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
  found = encoding.ids
  if not tokenizer.acting.isdisjoint(found):
    raise InputError(
      f"the tokenizer makes a ChatML token of the text {_quoted(text)}; give its"
      ' added tokens "special": true in tokenizer.json'
    )
  ids = np.asarray(found, np.int32)
  ends = np.asarray([end for _, end in encoding.offsets], np.int32)
  ids.flags.writeable = ends.flags.writeable = False
  return ids, ends


@contextlib.contextmanager
def _no_panic(text: str) -> Iterator[None]:
  """Raise InputError where the library panics, as on a runaway expression."""
  try:
    yield
  except BaseException as error:
    # Its class cannot be imported, and is no Exception.
    if type(error).__name__ != "PanicException":
      raise
    raise InputError(
      f"the tokenizer's rules cannot be carried out on {_quoted(text)} ({error})"
    ) from error


def _quoted(text: str) -> str:
  return texts.shown(repr(text), longest=100)


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
  if "model" not in files.read_object(path):
    raise InputError(f"{path}: not a tokenizer of the tokenizers library")
  try:
    with _no_panic(path.name):
      return tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
  # The library raises nothing more special.
  except Exception as error:  # noqa: BLE001
    raise InputError(f"{path}: not a tokenizer: {error}") from None


def _config(folder: pathlib.Path) -> str:
  path = folder / "tokenizer_config.json"
  if not path.exists():
    return _CONFIG
  try:
    return files.read_bytes(path, largest=files.LARGEST_JSON).decode("utf-8")
  except UnicodeDecodeError as error:
    raise InputError(f"{path}: not readable as UTF-8 ({error})") from error


def _convert(folder: pathlib.Path) -> tokenizers.Tokenizer:
  # Imported here: it takes seconds, and only this kind of folder needs it. The
  # advisory is about models without torch, of which there are none here.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  try:
    loaded = transformers.AutoTokenizer.from_pretrained(
      folder, local_files_only=True, trust_remote_code=False
    )
    # A copy, since the loaded one would share the settings made here.
    return tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
  # It raises whatever the fields of its files lead to.
  except Exception as error:
    raise InputError(
      f"{folder}: holds no tokenizer (tokenizer.json, or vocab.json and"
      " merges.txt); put the one of the language model there"
    ) from error
