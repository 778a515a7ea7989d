"""One, two and four processes of one machine: what running together costs.

  python -m bench.processes [--quick] [--updates=20]

The same training, of 7 million parameters and a global batch of 16, by 1, 2 and
4 processes of one device each, over data and over fsdp; the start of a training
around an LLM of 200 million that is read from an artifact; and the same rows
read by as many processes, each its share. All processes share the cores, so
that updates a second here show the overhead alone, never a speed-up.

- Bytes read are `rchar` of /proc/self/io: those asked of read calls, of files
  in memory, too; what is mapped into memory is not in it.
- Rows are those that a process opened before its first update: their texts for
  the lengths, and those with images that were read.
- Host tokens a second are those of `feed.read`: rows of LLaVA's form with
  photographs, made here, to examples of 384 pixels, 576 tokens an image.

--quick runs a toy in less than two minutes; its page says nothing of speed.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench import results, verdict
from bench.data import files
from bench.joined import runs, share

COUNTS, QUICK_COUNTS = (1, 2, 4), (1, 2)
# The updates that are left out of a rate, the first of which compile.
_WARM_UP = 2
_ROWS, _QUICK_ROWS = 2_000, 100
# Updates that are read for a rate, and how often.
_READ, _ROUNDS = 40, 3


@dataclasses.dataclass(frozen=True)
class Trained:
  """A training: seconds from update to update, of the first process."""

  processes: int
  mesh: str
  gaps: tuple[float, ...]
  loss: float


@dataclasses.dataclass(frozen=True)
class Opened:
  """The start of a training, until its first update; each process its number.

  `joined` are bytes read up to joining, `read` from there on; `texts` and
  `pixels` the rows read.
  """

  processes: int
  mesh: str
  joined: tuple[int, ...]
  read: tuple[int, ...]
  texts: tuple[int, ...]
  pixels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Read:
  """The input alone: seconds of each process, and what all have read."""

  processes: int
  seconds: tuple[float, ...]
  rows: int
  tokens: int


def _words(count: int, mesh: str, work: pathlib.Path, recipe: str) -> list[str]:
  other = "fsdp" if mesh == "data" else "data"
  # No save among the updates that are timed.
  told = "--config.trained.save_every=1000"
  sizes = (f"--config.mesh.{other}=1", f"--config.mesh.{mesh}={count}")
  return runs.words(work / "work", recipe, *sizes, told)


def trained(
  count: int, mesh: str, folder: pathlib.Path, recipe: str, updates: int
) -> Trained:
  """Return the update times of a training of `count` processes."""
  work = folder / f"{mesh}{count}"
  said = _words(count, mesh, work, recipe)
  with runs.Together(
    work / "run", count, lambda _: said, caches=folder / ".xla"
  ) as run:
    run.wait_for("update", step=_WARM_UP + updates + 1, seconds=600)
    times = [m["time"] for m in run.marks(0) if m["what"] == "update"]
    run.kill()
    run.end()
  lines = (work / "work" / "trained" / "metrics.jsonl").read_text().splitlines()
  gaps = np.diff(times[_WARM_UP : _WARM_UP + updates + 1]).tolist()
  loss = json.loads(lines[0])["losses/total"]
  return Trained(count, mesh, tuple(gaps), loss)


def opened(count: int, mesh: str, folder: pathlib.Path, recipe: str) -> Opened:
  """Return the bytes and rows read before the first update of a training."""
  work = folder / f"opened-{mesh}{count}"
  said = _words(count, mesh, work, recipe)
  with runs.Together(
    work / "run", count, lambda _: said, caches=folder / ".xla"
  ) as run:
    for index in range(count):
      run.wait_for("updating", index=index, seconds=600)
    each = [{m["what"]: m for m in run.marks(i)} for i in range(count)]
    run.kill()
    run.end()
  ready = [one["updating"] for one in each]
  joined = [one["joined"]["read"] for one in each]
  return Opened(
    processes=count,
    mesh=mesh,
    joined=tuple(joined),
    read=tuple(x["read"] - y for x, y in zip(ready, joined, strict=True)),
    texts=tuple(one["rows"].get("texts", 0) for one in ready),
    pixels=tuple(one["rows"].get("pixels", 0) for one in ready),
  )


def trainings_table(found: Sequence[Trained]) -> str:
  """Return the rates of trainings as a Markdown table."""
  lines = [["processes", "mesh", "updates/s", "p10–p90", "1 process = 1"]]
  alone = verdict.spread(found[0].gaps)[1]
  for one in found:
    low, middle, high = verdict.spread(one.gaps)
    lines.append([
      str(one.processes),
      one.mesh,
      f"{1 / middle:.2f}",
      f"{1 / high:.2f}–{1 / low:.2f}",
      f"{alone / middle:.2f}",
    ])  # fmt: skip
  return verdict.markdown(lines)


def opened_table(found: Sequence[Opened], megabytes: float) -> str:
  """Return the starts of trainings as a Markdown table."""
  head = ["processes", "mesh", "MB read, imports", "MB read, from there on"]
  head += ["that of all, artifact = 1", "texts", "rows with images"]
  lines = [head]
  for one in found:
    lines.append([
      str(one.processes),
      one.mesh,
      _each([x / 1e6 for x in one.joined]),
      _each([x / 1e6 for x in one.read], 0),
      f"{sum(one.read) / 1e6 / megabytes:.2f}",
      _each(one.texts, 0),
      _each(one.pixels, 0),
    ])  # fmt: skip
  return verdict.markdown(lines)


def _each(values: Sequence[float], digits: int = 1) -> str:
  """Return the numbers of the processes, one where all are equal."""
  shown = [f"{value:,.{digits}f}" for value in values]
  return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def read(count: int, rows: pathlib.Path, folder: pathlib.Path, n: int) -> Read:
  """Return what `count` processes took to read their shares at one time."""
  place = folder / f"read{count}"
  said = ["-m", "bench.joined.share", f"--rows={rows}", f"--updates={n}"]
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
  starts: Sequence[Opened],
  reads: Sequence[Read],
  megabytes: float,
  cores: int,
) -> list[str]:
  """Return the page, but for its head."""
  losses = [one.loss for one in trainings]
  return [
    "## Updates",
    f"**All processes share the {cores} cores**: updates/s of several are what"
    " running together costs, and no speed-up can show.",
    trainings_table(trainings),
    f"One batch of {share.BATCH} whatever the processes. Medians of"
    f" {len(trainings[0].gaps)} updates after {_WARM_UP}."
    " Losses of the first update are within"
    f" {max(losses) - min(losses):.1e} of one another.",
    "## What is read at the start",
    opened_table(starts, megabytes),
    f"From an artifact of {megabytes:.3g} MB, up to the first update. Bytes are"
    " `rchar` of /proc/self/io of each process in their order, one number where"
    " all are equal: asked of read calls, nothing of what is mapped. Each"
    " verifies its part of the artifact and reads what its devices hold of it:"
    " over data all, over fsdp a part; arrays of less than 64 MiB it reads with"
    " their neighbors. *Texts* are read for the lengths of the run, each process"
    " its share; *rows with images*, of the first updates, with those that were"
    " read ahead.",
    "## Input alone",
    reading_table(reads),
    f"`feed.read` of a share of {reads[0].rows} rows, {share.BATCH} an update;"
    " median, least and most of the rounds. Rows of LLaVA's form with"
    " photographs of 640x480, to 384 pixels. An image is 576 tokens; texts are"
    " cut by the toy's tokenizer. Each process reads with a thread a core.",
  ]


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
) -> tuple[list[Trained], list[Opened], list[Read], float]:
  """Return trainings, starts, reads, and the MB of the artifact of the starts."""
  counts = QUICK_COUNTS if quick else COUNTS
  meshes = [
    (count, mesh)
    for mesh in ("data", "fsdp")
    for count in counts
    if count > 1 or mesh == "data"
  ]
  name = "quick" if quick else ""
  trainings = []
  for count, mesh in meshes:
    _say(f"{count} processes train over {mesh}")
    trainings.append(trained(count, mesh, folder, name, updates))
  large = "quick" if quick else "large"
  artifact, megabytes = make_start(folder / "start", large)
  recipe, starts = f"{large},from={artifact}", []
  for count, mesh in meshes:
    _say(f"{count} processes start over {mesh}")
    starts.append(opened(count, mesh, folder, recipe))
  rows = folder / "llava" / "llava.json"
  rows.parent.mkdir()
  files.write_llava(rows, _QUICK_ROWS if quick else _ROWS)
  # In turn, so that what slows the machine for a while slows all.
  reads = [
    read(count, rows, folder / f"reads{number}", 4 if quick else _READ)
    for number in range(1 if quick else _ROUNDS)
    for count in counts
  ]
  return trainings, starts, reads, megabytes


def _say(what: str) -> None:
  print(f"processes: {what}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)


def main() -> None:
  """Run the benchmark and write bench/results/processes.{md,json}."""
  parser = argparse.ArgumentParser(prog="python -m bench.processes")
  parser.add_argument("--quick", action="store_true")
  parser.add_argument("--updates", type=int, default=20)
  parser.add_argument("--out", type=pathlib.Path, default="bench/results")
  flags = parser.parse_args()
  updates, cores = 5 if flags.quick else flags.updates, os.cpu_count() or 1
  defaults: Mapping[str, Any] = {"quick": False, "updates": 20}
  report = results.Report(
    results.command("processes", flags, defaults),
    software=results.versions(("jax", "jaxlib", "flax", "numpy")),
  )
  with runs.Others() as others, tempfile.TemporaryDirectory() as scratch:
    trainings, starts, reads, megabytes = measure(
      pathlib.Path(scratch), quick=flags.quick, updates=updates
    )
  report.publish(
    flags.out,
    "processes",
    *([runs.TOY] if flags.quick else []),
    *runs.warned(others.cores),
    *blocks(trainings, starts, reads, megabytes, cores),
    machine=f", {cores} cores",
    cores=cores,
    other_cores=others.cores,
    artifact_megabytes=megabytes,
    trainings=[dataclasses.asdict(one) for one in trainings],
    starts=[dataclasses.asdict(one) for one in starts],
    reads=[dataclasses.asdict(one) for one in reads],
  )


if __name__ == "__main__":
  main()
