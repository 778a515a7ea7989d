"""Sources as large as the published ones: opening, memory, reading, packing.

  python -m bench.data [--rows=3200000] [--pairs=3000000] [--tokenizer=FOLDER]

Makes a LLaVA JSON list and an MMPR folder of made-up text (10 GB at full size)
in a temporary folder, or in `--folder` where they are kept and used again, and
measures each thing in a process of its own. The tokenizer is the packaged toy
unless another is given; published rates are of Qwen2.5's. Files lie in the page
cache as far as memory reaches.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

from bench import harness, results
from bench.data import files, runs, tables

KINDS = ("llava", "mmpr")
ROWS, PAIRS = 3_200_000, 3_000_000
# Updates of an epoch over the 3.2 million rows.
EPOCH = 12_446
PARTS = ("read", "measure", "pack", "choose", "lay_out")
LIBRARIES = ("numpy", "jax", "grain", "tokenizers", "pillow")

Found = dict[str, Any]
Run = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Amounts to measure.

  texts, pictures: random reads. measured: rows whose lengths are measured, by
  two processes twice as many, too. updates: packed, the first not timed, of
  `batch`. chosen: pairs of a training set. steps: updates that are laid out.
  """

  texts: int = 10_000
  pictures: int = 1_000
  measured: int = 40_000
  batch: int = 256
  updates: int = 12
  chosen: int = 20_000
  steps: int = EPOCH


def fresh(name: str, *args: Any, **kwargs: Any) -> Any:
  """Call one of `runs.RUNS` in a new process."""
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    return pool.submit(runs.RUNS[name], *args, **kwargs).result()


def measure(
  paths: Mapping[str, pathlib.Path],
  tokenizer: str,
  plan: Plan,
  only: Sequence[str] = PARTS,
  run: Run = fresh,
) -> list[Found]:
  """Return an entry for each run: its arguments and its results."""
  found = []

  def note(name: str, *args, about: Mapping[str, Any], **kwargs):
    load, began, other = os.getloadavg()[0], time.monotonic(), _other_work()
    made = run(name, *args, **kwargs)
    seconds, other = time.monotonic() - began, _other_work() - other
    print(f"{name} {dict(about)}: {seconds:.1f} s", flush=True)
    machine = {"load": load, "other_work": max(0.0, other / seconds)}
    found.append({"run": name, **about, "machine": machine, "found": made})

  for kind in KINDS:
    # Always: others would open for the first time.
    note("index", kind, paths[kind], about={"kind": kind})
  for kind in KINDS:
    if "read" in only:
      reads = {"texts": plan.texts, "pictures": plan.pictures}
      note("read", kind, paths[kind], about={"kind": kind}, **reads)
  for kind in KINDS:
    if "measure" in only:
      for processes, rows in ((1, 1), (2, 1), (2, 2)):
        about = {"processes": processes, "rows": rows * plan.measured}
        where = kind, paths[kind], tokenizer
        note("measure", *where, about=about | {"kind": kind}, **about)
  for kind in KINDS:
    if "pack" in only:
      _pack(note, kind, paths[kind], tokenizer, plan, run)
  for way in ("official", "fixed"):
    if "choose" in only:
      size = {"size": plan.chosen}
      note("choose", way, paths["mmpr"], tokenizer, about={"way": way}, **size)
  if "lay_out" in only:
    note("lay_out", about={}, batch=plan.batch, steps=plan.steps)
  return found


def _other_work() -> float:
  """Return the seconds that cores have been busy with others' processes."""
  return harness.busy_seconds() - sum(os.times()[:4])


def _pack(note, kind, path, tokenizer, plan: Plan, run: Run) -> None:
  size = {"batch": plan.batch, "updates": plan.updates}
  where = kind, path, tokenizer
  layout = run("layout", *where, **size)
  for pixels in (False, True):
    for threads in (0, 1, 2):
      given = size | {"pixels": pixels, "threads": threads}
      note("pack", *where, about=given | {"kind": kind}, of=layout, **given)


def make(
  folder: pathlib.Path, rows: int, pairs: int
) -> dict[str, pathlib.Path]:
  """Write the files that a folder lacks; return the path of each kind."""
  paths = {
    "llava": folder / f"llava-{rows}" / "llava.json",
    "mmpr": folder / f"mmpr-{pairs}" / "MMPR-v1.2" / "meta.json",
  }
  if not paths["llava"].exists():
    files.write_llava(paths["llava"], rows)
  if not paths["mmpr"].exists():
    files.write_mmpr(paths["mmpr"].parents[1], pairs)
  return paths


@contextlib.contextmanager
def _folder(given: str) -> Iterator[pathlib.Path]:
  """Give the folder of the files, and make a cache of indices to remove."""
  with tempfile.TemporaryDirectory(prefix="pivot-jax-data-") as made:
    os.environ["PIVOT_JAX_CACHE"] = str(pathlib.Path(made) / "cache")
    yield pathlib.Path(given or made)


def main() -> None:
  """Make the files, measure, and write data.md and data.json."""
  parser = argparse.ArgumentParser(prog="python -m bench.data")
  parser.add_argument("--rows", type=int, default=ROWS)
  parser.add_argument("--pairs", type=int, default=PAIRS)
  parser.add_argument("--folder", default="", help="kept, and used again")
  parser.add_argument("--tokenizer", default="package:toy")
  parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
  parser.add_argument("--out", type=pathlib.Path, default="bench/results")
  flags = parser.parse_args()
  defaults = {"rows": ROWS, "pairs": PAIRS, "only": list(PARTS)}
  command = results.command("data", flags, defaults)
  if flags.tokenizer != "package:toy":
    command += " --tokenizer=FOLDER"
  report = results.Report(command, software=results.versions(LIBRARIES))
  plan = Plan(steps=max(1, EPOCH * flags.rows // ROWS))
  with _folder(flags.folder) as folder:
    began = time.monotonic()
    paths = make(folder, flags.rows, flags.pairs)
    writing = time.monotonic() - began
    done = measure(paths, flags.tokenizer, plan, flags.only)
  cores = len(os.sched_getaffinity(0))
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  report.publish(
    flags.out,
    "data",
    f"Writing the files took {writing:.0f} s. The tables give the load before"
    " each run, and how many cores did other work meanwhile.",
    *tables.blocks(done),
    machine=f", {cores} cores shared with other work, {memory >> 30} GiB",
    cores=cores,
    memory=memory,
    plan=dataclasses.asdict(plan),
    writing_seconds=writing,
    runs=done,
  )


if __name__ == "__main__":
  main()
