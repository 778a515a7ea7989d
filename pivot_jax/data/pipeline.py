"""Sources -> shuffled stream -> examples -> placed updates; also plain arrays.

Order comes from the seed and the number of examples seen, so that a resumed run
sees what the first would have. An update takes exactly `batch` examples in
stream order; packing reorders inside an update only. This file mixes, encodes
and places; it parses no file and knows no template.

N rows of a source, R rows of a batch.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import UInt8

from pivot_jax import sharding
from pivot_jax.data import chat, images, packing
from pivot_jax.data import work as counting
from pivot_jax.errors import InputError

Row = Mapping[str, Any]
Reference = Mapping[str, tuple[tuple[float, float], str]]


@dataclasses.dataclass(frozen=True)
class Update:
  """A placed batch with what the host knows of it.

  `work` counts what its rows hold, those of other processes taken to be like
  this one's. `digest` is a CRC32 of the ids and of each row's prompt and first answer: equal
  for two objectives that see the same rows.
  """

  batch: packing.Batch
  ids: tuple[str, ...]
  digest: int
  work: counting.Work = counting.Work()


@dataclasses.dataclass(frozen=True)
class Coder:
  """How a row becomes an example: tokens, targets, pixels of the right size.

  `pairs` lays chosen and rejected out as two branches; otherwise a preference
  row is a conversation that ends in its chosen answer.
  """

  tokenizer: chat.Tokenizer
  template: str
  mask: str
  pairs: bool
  image_size: int
  resample: str = "bicubic"

  def encode(self, row: Row) -> chat.Encoded:
    """Returns the tokens of a row; raises InputError without its name."""
    has_image = row["image"] is not None
    style = dict(template=self.template, mask=self.mask, has_image=has_image)
    if "conversations" in row and not self.pairs:
      return chat.encode_conversation(
        self.tokenizer, row["conversations"], **style
      )
    _check_fields(row, "question", "chosen", "rejected")
    encoded = chat.encode_pair(
      self.tokenizer, row["question"], row["chosen"], row["rejected"], **style
    )
    if self.pairs:
      # The targets of a prompt cancel between two answers (paper 3.2).
      nothing = np.zeros(len(encoded.prompt), bool)
      return encoded._replace(prompt_targets=nothing)
    # The same prompt and answer as DPO sees, the rejected one left out.
    return encoded._replace(
      answers=encoded.answers[:1], answer_targets=encoded.answer_targets[:1]
    )

  def pixels(self, image: Any) -> UInt8[np.ndarray, "H W 3"] | None:
    """Returns an image at the size the encoder reads."""
    if image is None:
      return None
    return images.resize(image, self.image_size, resample=self.resample)


class Stream:
  """An endless, seeded, random-access sequence of examples.

  Each epoch of each source has its own permutation; several sources are mixed
  by weight, deterministically.
  """

  def __init__(
    self,
    parts: Sequence[tuple[Any, float]],
    coder: Coder,
    *,
    seed: int,
    reference: Reference | None = None,
  ):
    self._coder, self._reference = coder, reference
    positions = [
      grain.MapDataset.source(_Positions(k, len(source)))
      .shuffle(seed=seed + k)
      .repeat()
      for k, (source, _) in enumerate(parts)
    ]
    self._sources = [source for source, _ in parts]
    self._order = (
      positions[0]
      if len(parts) == 1
      else grain.MapDataset.mix(positions, weights=[w for _, w in parts])
    )

  def example(self, position: int, *, pixels: bool = True) -> packing.Example:
    """Returns the example at a position; without pixels, a stand-in of zeros."""
    source, index = self.at(position)
    row = source[index] if pixels else source.text(index)
    with _locating(source, index):
      encoded = self._coder.encode(row)
      image = self._coder.pixels(row["image"]) if pixels else _blank(row)
    example = packing.Example(id=row["id"], image=image, **encoded._asdict())
    if self._reference is None:
      return example
    return dataclasses.replace(
      example, reference=lookup(self._reference, example, source.name(index))
    )

  def place(self, position: int) -> tuple[int, int]:
    """Returns (source number, row index) at a position of the stream."""
    return self._order[position]

  def at(self, position: int) -> tuple[Any, int]:
    """Returns (source, row index) at a position of the stream."""
    part, index = self.place(position)
    return self._sources[part], index


@dataclasses.dataclass(frozen=True)
class _Positions:
  """The (source number, index) pairs of one source, for grain to shuffle."""

  part: int
  size: int

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> tuple[int, int]:
    return self.part, int(index)


def row_crc(example: packing.Example) -> str:
  """Returns a CRC32 of all tokens of an example, to key reference columns."""
  return _crc(example.prompt, *example.answers)


def _crc(*sequences) -> str:
  crc = 0
  for tokens in sequences:
    crc = zlib.crc32(np.asarray(tokens, np.int32).tobytes(), crc)
    crc = zlib.crc32(b"|", crc)
  return f"{crc:08x}"


def lookup(
  reference: Reference, example: packing.Example, name: str
) -> tuple[float, float]:
  """Returns the reference log-probabilities of a row, checked to be its own."""
  if example.id not in reference:
    raise InputError(
      f"{name}: row {example.id} has no reference log-probabilities: run the "
      "score stage again on this data"
    )
  logps, crc = reference[example.id]
  if crc != row_crc(example):
    raise InputError(
      f"{name}: row {example.id} is not the text that was scored: run the score "
      "stage again on this data"
    )
  return logps


def choose_layout(
  stream: Stream,
  coder: Coder,
  *,
  pack: Mapping[str, int],
  batch: int,
  steps: int,
  patches: int,
  shards: int,
  max_length: int,
) -> packing.Layout:
  """Returns the static sizes for `steps` updates of `batch` examples.

  With `pack.tokens` set, a row holds one example of at most that many tokens
  and `pack.losses` targets, and nothing is read ahead. With 0, the whole run is
  packed on paper first (texts only) and the smallest sizes that hold it taken:
  rows of `pack.row` tokens, or with 0 as long as the longest example.
  """
  text_only = pack.get("images", 1) == 0
  if pack["tokens"]:
    if batch % shards:
      raise InputError(
        f"batch={batch} does not divide over {shards} row shards (devices x "
        f"accum): the nearest are {batch // shards * shards} and "
        f"{-(-batch // shards) * shards}"
      )
    branches = 2 if coder.pairs else 1
    return packing.Layout(
      rows=batch,
      examples=1,
      tokens=pack["tokens"],
      images=0 if text_only else 1,
      image_size=coder.image_size,
      patches=patches,
      sequences=branches,
      sequence=pack["tokens"],
      copies=branches,
      losses=pack["losses"],
      pairs=1 if coder.pairs else 0,
    )
  examples = _texts(stream, batch * steps, patches, max_length)
  return packing.layout_for(
    [examples[i : i + batch] for i in range(0, len(examples), batch)],
    patches=patches,
    image_size=coder.image_size,
    shards=shards,
    max_length=max_length,
    row_tokens=pack.get("row", 0),
  )


def _texts(stream, count, patches, max_length) -> list[packing.Example]:
  """Returns the first examples of a stream without pixels, checked for length."""
  known: dict[tuple[int, int], packing.Example] = {}
  for position in range(count):
    if stream.place(position) not in known:
      example = stream.example(position, pixels=False)
      with _locating(*stream.at(position)):
        packing.check_length(example, patches, max_length)
      known[stream.place(position)] = example
  return [known[stream.place(position)] for position in range(count)]


def updates(
  stream: Stream,
  layout: packing.Layout,
  *,
  batch: int,
  start: int,
  mesh: jax.sharding.Mesh,
  sft_group: int,
) -> Iterator[Update]:
  """Yields placed updates from example `start` of the stream on, endlessly.

  Each process packs its own contiguous share of an update's examples.
  """
  hosts, host = jax.process_count(), jax.process_index()
  share = batch // hosts
  local = dataclasses.replace(layout, rows=layout.rows // hosts)
  position = start
  while True:
    first = position + host * share
    examples = [stream.example(i) for i in range(first, first + share)]
    packed = packing.pack(
      examples, local, sft_group=sft_group, pairs=batch, share=1 / hosts
    )
    ids = tuple(example.id for example in examples)
    said = [_crc(e.prompt, *e.answers[:1]) for e in examples]
    digest = zlib.crc32(" ".join((*ids, *said)).encode())
    # Shares differ little, and a rate needs no exchange between processes.
    counted = counting.count(packed, layout.patches).times(hosts)
    yield Update(sharding.place_rows(packed, mesh), ids, digest, counted)
    position += batch


def in_order(
  source: Any, coder: Coder, *, patches: int, max_length: int
) -> list[packing.Example]:
  """Returns all rows as examples without their pixels, in file order.

  Raises InputError for a row over `max_length` tokens with its image.
  """
  examples = []
  for index in range(len(source)):
    row = source.text(index)
    with _locating(source, index):
      encoded = coder.encode(row)
      example = packing.Example(
        id=row["id"], image=_blank(row), **encoded._asdict()
      )
      packing.check_length(example, patches, max_length)
    examples.append(example)
  return examples


def longest_prompt(source: Any, coder: Coder, patches: int) -> int:
  """Returns the tokens of the longest generation prompt of a source."""
  return max(
    packing.length(_prompt(source, i, coder, pixels=False), patches)
    for i in range(len(source))
  )


def prompts(
  source: Any,
  indices: Sequence[int],
  coder: Coder,
  *,
  tokens: int,
  patches: int,
) -> packing.Batch:
  """Returns generation prompts as a batch, one a row, right padded."""
  examples = [_prompt(source, index, coder) for index in indices]
  layout = packing.Layout(
    rows=len(indices),
    examples=1,
    tokens=tokens,
    images=int(any(example.image is not None for example in examples)),
    image_size=coder.image_size,
    patches=patches,
    sequences=1,
    sequence=tokens,
    copies=1,
    losses=1,
    pairs=0,
  )
  return packing.pack_in_order(examples, layout)


def _prompt(source, index, coder, *, pixels: bool = True) -> packing.Example:
  row = source[index] if pixels else source.text(index)
  with _locating(source, index):
    _check_fields(row, "question")
    encoded = chat.encode_prompt(
      coder.tokenizer, row["question"], has_image=row["image"] is not None
    )
    image = coder.pixels(row["image"]) if pixels else _blank(row)
  return packing.Example(id=row["id"], image=image, **encoded._asdict())


def images_and_labels(source: Any, image_size: int, resample: str = "bicubic"):
  """Returns (uint8 [N, H, W, 3], int [N]) of a classification source."""
  rows = [source[index] for index in range(len(source))]
  stacked = _stack([row["image"] for row in rows], image_size, resample)
  return stacked, np.asarray([row["label"] for row in rows], np.int32)


def images_and_maps(source: Any, image_size: int, resample: str = "bicubic"):
  """Returns (uint8 [N, H, W, 3], int32 [N, H, W]) of a segmentation source."""
  rows = [source[index] for index in range(len(source))]
  stacked = _stack([row["image"] for row in rows], image_size, resample)
  maps = [
    images.resize_labels(row["labels"], image_size, resample=resample)
    for row in rows
  ]
  return stacked, np.stack(maps).astype(np.int32)


def _stack(pictures, size, resample):
  return np.stack(
    [images.resize(picture, size, resample=resample) for picture in pictures]
  )


def _blank(row: Row):
  return None if row["image"] is None else np.zeros((1, 1, 3), np.uint8)


def _check_fields(row: Row, *names: str) -> None:
  missing = [name for name in names if name not in row]
  if missing:
    raise InputError(f"{missing[0]!r}: the row has no such field")


@contextlib.contextmanager
def _locating(source: Any, index: int) -> Iterator[None]:
  """Puts the file and row before the message of an InputError."""
  try:
    yield
  except InputError as error:
    raise InputError(f"{source.name(index)}: {error}") from error
