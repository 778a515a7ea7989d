"""Sources -> shuffled stream -> examples -> placed updates; also plain arrays.

Order comes from the seed and the number of examples seen, so that a resumed run
sees what the first would have. An update takes exactly `batch` examples in
stream order; packing reorders inside an update only. This file shares updates
out and places them; it parses no file and knows no template.

N rows of a source, R rows of a batch.
"""

import contextlib
import dataclasses
import itertools
import os
import zlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pivot_jax import processes, sharding
from pivot_jax.data import (
  chat,
  coders,
  images,
  layouts,
  packing,
  rows,
  streams,
)
from pivot_jax.data.sources import records
from pivot_jax.errors import InputError

Coder = coders.Coder
Stream = streams.Stream


class Seen(NamedTuple):
  """CRC32 and bytes of the ids of a share's examples, and of their tokens.

  The tokens are CRC32s of each prompt and first answer.
  """

  share: int
  ids: int
  ids_bytes: int
  tokens: int
  tokens_bytes: int


@dataclasses.dataclass(frozen=True)
class Update:
  """A placed batch with what this process knows of it.

  `ids` are those of its share. `work` counts the content of its rows, those of
  other processes taken to be like this one's. Of what all have seen, `digest`
  makes a CRC32.
  """

  batch: packing.Batch
  ids: tuple[str, ...]
  seen: Seen
  work: packing.Work = packing.Work()


def digest(seen: Iterable[Seen]) -> int:
  """Return the CRC32 of an update's ids and tokens from those of its shares.

  It does not depend on how many there are, and is equal for two objectives that
  see the same rows.
  """
  shares = {one.share: one for one in seen}
  parts = [shares[index] for index in sorted(shares)]
  pieces = [(one.ids, one.ids_bytes) for one in parts]
  pieces += [(one.tokens, one.tokens_bytes) for one in parts]
  code, blank = pieces[0][0], zlib.crc32(b" ")
  for crc, size in pieces[1:]:
    code = _joined(_joined(code, blank, 1), crc, size)
  return code


def _joined(first: int, second: int, size: int) -> int:
  """Return the CRC32 of two texts joined, the second of `size` bytes.

  As CRC32 is affine in the text and in what went before it.
  """
  zeros = bytes(size)
  return zlib.crc32(zeros, first) ^ second ^ zlib.crc32(zeros)


@dataclasses.dataclass(frozen=True)
class Share:
  """The part of every batch that this process reads: `index` of `count`."""

  index: int = 0
  count: int = 1

  @classmethod
  def of(cls, mesh: jax.sharding.Mesh) -> "Share":
    """Return the share whose rows this process's devices hold."""
    return cls(*sharding.own_share(mesh))

  def of_batch(self, size: int, batch: int) -> range:
    """Return the places of `size` examples that are read, of batches of `batch`."""
    own = batch // self.count
    return range(min(size, self.index * own), min(size, (self.index + 1) * own))

  def of_all(self, name: str, value: processes.Json) -> list[Any]:
    """Return what all shares bring to `name`, which JSON can hold, in order.

    Processes of one share bring the same.
    """
    told = dict(processes.exchange(name, [self.index, value]))
    return [told[index] for index in sorted(told)]

  def arrays_of_all(self, own: np.ndarray) -> list[np.ndarray]:
    """Return the arrays of all shares, in order."""
    indices = processes.exchange("shares", self.index)
    found = dict(zip(indices, processes.gather(own), strict=True))
    return [found[index] for index in sorted(found)]

  def rows_of_all(self, own: np.ndarray) -> np.ndarray:
    """Return the rows of a batch, of which each share has some, or none."""
    found = self.arrays_of_all(own)
    # At the end of a source some have none, and no shape of them.
    return np.concatenate([x for x in found if len(x)] or found[:1])


# Updates that no training has.
ENDLESS = 2**40
# Of one process.
WHOLE = Share()


@dataclasses.dataclass(frozen=True)
class _Positions(Sequence):
  """The positions of a share of `updates` from `start` on.

  `start` counts the examples of the whole stream, whoever read them.
  """

  start: int
  batch: int
  share: Share
  updates: int

  def __len__(self) -> int:
    return self.updates * (self.batch // self.share.count)

  def __getitem__(self, index: int) -> int:
    size = self.batch // self.share.count
    update, place = divmod(index, size)
    return self.start + update * self.batch + self.share.index * size + place


def choose_layout(
  stream: Stream,
  coder: Coder,
  *,
  pack: Mapping[str, int],
  batch: int,
  steps: int,
  shards: int,
  share: Share = WHOLE,
  start: int = 0,
) -> packing.Layout:
  """Return the static sizes for `steps` updates of `batch` examples.

  They begin at example `start` of the stream. Each process reads the texts of
  its `share`, and all have the sizes of all.

  With `pack.tokens` set, a row holds one example of at most that many tokens
  and `pack.losses` targets, and nothing is read ahead. With 0, the whole run is
  packed on paper first (texts only) and the smallest sizes that hold it taken:
  rows of `pack.row` tokens, or with 0 as long as the longest example, with room
  for `pack.row_images` images, or with 0 for as many as waste least.
  """
  hosts = share.count
  if batch % hosts:
    raise InputError(
      f"batch={batch} does not divide over {hosts} processes: the nearest are "
      f"{batch // hosts * hosts} and {-(-batch // hosts) * hosts}"
    )
  if sum(stream.counts) < batch:
    raise InputError(
      f"the data has {sum(stream.counts)} rows, fewer than batch={batch}: lower "
      "the batch or give more rows"
    )
  if pack["tokens"]:
    return _rows_of_one(coder, pack, batch, shards)
  processes.in_turn("lengths", lambda: stream.measure(batch * steps))
  own = _Positions(start, batch, share, steps)
  read = []
  for place in range(len(own)):
    processes.beat("reading the size of row", own[place])
    read.append(stream.size(own[place]))
  processes.beat("choosing the layout", allow=processes.SLOW)
  return layouts.layout_for(
    _all_sizes(read, share, steps),
    patches=coder.patches,
    image_size=coder.image_size,
    shards=shards,
    hosts=hosts,
    row_tokens=pack.get("row", 0),
    row_images=pack.get("row_images", 0),
  )


def _all_sizes(
  own: Sequence[layouts.Size], share: Share, steps: int
) -> list[list[layouts.Size]]:
  """Return the sizes of all examples by update, of which `own` are a share's."""
  table = np.asarray(own, np.int32).reshape(
    steps, -1, len(layouts.Size._fields)
  )
  whole = np.concatenate(share.arrays_of_all(table), axis=1)
  return [[layouts.Size(*one) for one in update] for update in whole.tolist()]


def _rows_of_one(
  coder: Coder, pack: Mapping[str, int], batch: int, shards: int
) -> packing.Layout:
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
    images=0 if pack.get("images", 1) == 0 else 1,
    image_size=coder.image_size,
    patches=coder.patches,
    sequences=branches,
    sequence=pack["tokens"],
    copies=branches,
    losses=pack["losses"],
    pairs=1 if coder.pairs else 0,
  )


def check_processes(stream: Stream) -> None:
  """Raise InputError unless all processes see the same rows.

  They compare how many there are, and the texts of a few: a process with a file
  less, or with an old copy of one, would read another order.
  """
  if processes.count() == 1:
    return
  seen = {"rows": str(stream.counts), "texts": f"{stream.digest():08x}"}
  processes.agree("data (give all the same files and tokenizer)", seen)


def check_bad(stream: Stream) -> None:
  """Raise InputError if all processes together found too many bad rows."""
  if processes.count() > 1:
    for found in processes.exchange("bad rows", stream.bad_rows()):
      stream.add_bad(found)


def updates(
  stream: Stream,
  layout: packing.Layout,
  *,
  batch: int,
  start: int,
  mesh: jax.sharding.Mesh,
  sft_group: int,
  threads: int = 0,
  steps: int = ENDLESS,
) -> Generator[Update, None, None]:
  """Yield `steps` placed updates from example `start` of the stream on.

  Each process reads and packs its own contiguous share of an update's examples,
  with `threads` that read ahead.
  """
  share = Share.of(mesh)
  if share.count > 1 and sft_group and batch // share.count % sft_group:
    raise InputError(
      f"batch={batch} over {share.count} processes cuts groups of sft_group="
      f"{sft_group} examples apart: give a multiple of {share.count * sft_group}"
    )
  local = dataclasses.replace(layout, rows=layout.rows // share.count)
  found = read(
    stream,
    batch=batch,
    start=start,
    share=share,
    threads=threads,
    steps=steps,
  )
  with contextlib.closing(found):
    for _ in range(steps):
      members = list(itertools.islice(found, batch // share.count))
      packed = packing.pack(
        members,
        local,
        sft_group=sft_group,
        share=1 / share.count,
        **_totals(members, share, layout.patches),
      )
      # Shares differ little, and a rate needs no exchange between processes.
      work = packing.count_work(packed, layout.patches).times(share.count)
      ids = tuple(example.id for example in members)
      seen = _seen(members, share)
      yield Update(sharding.place_rows(packed, mesh), ids, seen, work)


def _seen(members: Sequence[packing.Example], share: Share) -> Seen:
  ids = " ".join(example.id for example in members).encode()
  said = [coders.crc(e.prompt, *e.answers[:1]) for e in members]
  tokens = " ".join(said).encode()
  return Seen(
    share.index, zlib.crc32(ids), len(ids), zlib.crc32(tokens), len(tokens)
  )


def read(
  stream: Stream,
  *,
  batch: int,
  start: int,
  share: Share,
  threads: int = 0,
  steps: int = ENDLESS,
) -> Generator[packing.Example, None, None]:
  """Yield a share of `steps` updates from example `start` of the stream on.

  Nothing is read beyond them, however far ahead threads read.
  """
  positions = _Positions(start, batch, share, steps)
  return stream.examples(positions, threads=threads)


def threads(workers: int) -> int:
  """Return how many threads read: -1 stands for one a core, 16 at most."""
  return min(16, os.cpu_count() or 1) if workers < 0 else workers


def _totals(
  members: Sequence[packing.Example], share: Share, patches: int
) -> dict[str, int]:
  """Return the pairs and targets of a whole update, of which members are a share.

  Two numbers of each share go to all, while earlier updates are computed.
  """
  if share.count == 1:
    return {}
  sizes = [packing.size(example, patches) for example in members]
  own = sum(size.pairs for size in sizes), sum(size.losses for size in sizes)
  pairs, targets = map(sum, zip(*share.of_all("totals", own)))
  return dict(pairs=pairs, targets=targets)


def longest_prompt(
  source: rows.Source,
  coder: Coder,
  patches: int,
  indices: Iterable[int] | None = None,
) -> int:
  """Return the tokens of the longest generation prompt of a source, or of rows.

  `indices` are the rows that this process reads; the longest is that of all.
  """
  rows = range(len(source)) if indices is None else indices
  lengths = []
  for index in rows:
    processes.beat("reading the size of row", index)
    prompt = _prompt(source, index, coder, pixels=False)
    lengths.append(packing.length(prompt, patches))
  return max(processes.exchange("longest", max(lengths, default=0)))


def prompts(
  source: rows.Source,
  indices: Sequence[int],
  coder: Coder,
  *,
  tokens: int,
  patches: int,
) -> packing.Batch:
  """Return generation prompts as a batch, one a row, right padded."""
  found = [_prompt(source, index, coder) for index in indices]
  layout = packing.Layout(
    rows=len(indices),
    examples=1,
    tokens=tokens,
    images=max(len(example.images) for example in found),
    image_size=coder.image_size,
    patches=patches,
    sequences=1,
    sequence=tokens,
    copies=1,
    losses=1,
    pairs=0,
  )
  return packing.pack_in_order(found, layout)


def _prompt(
  source: rows.Source, index: int, coder: Coder, *, pixels: bool = True
) -> packing.Example:
  row = source[index] if pixels else source.text(index)
  with records.located(source.name(index)):
    coders.check_fields(row, "question")
    encoded = chat.encode_prompt(
      coder.tokenizer,
      row["question"],
      images=len(records.listed(row["image"])),
      template=coder.template,
    )
    shown = coder.pixels(row["image"]) if pixels else coders.blank(row)
  return packing.Example(id=row["id"], images=shown, **encoded._asdict())


def images_and_labels(
  source: rows.Source, image_size: int, resample: str = "bicubic"
) -> tuple[np.ndarray, np.ndarray]:
  """Return (uint8 [N, H, W, 3], int32 [N]) of a classification source."""
  found = [source[index] for index in range(len(source))]
  stacked = _stack([row["image"] for row in found], image_size, resample)
  return stacked, np.asarray([row["label"] for row in found], np.int32)


def images_and_maps(
  source: rows.Source, image_size: int, resample: str = "bicubic"
) -> tuple[np.ndarray, np.ndarray]:
  """Return (uint8 [N, H, W, 3], int32 [N, H, W]) of a segmentation source."""
  found = [source[index] for index in range(len(source))]
  stacked = _stack([row["image"] for row in found], image_size, resample)
  maps = [
    images.resize_labels(row["labels"], image_size, resample=resample)
    for row in found
  ]
  return stacked, np.stack(maps).astype(np.int32)


def _stack(
  pictures: Sequence[np.ndarray], size: int, resample: str
) -> np.ndarray:
  return np.stack(
    [images.resize(picture, size, resample=resample) for picture in pictures]
  )
