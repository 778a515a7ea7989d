"""The cost of a stop: going on after kill -9, the end of all, saving meanwhile.

  python -m bench.restart [--quick] [--repeats=3] [--large]

Three measurements on one machine, whose processes talk by Gloo over loopback:

- A training of 7 million parameters is killed after a save and started again by
  the same command: seconds to its first new update, and what they went into.
- One of two processes is killed, stopped, stuck or wrong: seconds until the
  other has ended, too, and how.
- A state is saved: seconds that the training waits, and until it is on disk, for
  0.1 and 0.5 billion parameters. --large saves 1.5 billion, too, where memory
  and disk have room.

--quick runs a part of it on toys in less than two minutes; its page says nothing
of speed.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench import faults, harness, results, verdict
from bench.joined import runs, stall

# From the last of these marks to the next one, what a start goes into.
PHASES = (
  ("Python, imports", "imported"),
  ("joining", "joined"),
  ("checks, weights", "restoring"),
  ("restore", "restored"),
  ("layout, rows", "updating"),
  ("first update", "updated"),
)
BILLIONS, LARGE = (0.1, 0.5), 1.5
WAYS = tuple(stall.NEED)
_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Plan:
  """The sizes of a command."""

  repeats: int
  recipe: str
  counts: tuple[int, ...]
  faults: tuple[faults.Fault, ...]
  parameters: tuple[float, ...]
  left_out: tuple[float, ...]


FULL = Plan(3, "", (1, 2), faults.FAULTS, BILLIONS, (LARGE,))
QUICK = Plan(
  repeats=1,
  recipe="quick",
  counts=(2,),
  faults=tuple(one for one in faults.FAULTS if one.quick),
  parameters=(0.001,),
  left_out=(),
)


@dataclasses.dataclass(frozen=True)
class Start:
  """A start after a kill: seconds by phase, and of all compilations."""

  processes: int
  warm: bool
  phases: Mapping[str, float]
  compiled: float
  step: int

  @property
  def seconds(self) -> float:
    """Return the seconds from the start to the first new update."""
    return sum(self.phases.values())


def restarts(count: int, plan: Plan, folder: pathlib.Path) -> list[Start]:
  """Kill a training of `count` processes after a save; start it again, often."""
  work, kept = folder / "work", folder / "kept"
  caches = folder / ".xla"
  said = runs.words(work, plan.recipe)
  with runs.Together(
    folder / "first", count, lambda _: said, caches=caches
  ) as first:
    first.wait_for("update", step=6, also=lambda: bool(runs.steps_kept(work)))
    first.kill()
    first.end()
  step = runs.steps_kept(work)[-1]
  work.rename(kept)
  found = []
  for number in range(2 * plan.repeats):
    warm = bool(number % 2)
    if not warm:
      # The start with an empty cache fills it for the one behind it.
      shutil.rmtree(caches)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(kept, work)
    with runs.Together(
      folder / f"start{number}", count, lambda _: said, caches=caches
    ) as again:
      for index in range(count):
        again.wait_for("updated", index=index)
      again.kill()
      again.end()
      found.append(_start(again, warm=warm, step=step))
  return found


def _start(run: runs.Together, *, warm: bool, step: int) -> Start:
  """Return the phases of the first process, which is no later than another."""
  if f"resumes at step {step}," not in run.said(0):
    raise runs.Hung(f"it did not go on at step {step}:\n{run.logs()}")
  marks = {one["what"]: one for one in run.marks(0)}
  times = [run.began, *(marks[what]["time"] for _, what in PHASES)]
  names = [name for name, _ in PHASES]
  return Start(
    processes=run.count,
    warm=warm,
    phases=dict(zip(names, np.diff(times).tolist(), strict=True)),
    compiled=marks["updated"]["compiled"],
    step=step,
  )


def starts_table(starts: Sequence[Start]) -> str:
  """Return the starts as a Markdown table."""
  names = [name for name, _ in PHASES]
  head = ["processes", "cache", "start to first new update s", *names]
  lines = [[*head, "of it compiling"]]
  kinds = dict.fromkeys((one.processes, one.warm) for one in starts)
  for count, warm in kinds:
    of = [x for x in starts if (x.processes, x.warm) == (count, warm)]
    phases = [
      runs.described([one.phases[name] for one in of]) for name in names
    ]
    lines.append([
      str(count),
      "full" if warm else "empty",
      runs.described([one.seconds for one in of]),
      *phases,
      runs.described([one.compiled for one in of]),
    ])  # fmt: skip
  return verdict.markdown(lines)


def disturbed(plan: Plan, folder: pathlib.Path) -> list[faults.Outcome]:
  """Return the ends of disturbed runs, all of a fault side by side."""
  found = []
  for fault in plan.faults:
    # Those that wait for a minute and more wait equally long each time.
    for _ in range(1 if fault.most > 60 else plan.repeats):
      found.append(faults.run(fault, folder, folder / ".xla"))
      _say(f"{fault.name}: {found[-1].seconds:.1f} s, {found[-1].codes}")
  return found


def saves(plan: Plan, folder: pathlib.Path) -> list[dict[str, Any]]:
  """Return the measurements of saves, by size and way."""
  found = [
    _save(billions, way, folder) for billions in plan.parameters for way in WAYS
  ]
  asked = "not asked for (--large)"
  return found + [
    {"billions": billions, "way": way, "why": asked}
    for billions in plan.left_out
    for way in WAYS
  ]


def _save(billions: float, way: str, folder: pathlib.Path) -> dict[str, Any]:
  found: dict[str, Any] = {"billions": billions, "way": way}
  why = stall.refused(1e9 * billions, way, folder)
  if why:
    return found | {"why": why}
  _say(f"{billions:g} billion, {way}")
  done = subprocess.run(
    [
      *(sys.executable, "-m", "bench.joined.stall", f"--way={way}"),
      *(f"--parameters={round(1e9 * billions)}", f"--rounds={_ROUNDS}"),
      f"--folder={folder}",
    ],
    check=True,
    stdout=subprocess.PIPE,
    env={**os.environ, **harness.cpu_only(folder)},
  )
  return found | json.loads(done.stdout)


def saves_table(found: Sequence[Mapping[str, Any]]) -> str:
  """Return the saves as a Markdown table."""
  head = ["billion parameters", "GB", "save", "training waits s"]
  head += ["on disk after s", "peak above the state GB", "restore s"]
  lines = [[*head, "its peak above GB", "the same bytes, plainly s"]]
  for one in found:
    size = f"{12 * one['billions']:.3g}"
    if "why" in one:
      why = f"not run: {one['why']}"
      lines.append([f"{one['billions']:g}", size, one["way"], why, *[""] * 5])
      continue
    lines.append([
      f"{one['billions']:g}",
      size,
      one["way"] + (" (the default)" if _is_default(one) else ""),
      runs.described(one["stalls"], 2),
      runs.described(one["totals"]),
      f"{max(one['above']) / 1e9:.2f}",
      f"{one['restore']:.1f}",
      f"{one['restore_above'] / 1e9:.2f}",
      f"{one['plain']:.1f}",
    ])  # fmt: skip
  return verdict.markdown(lines)


def _is_default(one: Mapping[str, Any]) -> bool:
  return one["default_waits"] == (one["way"] != WAYS[0])


def ratios(found: Sequence[Mapping[str, Any]]) -> list[str]:
  """Return how many times longer a training waits for a save leaf by leaf."""
  waits = {
    (one["billions"], one["way"]): float(np.median(one["stalls"]))
    for one in found
    if "stalls" in one
  }
  return [
    f"- {billions:g} billion: leaf by leaf a training waits"
    f" {waits[billions, WAYS[1]] / waits[billions, WAYS[0]]:.0f} times as long"
    for billions in dict.fromkeys(size for size, _ in waits)
    if all((billions, way) in waits for way in WAYS)
  ]


def _say(what: str) -> None:
  print(f"restart: {what}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)


def blocks(
  starts: Sequence[Start],
  ends: Sequence[faults.Outcome],
  saved: Sequence[Mapping[str, Any]],
) -> list[str]:
  """Return the page, but for its head."""
  return [
    "## From kill -9 to the first new update",
    starts_table(starts),
    "Of the first process; the update itself is in *first update*. A start with"
    " a full cache reads what the one before it compiled, of 0.2 s and longer;"
    " of several processes the first alone writes the cache. All of them share"
    " the cores. Checkpoint and cache are on a local disk, and in its memory.",
    "## One of two processes fails",
    faults.table(ends),
    "*Promised* are the seconds of the design; 100 s is the heartbeat of a run,"
    " 5 s that of the tests. A training of a toy, 0.2 s an update, a save every"
    " five. -9: killed by us; -6: ended by jax, SIGABRT, 134 for a shell; 0: the"
    " training went on to its end. Seconds are of the runs that ended as"
    " promised.",
    "## Saving a state",
    saves_table(saved),
    "\n".join(ratios(saved)),
    f"Parameters and Adam's two moments, float32, {3 * 16} arrays, one process,"
    f" which only waits while it is written; {_ROUNDS} saves after one that"
    " compiles. Both ways check sums and verify them when they restore. *Peak*"
    " is anonymous memory, sampled: the files' pages are not in it. On a CPU an"
    " array that is written leaf by leaf needs no copy; on an accelerator it is"
    " one leaf. Writing the same bytes plainly, with fsync, is what the disk"
    " gave at that time.",
    "Not measured here: a network file system, accelerators, several hosts.",
  ]


def main() -> None:
  """Run the benchmark and write bench/results/restart.{md,json}."""
  parser = argparse.ArgumentParser(prog="python -m bench.restart")
  parser.add_argument("--quick", action="store_true")
  parser.add_argument("--large", action="store_true")
  parser.add_argument("--repeats", type=int, default=FULL.repeats)
  parser.add_argument("--out", type=pathlib.Path, default="bench/results")
  flags = parser.parse_args()
  plan = dataclasses.replace(FULL, repeats=flags.repeats)
  if flags.large:
    plan = dataclasses.replace(plan, parameters=(*BILLIONS, LARGE), left_out=())
  if flags.quick:
    plan = QUICK
  defaults = {"quick": False, "large": False, "repeats": FULL.repeats}
  report = results.Report(
    results.command("restart", flags, defaults),
    software=results.versions(LIBRARIES),
  )
  with runs.Others() as others, tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    starts = []
    for count in plan.counts:
      _say(f"{count} processes killed and started again")
      starts += restarts(count, plan, folder / f"restart{count}")
    ends = disturbed(plan, folder / "faults")
    saved = saves(plan, folder)
  report.publish(
    flags.out,
    "restart",
    *([runs.TOY] if flags.quick else []),
    *runs.warned(others.cores),
    *blocks(starts, ends, saved),
    machine=f", {os.cpu_count()} cores",
    other_cores=others.cores,
    starts=[dataclasses.asdict(one) for one in starts],
    ends=[dataclasses.asdict(one) for one in ends],
    saves=saved,
  )


LIBRARIES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")

if __name__ == "__main__":
  main()
