"""The measurements of `bench.data`, each for a process of its own.

Every function returns plain numbers: seconds, rates, and bytes of memory. A
`kind` is that of a config's `data` entry, "llava" or "mmpr".
"""

import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bench.data import files
from pivot_jax import addresses
from pivot_jax.data import (
  coders,
  layouts,
  lengths,
  opener,
  packing,
  rows,
  streams,
)
from pivot_jax.data.rows import View
from pivot_jax.data.scenes import scenes
from pivot_jax.data.sources import mmpr_selection
from pivot_jax.data.tokenizer import load_tokenizer

IMAGE, PATCHES = 384, 576
ROW_TOKENS, BATCH = 8192, 256
CHOSEN = 20_000

Found = dict[str, Any]


class Timer:
  """Wall and CPU seconds of what happens inside."""

  wall: float
  cpu: float

  def __enter__(self):
    self._began = time.perf_counter(), time.process_time()
    return self

  def __exit__(self, *_):
    wall, cpu = self._began
    self.wall = time.perf_counter() - wall
    self.cpu = time.process_time() - cpu


def resident() -> dict[str, int]:
  """Return this process's bytes: anonymous, all, and the most of all."""
  text = pathlib.Path("/proc/self/status").read_text()
  lines = dict(line.split(":", 1) for line in text.splitlines())
  names = {"anonymous": "RssAnon", "total": "VmRSS", "peak": "VmHWM"}
  return {k: 1024 * int(lines[v].split()[0]) for k, v in names.items()}


def size_of(kind: str, path: pathlib.Path) -> int:
  """Return the bytes of the texts."""
  if kind == "llava":
    return path.stat().st_size
  return sum(p.stat().st_size for p in path.parent.glob("annotations/*"))


def open_source(kind: str, path: pathlib.Path) -> rows.Source:
  """Open the source as a stream does."""
  how = {"image_size": IMAGE, "resample": "bicubic"}
  return opener.open_source({"kind": kind, "path": str(path)} | how)


def make_coder(kind: str, tokenizer: str, *, pixels: bool) -> coders.Coder:
  """Return the coder of a kind of rows: MMPR's are pairs, others turns.

  Without `pixels` an image is one black pixel and as many tokens.
  """
  return coders.Coder(
    tokenizer=load_tokenizer(addresses.tokenizer_folder(tokenizer)),
    template="qwen_1_5",
    mask="answer",
    pairs=kind == "mmpr",
    image_size=IMAGE if pixels else 1,
    patches=PATCHES,
  )


def index(kind: str, path: pathlib.Path) -> Found:
  """Open a source, for the first time or again."""
  start = resident()
  with Timer() as timer:
    source = open_source(kind, path)
  return {
    "seconds": timer.wall,
    "cpu": timer.cpu,
    "rows": len(source),
    "bytes": size_of(kind, path),
    "memory": {"start": start, "opened": resident()},
  }


def read(kind: str, path: pathlib.Path, *, texts: int, pictures: int) -> Found:
  """Open a source again and read random rows, as text and with pixels."""
  memory = {"start": resident()}
  with Timer() as opening:
    source = open_source(kind, path)
  memory["opened"] = resident()
  rng = np.random.default_rng(1)
  found: Found = {"rows": len(source), "seconds": opening.wall}
  for name, count, get in (
    ("texts", texts, source.text),
    ("pictures", pictures, source.__getitem__),
  ):
    chosen = rng.integers(0, len(source), count).tolist()
    with Timer() as timer:
      for row in chosen:
        get(row)
    memory[name] = resident()
    found[name] = {
      "reads": count,
      "rate": count / timer.wall,
      "cpu_rate": count / timer.cpu,
    }
  return found | {"memory": memory}


def measure(
  kind: str,
  path: pathlib.Path,
  tokenizer: str,
  *,
  rows: int,
  processes: int,
) -> Found:
  """Measure the lengths of random rows, as is done before a run."""
  source = open_source(kind, path)
  chosen = np.random.default_rng(2).permutation(len(source))[:rows]
  coder = make_coder(kind, tokenizer, pixels=False)
  before = _children()
  with Timer() as timer:
    table = lengths.measure(View(source, chosen), coder, processes=processes)
  held = table.sizes.astype(np.int64)
  if table.bad or table.long or not held[:, 0].all():
    raise AssertionError(f"rows that cannot be used: {table.bad or table.long}")
  text = held[:, 0] - held[:, 2] * PATCHES
  return {
    "rows": len(held),
    "seconds": timer.wall,
    "cpu": timer.cpu + _children() - before,
    "rate": len(held) / timer.wall,
    "text_tokens": float(text.mean()),
    "images": float(held[:, 2].mean()),
    "memory": {"end": resident()},
  }


def _children() -> float:
  """Return the CPU seconds of the processes that ended."""
  times = os.times()
  return times.children_user + times.children_system


class Unseen(rows.View):
  """A source whose images are one black pixel each, so that none is read."""

  def __init__(self, source: rows.Source):
    super().__init__(source, range(len(source)))
    self._pixel = np.zeros((1, 1, 3), np.uint8)

  def __getitem__(self, index: int) -> rows.Row:
    found = self.text(index)
    return found | {"image": None if found["image"] is None else self._pixel}


def _stream(kind, path, tokenizer, *, pixels: bool):
  coder = make_coder(kind, tokenizer, pixels=pixels)
  if pixels:
    spec = {"kind": kind, "path": str(path)}
    return streams.open_stream([(spec, 1.0)], coder, seed=0), coder
  source = Unseen(open_source(kind, path))
  return streams.Stream([(source, 1.0)], coder, seed=0), coder


def layout(
  kind: str, path: pathlib.Path, tokenizer: str, *, batch: int, updates: int
) -> layouts.Layout:
  """Return the layout of some updates, its images of one pixel."""
  stream, coder = _stream(kind, path, tokenizer, pixels=False)
  sizes = list(map(stream.size, range(batch * updates)))
  return layouts.layout_for(
    [sizes[i : i + batch] for i in range(0, len(sizes), batch)],
    patches=coder.patches,
    image_size=1,
    row_tokens=ROW_TOKENS,
  )


def pack(
  kind: str,
  path: pathlib.Path,
  tokenizer: str,
  *,
  of: layouts.Layout,
  batch: int,
  updates: int,
  pixels: bool,
  threads: int,
) -> Found:
  """Read, encode and pack updates; the first one is not timed."""
  stream, coder = _stream(kind, path, tokenizer, pixels=pixels)
  of = dataclasses.replace(of, image_size=coder.image_size)
  found = stream.examples(range(batch * updates), threads=threads)
  walls, cpus, packed, tokens = [], [], [], 0
  for _ in range(updates):
    with Timer() as whole:
      members = list(itertools.islice(found, batch))
      with Timer() as packs:
        made = packing.pack(members, of, sft_group=0)
    walls.append(whole.wall)
    cpus.append(whole.cpu)
    packed.append(packs.wall)
    tokens += int((made.segments > 0).sum())
  return {
    "rows": batch * updates,
    "walls": walls[1:],
    "rate": batch / float(np.median(walls[1:])),
    "cpu_rate": batch * (updates - 1) / sum(cpus[1:]),
    "pack_seconds": float(np.median(packed[1:])),
    "tokens": tokens / updates,
    "memory": {"end": resident()},
  }


def choose(way: str, path: pathlib.Path, tokenizer: str, *, size: int) -> Found:
  """Choose a training set out of MMPR by `official` or `fixed`."""
  loaded = load_tokenizer(addresses.tokenizer_folder(tokenizer))

  def count(text: str) -> int:
    return len(loaded.encode(text))

  start = resident()
  with Timer() as timer:
    if way == "official":
      found = mmpr_selection.select_official(path, None, count, size=size)
    else:
      found = mmpr_selection.select_fixed(path, None, count, size=size)
  return {
    "seconds": timer.wall,
    "cpu": timer.cpu,
    "chosen": len(found.indices),
    "refused": dict(found.refused),
    "of": len(found.source),
    "memory": {"start": start, "end": resident()},
  }


def drawn_table(rows: int) -> lengths.Table:
  """Return sizes of conversations, log-normal, a tenth of them text alone."""
  rng = np.random.default_rng(3)
  asked, answered = (
    files.lengths(rng, words * files.TOKENS_A_WORD, 0.9, rows)
    for words in (files.QUESTION, files.ANSWER)
  )
  images = (rng.random(rows) >= files.TEXT_ONLY).astype(np.int64)
  answered = np.minimum(answered, 4000)
  tokens = np.minimum(asked, 2000) + 24 + answered + PATCHES * images
  ones = np.ones(rows, np.int64)
  columns = (tokens, tokens, images, ones, answered, 0 * ones)
  return lengths.Table(np.stack(columns, 1).astype(np.int32), {}, {})


def lay_out(*, batch: int, steps: int) -> Found:
  """Find the layout of a whole epoch from drawn sizes, as a run does."""
  rows = batch * steps
  table = drawn_table(rows)
  coder = make_coder("llava", "package:toy", pixels=True)
  stream = streams.Stream(
    [(scenes.Scenes(task="text", size=rows), 1.0)], coder, seed=0
  )
  start = resident()
  with Timer() as ordering:
    sizes = [table.size(stream.place(i)[1]) for i in range(rows)]
  ordered = resident()
  with Timer() as fit:
    found = layouts.layout_for(
      [sizes[i : i + batch] for i in range(0, rows, batch)],
      patches=PATCHES,
      image_size=IMAGE,
      row_tokens=ROW_TOKENS,
    )
  held = float(table.sizes[:, 0].astype(np.int64).sum())
  return {
    "updates": steps,
    "order_seconds": ordering.wall,
    "seconds": fit.wall,
    "cpu": fit.cpu,
    "layout": dataclasses.asdict(found),
    "padding": 1 - held / (steps * found.rows * found.tokens),
    "memory": {"start": start, "ordered": ordered, "end": resident()},
  }


RUNS: Mapping[str, Callable[..., Any]] = {
  run.__name__: run
  for run in (index, read, measure, layout, pack, choose, lay_out)
}
