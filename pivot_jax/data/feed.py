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
from collections.abc import Generator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from pivot_jax import sharding
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


@dataclasses.dataclass(frozen=True)
class Update:
  """A placed batch with what the host knows of it.

  `work` counts the content of its rows, those of other processes taken to be
  like this one's. `digest` is a CRC32 of the ids and of each row's prompt and
  first answer: equal for two objectives that see the same rows.
  """

  batch: packing.Batch
  ids: tuple[str, ...]
  digest: int
  work: packing.Work = packing.Work()


@dataclasses.dataclass(frozen=True)
class Share:
  """The part of every update that this process reads: `index` of `count`."""

  index: int = 0
  count: int = 1

  @classmethod
  def here(cls) -> "Share":
    return cls(jax.process_index(), jax.process_count())


@dataclasses.dataclass(frozen=True)
class _Positions(Sequence):
  """The positions of a share of all updates from `start` on, endless.

  `start` counts the examples of the whole stream, whoever read them.
  """

  start: int
  batch: int
  share: Share

  def __len__(self) -> int:
    return 2**62 // self.batch

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
  hosts: int = 1,
  start: int = 0,
) -> packing.Layout:
  """Return the static sizes for `steps` updates of `batch` examples.

  They begin at example `start` of the stream.

  With `pack.tokens` set, a row holds one example of at most that many tokens
  and `pack.losses` targets, and nothing is read ahead. With 0, the whole run is
  packed on paper first (texts only) and the smallest sizes that hold it taken:
  rows of `pack.row` tokens, or with 0 as long as the longest example, with room
  for `pack.row_images` images, or with 0 for as many as waste least.
  """
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
  stream.measure(batch * steps)
  sizes = [stream.size(i) for i in range(start, start + batch * steps)]
  return layouts.layout_for(
    [sizes[i : i + batch] for i in range(0, len(sizes), batch)],
    patches=coder.patches,
    image_size=coder.image_size,
    shards=shards,
    hosts=hosts,
    row_tokens=pack.get("row", 0),
    row_images=pack.get("row_images", 0),
  )


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
  if jax.process_count() == 1:
    return
  own = np.asarray([*stream.counts, stream.digest()], np.int64)
  everyone = multihost_utils.process_allgather(own)
  other = np.flatnonzero((everyone != everyone[0]).any(axis=1))
  if len(other):
    counts = everyone[:, :-1]
    raise InputError(
      f"process {other[0]} sees {counts[other[0]].tolist()} rows, process 0 "
      f"{counts[0].tolist()}, or other texts: give all of them the same files "
      "and tokenizer"
    )


def updates(
  stream: Stream,
  layout: packing.Layout,
  *,
  batch: int,
  start: int,
  mesh: jax.sharding.Mesh,
  sft_group: int,
  threads: int = 0,
) -> Generator[Update, None, None]:
  """Yield placed updates from example `start` of the stream on, endlessly.

  Each process reads and packs its own contiguous share of an update's examples,
  with `threads` that read ahead.
  """
  share = Share.here()
  if share.count > 1 and sft_group and batch // share.count % sft_group:
    raise InputError(
      f"batch={batch} over {share.count} processes cuts groups of sft_group="
      f"{sft_group} examples apart: give a multiple of {share.count * sft_group}"
    )
  local = dataclasses.replace(layout, rows=layout.rows // share.count)
  found = read(stream, batch=batch, start=start, share=share, threads=threads)
  with contextlib.closing(found):
    for position in itertools.count(start, batch):
      members = list(itertools.islice(found, batch // share.count))
      whole = range(position, position + batch)
      packed = packing.pack(
        members,
        local,
        sft_group=sft_group,
        share=1 / share.count,
        **_totals(stream, whole, share),
      )
      ids = tuple(example.id for example in members)
      said = [coders.crc(e.prompt, *e.answers[:1]) for e in members]
      digest = zlib.crc32(" ".join((*ids, *said)).encode())
      # Shares differ little, and a rate needs no exchange between processes.
      work = packing.count_work(packed, layout.patches).times(share.count)
      yield Update(sharding.place_rows(packed, mesh), ids, digest, work)


def read(
  stream: Stream, *, batch: int, start: int, share: Share, threads: int = 0
) -> Generator[packing.Example, None, None]:
  """Yield a share of all updates from example `start` of the stream on."""
  positions = _Positions(start, batch, share)
  return stream.examples(positions, threads=threads)


def threads(workers: int) -> int:
  """Return how many threads read: -1 stands for one a core, 16 at most."""
  return min(16, os.cpu_count() or 1) if workers < 0 else workers


def _totals(stream: Stream, whole: range, share: Share) -> dict[str, int]:
  """Return the pairs and targets of a whole update."""
  if share.count == 1:
    return {}
  sizes = [stream.size(position) for position in whole]
  return dict(
    pairs=sum(size.pairs for size in sizes),
    targets=sum(size.losses for size in sizes),
  )


def longest_prompt(source: rows.Source, coder: Coder, patches: int) -> int:
  """Return the tokens of the longest generation prompt of a source."""
  return max(
    packing.length(_prompt(source, i, coder, pixels=False), patches)
    for i in range(len(source))
  )


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
