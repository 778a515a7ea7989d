"""One, two and four processes of one machine: what running together costs.

  python -m bench.processes [--quick] [--updates=20]

The same training, of 7 million parameters and a global batch of 16, by 1, 2 and
4 processes of one device each, over data and over fsdp; and the same rows read
by as many processes, each its share. All processes share the cores, so that
updates a second here show the overhead alone, never a speed-up.

- *bytes read* are `rchar` of /proc/self/io: those asked of read calls, of files
  in memory, too; what is mapped into memory is not in it.
- *rows* are the rows of the sources that a process opened before its first
  update: their texts for the lengths, and those with images that were read.
- Host tokens a second are those of `feed.read`: rows of LLaVA's form with
  photographs, made here, to examples of 384 pixels, 576 tokens an image.

--quick runs a toy in less than two minutes; its page says nothing of speed.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench import results, verdict
from bench.data import files
from bench.joined import runs

COUNTS, QUICK_COUNTS = (1, 2, 4), (1, 2)
# The updates that are left out of a rate, the first of which compile.
_WARM_UP = 2
_ROWS, _QUICK_ROWS = 2_000, 100
# Updates that are read for a rate, the examples of one, and how often.
_READ, _BATCH, _ROUNDS = 40, 16, 3


@dataclasses.dataclass(frozen=True)
class Trained:
  """A training: update times of the first process, and counts of each.

  `imported` are bytes read up to joining, `opened` from there to the first
  update, `texts` and `pixels` the rows read up to it.
  """

  processes: int
  mesh: str
  gaps: tuple[float, ...]
  imported: tuple[int, ...]
  opened: tuple[int, ...]
  texts: tuple[int, ...]
  pixels: tuple[int, ...]
  loss: float


@dataclasses.dataclass(frozen=True)
class Read:
  """The input alone: seconds of each process, and what all have read."""

  processes: int
  seconds: tuple[float, ...]
  rows: int
  tokens: int


def trained(
  count: int, mesh: str, folder: pathlib.Path, recipe: str, updates: int
) -> Trained:
  """Return what a training of `count` processes took."""
  work = folder / f"{mesh}{count}"
  said = runs.words(
    work / "work",
    recipe,
    f"--config.mesh.{'fsdp' if mesh == 'data' else 'data'}=1",
    f"--config.mesh.{mesh}={count}",
    # No save among the updates that are timed.
    "--config.trained.save_every=1000",
  )
  with runs.Together(
    work / "run", count, lambda _: said, caches=folder / ".xla"
  ) as run:
    for index in range(count):
      run.wait_for("update", step=_WARM_UP + updates + 1, index=index)
    each = [{m["what"]: m for m in run.marks(i)} for i in range(count)]
    times = [m["time"] for m in run.marks(0) if m["what"] == "update"]
    run.kill()
    run.end()
  lines = (work / "work" / "trained" / "metrics.jsonl").read_text().splitlines()
  return Trained(
    processes=count,
    mesh=mesh,
    gaps=tuple(np.diff(times[_WARM_UP : _WARM_UP + updates + 1]).tolist()),
    imported=tuple(one["joined"]["read"] for one in each),
    opened=tuple(
      one["updating"]["read"] - one["joined"]["read"] for one in each
    ),
    texts=tuple(one["updating"]["rows"].get("texts", 0) for one in each),
    pixels=tuple(one["updating"]["rows"].get("pixels", 0) for one in each),
    loss=json.loads(lines[0])["losses/total"],
  )


def trainings_table(found: Sequence[Trained]) -> str:
  """Return the trainings as a Markdown table."""
  head = ["processes", "mesh", "updates/s", "p10–p90", "1 process = 1"]
  head += ["MB read, imports", "MB read, from there to the first update"]
  lines = [[*head, "all processes, MB", "texts", "rows with images"]]
  alone = verdict.spread(found[0].gaps)[1]
  for one in found:
    low, middle, high = verdict.spread(one.gaps)
    whole = sum(one.imported) + sum(one.opened)
    lines.append([
      str(one.processes),
      one.mesh,
      f"{1 / middle:.2f}",
      f"{1 / high:.2f}–{1 / low:.2f}",
      f"{alone / middle:.2f}",
      _each([x / 1e6 for x in one.imported]),
      _each([x / 1e6 for x in one.opened]),
      f"{whole / 1e6:.1f}",
      _each(one.texts, 0),
      _each(one.pixels, 0),
    ])  # fmt: skip
  return verdict.markdown(lines)


def _each(values: Sequence[float], digits: int = 1) -> str:
  """Return the numbers of the processes, one where all are equal."""
  shown = [f"{value:,.{digits}f}" for value in values]
  return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def read_share(flags: argparse.Namespace) -> None:
  """Read a share of some updates, when all are ready; print JSON."""
  from bench.data import runs as data_runs
  from pivot_jax import processes
  from pivot_jax.data import feed, packing, streams

  index, count = processes.start(flags.processes)
  coder = data_runs.make_coder("llava", "package:toy", pixels=True)
  spec = {"kind": "llava", "path": str(flags.rows)}
  stream = streams.open_stream([(spec, 1.0)], coder, seed=0)
  share = feed.Share(index, count)
  found = feed.read(
    stream, batch=_BATCH, start=0, share=share, threads=feed.threads(-1)
  )
  own = _BATCH // count
  tokens = 0
  # The first update's rows fill what is read ahead.
  list(itertools.islice(found, own))
  processes.barrier("reading")
  began = time.perf_counter()
  for example in itertools.islice(found, own * flags.read):
    tokens += packing.size(example, coder.patches).tokens
  seconds = time.perf_counter() - began
  found.close()
  processes.barrier("read")
  processes.finish()
  said = {"seconds": seconds, "tokens": tokens, "rows": own * flags.read}
  flags.result.with_name(f"read.{index}").write_text(json.dumps(said))


def read(count: int, rows: pathlib.Path, folder: pathlib.Path, n: int) -> Read:
  """Return what `count` processes took to read their shares at one time."""
  place = folder / f"read{count}"
  said = ["-m", "bench.processes", f"--rows={rows}", f"--read={n}"]
  said.append(f"--result={place / 'read'}")
  with runs.Together(place, count, lambda _: said) as run:
    ended = run.end()
  if any(one.code for one in ended):
    raise runs.Hung(f"reading failed:\n{run.logs()}")
  each = [json.loads((place / f"read.{i}").read_text()) for i in range(count)]
  return Read(
    processes=count,
    seconds=tuple(one["seconds"] for one in each),
    rows=sum(one["rows"] for one in each),
    tokens=sum(one["tokens"] for one in each),
  )


def reading_table(found: Sequence[Read]) -> str:
  """Return the rates of reading as a Markdown table, rounds side by side."""
  rates: dict[int, list[float]] = {}
  for one in found:
    # All are done when the last one is.
    rates.setdefault(one.processes, []).append(one.tokens / max(one.seconds))
  tokens = found[0].tokens / found[0].rows
  lines = [["processes", "host tokens/s", "rows/s", "1 process = 1"]]
  for count, values in rates.items():
    beside = np.divide(values, rates[found[0].processes])
    lines.append([
      str(count),
      runs.described(values, 0),
      f"{np.median(values) / tokens:.0f}",
      runs.described(beside.tolist(), 2),
    ])  # fmt: skip
  return verdict.markdown(lines)


def blocks(
  trainings: Sequence[Trained],
  reads: Sequence[Read],
  megabytes: float,
  cores: int,
) -> list[str]:
  """Return the page, but for its head."""
  losses = [one.loss for one in trainings]
  return [
    f"**All processes share the {cores} cores**: updates/s of several are what"
    " running together costs, and no speed-up can show.",
    trainings_table(trainings),
    f"One batch of {_BATCH} whatever the processes. Medians of"
    f" {len(trainings[0].gaps)} updates after {_WARM_UP}. Losses of the first"
    f" update are within {max(losses) - min(losses):.1e}. Bytes are `rchar` of"
    " /proc/self/io of each process, by number, one where all are equal: asked"
    f" of read calls, nothing of what is mapped. The artifact of the start holds"
    f" {megabytes:.1f} MB; over data each process reads all of it, over fsdp"
    " what its device holds. *Texts* are read for the lengths of the run, each"
    " process its share; *rows with images*, up to the first update, and those"
    " that were read ahead.",
    reading_table(reads),
    f"`feed.read` of a share, {_BATCH} examples an update, {_READ} of them;"
    " median, least and most of the rounds. Rows of LLaVA's form"
    " with photographs of 640x480, to 384 pixels. An image is 576 tokens; texts"
    " are cut by the toy's tokenizer. Each process reads with a thread a core.",
  ]


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="python -m bench.processes")
  parser.add_argument("--quick", action="store_true")
  parser.add_argument("--updates", type=int, default=20)
  parser.add_argument("--out", type=pathlib.Path, default="bench/results")
  for name in ("rows", "result"):
    parser.add_argument(f"--{name}", type=pathlib.Path, help=argparse.SUPPRESS)
  parser.add_argument("--read", type=int, default=0, help=argparse.SUPPRESS)
  parser.add_argument("--processes", default="none", help=argparse.SUPPRESS)
  return parser


def make_start(folder: pathlib.Path, recipe: str) -> tuple[str, float]:
  """Train a little from a random start; return its artifact and its MB."""
  said = runs.words(folder / "work", recipe, "--config.trained.steps=1")
  with runs.Together(
    folder / "run", 1, lambda _: said, caches=folder.parent / ".xla"
  ) as run:
    ended = run.end()
  if ended[0].code:
    raise runs.Hung(f"no artifact was made:\n{run.logs()}")
  artifact = folder / "work" / "trained"
  arrays = artifact / "params"
  size = sum(p.stat().st_size for p in arrays.rglob("*") if p.is_file())
  return str(artifact), size / 1e6


def measure(
  folder: pathlib.Path, *, quick: bool, updates: int
) -> tuple[list[Trained], list[Read], float]:
  """Return the trainings, the reads, and the MB of the start's artifact."""
  name, counts = ("quick", QUICK_COUNTS) if quick else ("", COUNTS)
  artifact, megabytes = make_start(folder / "start", name)
  recipe = f"{name},from={artifact}" if name else f"from={artifact}"
  trainings = [
    trained(count, mesh, folder, recipe, updates)
    for mesh in ("data", "fsdp")
    for count in counts
    if count > 1 or mesh == "data"
  ]
  rows = folder / "llava" / "llava.json"
  rows.parent.mkdir()
  files.write_llava(rows, _QUICK_ROWS if quick else _ROWS)
  # In turn, so that what slows the machine for a while slows all.
  reads = [
    read(count, rows, folder / f"reads{number}", 4 if quick else _READ)
    for number in range(1 if quick else _ROUNDS)
    for count in counts
  ]
  return trainings, reads, megabytes


def main() -> None:
  """Run the benchmark and write bench/results/processes.{md,json}."""
  flags = _parser().parse_args()
  if flags.read:
    read_share(flags)
    return
  updates, cores = 5 if flags.quick else flags.updates, os.cpu_count() or 1
  defaults: Mapping[str, Any] = {"quick": False, "updates": 20}
  report = results.Report(
    results.command("processes", flags, defaults),
    software=results.versions(("jax", "jaxlib", "flax", "numpy")),
  )
  with runs.Others() as others, tempfile.TemporaryDirectory() as scratch:
    trainings, reads, megabytes = measure(
      pathlib.Path(scratch), quick=flags.quick, updates=updates
    )
  report.publish(
    flags.out,
    "processes",
    *runs.warned(others.cores),
    *blocks(trainings, reads, megabytes, cores),
    machine=f", {cores} cores",
    cores=cores,
    other_cores=others.cores,
    artifact_megabytes=megabytes,
    trainings=[dataclasses.asdict(one) for one in trainings],
    reads=[dataclasses.asdict(one) for one in reads],
  )


if __name__ == "__main__":
  main()
