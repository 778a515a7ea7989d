"""Rows -> examples: tokens, targets, pixels of the right size, and the limit.

The one path from a row to what is learnt: training, scoring, measuring and
showing data all take it. It opens no file and knows no order.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pivot_jax.data import chat, framing, images, packing, rows
from pivot_jax.data.sources import records
from pivot_jax.errors import InputError

# Of each pair by its id: log-probabilities of its answers, CRC of its tokens.
Reference = Mapping[str, tuple[tuple[float, float], str]]

LONG = ("error", "drop", "truncate_answer")


class TooLongError(InputError):
  """A row over the limit."""


@dataclasses.dataclass(frozen=True)
class Coder:
  """The way from a row to an example.

  pairs: chosen and rejected are two branches; otherwise a preference row is a
    conversation that ends in its chosen answer. A row with lists of chosen and
    rejected answers has a branch for each.
  patches: tokens of an image.
  max_length: tokens that a prompt with its images and one answer may have; 0:
    any number.
  framed: images come at the size that the encoder reads.
  long: what becomes of a row over it. With "error" and "drop" it raises
    TooLongError; with "truncate_answer" its answers lose what is over the limit
    (the end of the turn is then no target), its prompt and images never do.
  """

  tokenizer: chat.Tokenizer
  template: str
  mask: str
  pairs: bool
  image_size: int
  resample: str = "bicubic"
  patches: int = 1
  max_length: int = 0
  long: str = "error"
  framed: bool = False

  def encode(self, row: rows.Row) -> chat.Encoded:
    """Return the tokens of a row; raise InputError without its name."""
    return self._learnt(self._encode(row), row)

  def example(self, row: rows.Row, *, pixels: bool = True) -> packing.Example:
    """Return a row as an example; without pixels, stand-ins of one pixel.

    Both answers of a pair are held to the limit, also where only the chosen one
    is learnt: SFT and DPO skip, or cut, the same rows.

    Raises:
      TooLongError: it is over the limit.
      InputError: a field that cannot be used.
    """
    encoded = self._encode(row)
    if self.max_length:
      encoded = self._fit(encoded, row)
    return packing.Example(
      id=row["id"],
      images=self.pixels(row["image"]) if pixels else blank(row),
      paired=self.pairs,
      pair_ids=tuple(row.get("pair_ids", (row["id"],))),
      **self._learnt(encoded, row)._asdict(),
    )

  def _encode(self, row: rows.Row) -> chat.Encoded:
    """Return a conversation, or a prompt with both answers of each pair."""
    style: dict[str, Any] = dict(
      template=self.template,
      mask=self.mask,
      images=len(records.listed(row["image"])),
    )
    if self._talks(row):
      return chat.encode_conversation(
        self.tokenizer, row["conversations"], **style
      )
    check_fields(row, "question", "chosen", "rejected")
    pairs = [
      chat.encode_pair(
        self.tokenizer, row["question"], chosen, rejected, **style
      )
      for chosen, rejected in zip(
        _several(row["chosen"]), _several(row["rejected"]), strict=True
      )
    ]
    return pairs[0]._replace(
      answers=tuple(a for pair in pairs for a in pair.answers),
      answer_targets=tuple(t for p in pairs for t in p.answer_targets),
    )

  def _talks(self, row: rows.Row) -> bool:
    return "conversations" in row and not self.pairs

  def _learnt(self, encoded: chat.Encoded, row: rows.Row) -> chat.Encoded:
    """Skip what this objective does not learn of a pair."""
    if self._talks(row):
      return encoded
    if self.pairs:
      # The targets of a prompt cancel between two answers (paper 3.2).
      nothing = np.zeros(len(encoded.prompt), bool)
      return encoded._replace(prompt_targets=nothing)
    # The same prompt and answers as DPO sees; SFT skips the rejected ones.
    return encoded._replace(
      answers=encoded.answers[::2], answer_targets=encoded.answer_targets[::2]
    )

  def pixels(self, image: records.Shown) -> tuple[np.ndarray, ...]:
    """Return the images of a row at the size that the encoder reads.

    Several are padded to squares first (paper 1.3).
    """
    found = records.listed(image)
    if self.framed:
      return tuple(found)
    if len(found) > 1:
      found = [framing.pad_square(one) for one in found]
    return tuple(
      images.resize(one, self.image_size, resample=self.resample)
      for one in found
    )

  def _fit(self, encoded: chat.Encoded, row: rows.Row) -> chat.Encoded:
    prompt = packing.expanded(encoded.prompt, self.patches)
    longest = prompt + max(
      packing.expanded(answer, self.patches) for answer in encoded.answers
    )
    if longest <= self.max_length:
      return encoded
    room = self.max_length - prompt
    if self.long != "truncate_answer" or room < 1:
      shorten = "shorten the row"
      if self.long == "truncate_answer":
        shorten = "shorten its prompt, which is never cut"
      raise TooLongError(
        f"row {row['id']}: {longest} tokens ({prompt} of prompt and "
        f"image) are over max_length={self.max_length}: {shorten} or raise "
        "max_length"
      )
    if any((answer == chat.IMAGE_TOKEN).any() for answer in encoded.answers):
      raise TooLongError(
        f"row {row['id']}: over max_length={self.max_length}, and an image "
        "stands in what would be cut: shorten the row"
      )
    answers = tuple(answer[:room] for answer in encoded.answers)
    paired = not self._talks(row)
    if paired and any(map(np.array_equal, answers[::2], answers[1::2])):
      raise TooLongError(
        f"row {row['id']}: chosen and rejected are equal within "
        f"max_length={self.max_length}: raise it or remove the pair"
      )
    targets = tuple(flags[:room] for flags in encoded.answer_targets)
    return encoded._replace(answers=answers, answer_targets=targets)


def coder_of(
  section: Mapping[str, Any],
  tokenizer: chat.Tokenizer,
  *,
  image_size: int = 1,
  patches: int = 1,
  long: str = "error",
  pairs: bool = True,
) -> Coder:
  """Return how a stage codes rows: the stages and `data check` both ask here.

  Args:
    section: a stage's settings, of which `template`, `mask`, `max_length` and
      `resample` count, as far as its kind has them.
    image_size: pixels of a side as the encoder reads images.
    long: the policy for rows over `max_length`, "auto" resolved.
    pairs: whether both answers of a pair are seen, or the chosen alone.
  """
  return Coder(
    tokenizer=tokenizer,
    template=section.get("template", "qwen_1_5"),
    mask=section.get("mask", "answer"),
    pairs=pairs,
    image_size=image_size,
    resample=section["resample"],
    patches=patches,
    max_length=section.get("max_length", 0),
    long=long,
  )


def _several(field: Any) -> list[Any]:
  return field if isinstance(field, list) else [field]


def blank(row: rows.Row) -> tuple[np.ndarray, ...]:
  """Return stand-ins of one black pixel for the images of a row."""
  return (np.zeros((1, 1, 3), np.uint8),) * len(records.listed(row["image"]))


def check_fields(row: rows.Row, *names: str) -> None:
  """Raise InputError for the first field that a row lacks."""
  missing = [name for name in names if name not in row]
  if missing:
    raise InputError(f"{missing[0]!r}: the row has no such field")


def crc(*sequences: np.ndarray) -> str:
  """Return a CRC32 of sequences of tokens."""
  value = 0
  for tokens in sequences:
    value = zlib.crc32(np.asarray(tokens, np.int32).tobytes(), value)
    value = zlib.crc32(b"|", value)
  return f"{value:08x}"


def pair_crcs(example: packing.Example) -> list[str]:
  """Return a CRC32 of the tokens of each pair, to key reference columns."""
  return [
    crc(example.prompt, *example.answers[2 * k : 2 * k + 2])
    for k in range(example.pairs)
  ]


def with_reference(
  example: packing.Example, reference: Reference, name: str
) -> packing.Example:
  """Return an example with its pairs' log-probabilities, checked to be its own.

  `name` is the row's place, for messages.
  """
  found = []
  for pair, code in zip(example.pair_ids, pair_crcs(example), strict=True):
    if pair not in reference:
      raise InputError(
        f"{name}: row {pair} has no reference log-probabilities: run the score "
        "stage again on this data"
      )
    logps, scored = reference[pair]
    if scored != code:
      raise InputError(
        f"{name}: row {pair} is not the text that was scored: run the score "
        "stage again on this data"
      )
    found.append(logps)
  return dataclasses.replace(example, reference=np.asarray(found, np.float32))
