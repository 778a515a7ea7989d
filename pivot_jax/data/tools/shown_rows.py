"""A row as the model sees it: its pictures, its tokens, and which are learnt.

The tokens are those that training encodes, by the same code; this file only
gives each of them the text it stands for. A row that cannot be read or encoded
keeps what of it can be shown, with the error. `show.py` draws it on a
terminal, `shown_page.py` on a page.
"""

import dataclasses
import itertools
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from tokenizers import decoders

from pivot_jax.data import chat, coders, rows
from pivot_jax.data.sources import records
from pivot_jax.data.tokenizer import IMAGE, IMAGE_TOKEN, SPECIALS, Tokenizer
from pivot_jax.errors import InputError
from pivot_jax.report import charts

NEWLINE = "↵"  # Drawn where a text has a newline.


@dataclasses.dataclass(frozen=True)
class Style:
  """The settings by which rows are encoded.

  objective: whose answers are shown; None shows those that a row has.
  image_tokens: features of one image, for counts only.
  """

  tokenizer: Tokenizer
  template: str = "qwen_1_5"
  mask: str = "paper"
  objective: str | None = None
  image_tokens: int = 576


class Token(NamedTuple):
  """The text of the ids at `at` and after in a part, in whole characters.

  It is one token, or as many as a character takes that no single one spells.
  The text of an image is its mark, as "[image: 576 tokens]". `special` tokens
  are the template's own, never text of the row.
  """

  text: str
  ids: tuple[int, ...]
  at: int
  target: bool
  special: bool = False


class Part(NamedTuple):
  """A prompt or an answer; `length` counts images by their features."""

  title: str
  tokens: tuple[Token, ...]
  length: int
  targets: int
  images: int


class Picture(NamedTuple):
  caption: str
  pixels: UInt8[np.ndarray, "H W 3"]


class Shown(NamedTuple):
  """A row taken apart for showing; `fields` are texts that are no tokens."""

  name: str
  id: str
  pictures: tuple[Picture, ...]
  parts: tuple[Part, ...]
  fields: tuple[tuple[str, str], ...]
  errors: tuple[str, ...]

  @property
  def length(self) -> int:
    """Tokens of the row, its images as features."""
    return sum(part.length for part in self.parts)

  @property
  def size(self) -> str:
    """The size of the row in words."""
    images = sum(part.images for part in self.parts)
    plural = "" if images == 1 else "s"
    return f"{self.length} tokens with {images} image{plural}"


def look(source: rows.Source, index: int, style: Style) -> Shown:
  """Return row `index` of a source as it is encoded; errors are part of it."""
  name = source.name(index)
  errors: list[str] = []
  written = _try(lambda: source.text(index), name, errors)
  if written is None:
    return Shown(name, "", (), (), (), tuple(errors))
  read = _try(lambda: source[index], name, errors)
  row = written if read is None else read
  parts = _try(lambda: _parts(row, style), name, errors)
  fields = _texts(row) if parts is None else _fields(row, parts)
  return Shown(
    name,
    str(row["id"]),
    _pictures(row, written),
    parts or (),
    tuple(fields),
    tuple(errors),
  )


def read_tokens(
  tokenizer: Tokenizer,
  ids: np.ndarray,
  targets: np.ndarray,
  images: Iterator[str],
) -> tuple[Token, ...]:
  """Return the tokens of ids [n], in order; `targets` bool [n] are learnt.

  `images` gives the text of each image token that is met.
  """
  special = {tokenizer.special(name): name for name in SPECIALS}
  special[IMAGE_TOKEN] = IMAGE

  def kind(at: int) -> tuple[str | None, bool]:
    return special.get(int(ids[at])), bool(targets[at])

  found: list[Token] = []
  for (name, target), run in itertools.groupby(range(len(ids)), kind):
    if name is None:
      found += _words(tokenizer, ids, list(run), target)
      continue
    for at in run:
      text = next(images) if name == IMAGE else name
      found.append(Token(text, (int(ids[at]),), at, target, True))
  return tuple(found)


def visible(text: str) -> str:
  """Return text in which no character is unseen or acts on a terminal.

  Newlines stay, with a mark before them; other control, format and unassigned
  characters are escaped as in Python.
  """
  return "".join(map(_visible, text))


def one_line(text: str) -> str:
  """Return `visible` text without its line breaks."""
  return visible(text).replace("\n", "")


def width(character: str) -> int:
  """Return the columns a terminal gives a character."""
  if unicodedata.category(character) in ("Mn", "Me"):
    return 0
  return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _visible(character: str) -> str:
  if character == "\n":
    return f"{NEWLINE}\n"
  if character.isprintable():
    return character
  return character.encode("unicode_escape").decode("ascii")


def _try(read: Callable[[], Any], name: str, errors: list[str]) -> Any:
  """Return the result of `read`, or None and add why, without the row's name."""
  try:
    return read()
  except InputError as error:
    message = str(error).removeprefix(f"{name}: ")
    if message not in errors:
      errors.append(message)
    return None


def _parts(row: rows.Row, style: Style) -> tuple[Part, ...]:
  """Return a row's prompt and answers; nothing of a row without any text."""
  if "label" in row or "labels" in row:
    return ()
  encoded, titles = _encode(row, style)
  sequences = [
    (encoded.prompt, encoded.prompt_targets),
    *zip(encoded.answers, encoded.answer_targets),
  ]
  count = sum(int((ids == IMAGE_TOKEN).sum()) for ids, _ in sequences)
  images = iter(
    f"[image{f' {i + 1}' if count > 1 else ''}: {style.image_tokens} tokens]"
    for i in range(count)
  )
  return tuple(
    _part(title, ids, targets, style, images)
    for title, (ids, targets) in zip(titles, sequences, strict=True)
  )


def _encode(
  row: rows.Row, style: Style
) -> tuple[chat.Encoded, tuple[str, ...]]:
  """Return the tokens of a row, and the names of prompt and answers."""
  if "answer" in row:
    prompt = chat.encode_prompt(
      style.tokenizer, row["question"], images=len(records.listed(row["image"]))
    )
    return prompt, ("prompt",)
  pairs = "chosen" in row
  if style.objective is not None:
    # Only here: objectives load jax, which takes seconds.
    from pivot_jax.training import objectives

    pairs = objectives.named(style.objective).pairs
  coder = coders.Coder(
    tokenizer=style.tokenizer,
    template=style.template,
    mask=style.mask,
    pairs=pairs,
    image_size=0,  # Pixels are shown as the file has them.
  )
  encoded = coder.encode(row)
  return encoded, ("prompt", *_titles(row, encoded, style.tokenizer, pairs))


def _titles(row, encoded: chat.Encoded, tokenizer, pairs: bool) -> list[str]:
  """Return the names of a row's answers."""
  if "chosen" not in row:
    turns = int((encoded.answers[0] == tokenizer.im_start).sum())
    return ["answer" if turns < 2 else "answers"]
  names = ("chosen", "rejected") if pairs else ("chosen",)
  count = len(encoded.answers) // len(names)
  return [
    f"{name} {k + 1}" if count > 1 else name
    for k in range(count)
    for name in names
  ]


def _part(title, ids, targets, style: Style, images: Iterator[str]) -> Part:
  count = int((ids == IMAGE_TOKEN).sum())
  return Part(
    title,
    read_tokens(style.tokenizer, ids, targets, images),
    len(ids) + count * (style.image_tokens - 1),
    int(targets.sum()),
    count,
  )


def _words(tokenizer, ids, run: Sequence[int], target: bool) -> list[Token]:
  """Return plain tokens; those that spell one character together are one."""
  stream = decoders.DecodeStream(skip_special_tokens=False)
  found: list[Token] = []
  waiting: list[int] = []
  for at in run:
    waiting.append(int(ids[at]))
    text = stream.step(tokenizer.backend, waiting[-1])
    if text is not None:
      first = at + 1 - len(waiting)
      found.append(Token(text, tuple(waiting), first, target))
      waiting = []
  if waiting:
    text = tokenizer.decode(waiting)
    first = run[-1] + 1 - len(waiting)
    found.append(Token(text, tuple(waiting), first, target))
  return found


def _fields(
  row: Mapping[str, Any], parts: Sequence[Part]
) -> list[tuple[str, str]]:
  """Return the fields of a row beside its tokens."""
  fields = [
    (name, str(row[name]))
    for name in ("answer", "category", "kind", "label")
    if name in row
  ]
  if "rejected" in row and "rejected" not in parts[-1].title:
    fields += [
      ("rejected, not read by sft", text)
      for text in records.listed(row["rejected"])
    ]
  if isinstance(row.get("labels"), np.ndarray):
    fields.append(("labels", _shares(row["labels"])))
  return fields


def _shares(labels: np.ndarray) -> str:
  found, counts = np.unique(labels, return_counts=True)
  return ", ".join(
    f"{label}: {100 * count / labels.size:.1f} %"
    for label, count in zip(found, counts)
  )


def _texts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Return the texts of a row that cannot be encoded, as they are."""
  found = [
    (name, str(text))
    for name in ("question", "chosen", "rejected", "answer")
    for text in records.listed(row.get(name))
  ]
  for turn in row.get("conversations", ()):
    role = turn.get("from", turn.get("role"))
    content = turn.get("value", turn.get("content"))
    found.append((str(role), str(content)))
  return found


def _pictures(
  row: Mapping[str, Any], written: Mapping[str, Any]
) -> tuple[Picture, ...]:
  """Return the decoded images, each under its file where it has one."""
  files, images = records.listed(written["image"]), records.listed(row["image"])
  found = [
    _picture(file, image, f"image {i}" if len(images) > 1 else "image")
    for i, (file, image) in enumerate(zip(files, images), 1)
    if isinstance(image, np.ndarray)
  ]
  if isinstance(row.get("labels"), np.ndarray):
    found.append(_map(row["labels"]))
  return tuple(found)


def _map(labels: np.ndarray) -> Picture:
  """Return a label map in colours; each label has its own."""
  colours = charts.class_colours(max(1, int(labels.max()) + 1))
  caption = f"label map {labels.shape[1]}x{labels.shape[0]}"
  return Picture(caption, charts.class_map(labels, colours))


def _picture(file: Any, image: np.ndarray, title: str) -> Picture:
  where = f" {file}" if isinstance(file, str) else ""
  return Picture(f"{title}{where} {image.shape[1]}x{image.shape[0]}", image)
