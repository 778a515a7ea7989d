"""Side-by-side benchmarks: one process for each variant, a gate, the clocks.

This file knows no model and imports neither jax nor torch; `bench/verdict.py`
turns what it measures into a table, `bench/record.py` writes it down. A benchmark is a module bench/NAME.py:

  def ours(folder):             # in a process of its own; imports go in here
    ...
    return side_by_side.stepping(step, numbers)

  BENCH = side_by_side.Bench(
    name="NAME",
    setup=...,                  # (folder, options) -> what a step does
    variants=(side_by_side.Variant("torch", "torch, eager", theirs),
              side_by_side.Variant("ours", "pivot_jax", ours, again=True)),
    reference="torch",          # its numbers are what the others must give
    ours="ours",
    limits={"logps": 1e-4},     # relative, for each kind of number
  )

  if __name__ == "__main__":
    side_by_side.main(BENCH)

`step()` does one whole step and returns when its last result is there; no
part of it may be left to the next one. `numbers()` is called once, after three
steps, and returns {name: array} of what all variants must agree on ("loss",
"update/head", ...: see `verdict.errors`); it may compute, it is not timed. A
process whose numbers differ from the reference's ends before its timed steps,
and the command ends without a table.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bench import record, verdict

CORES = 2
# Steps before the numbers are compared; one more is not timed after that.
GATE_STEPS = 3
_STEPS = 8


class GateError(Exception):
  """A variant computes something else than the reference."""


@dataclasses.dataclass(frozen=True)
class Ready:
  """A variant set up in its process.

  `drive(count, begin, end)` does `count` steps and calls `begin()` and `end()`
  around each: for a peer that owns its loop. Others use `stepping`.
  """

  drive: Callable[[int, Callable, Callable], None]
  numbers: Callable[[], verdict.Numbers]


def stepping(
  step: Callable[[], Any], numbers: Callable[[], verdict.Numbers]
) -> Ready:
  """Returns a variant of a function that does one step."""

  def drive(count, begin, end):
    for _ in range(count):
      begin()
      step()
      end()

  return Ready(drive=drive, numbers=numbers)


@dataclasses.dataclass(frozen=True)
class Variant:
  """One row of the table.

  `settings` says how a peer is run, for the reader. `again` runs it a second
  time at the end, with the compiled code of the first run at hand: that gives
  the warm first step, and the difference of the two is the noise. `limits`
  replaces those of the benchmark for this row: {} reports and demands nothing.
  `part` is for a row that does not do the whole step: it is compared with none.
  """

  name: str
  label: str
  make: Callable[[pathlib.Path], Ready]
  settings: str = ""
  again: bool = False
  limits: Mapping[str, float] | None = None
  part: bool = False


@dataclasses.dataclass(frozen=True)
class Bench:
  """A benchmark; the module that holds it is bench/`name`.py.

  `setup(folder, options)` writes models and data that every variant reads, and
  returns {"pairs": 8}: what one step does, by the one definition for all.
  `options` are whole numbers with their defaults, flags of the command.
  `warm_up` counts the steps before the timed ones and `steps` is the default of
  `--steps`: where a step takes minutes, one of each is enough.
  `summary(rows, work)` returns (lines to print below the table, JSON).
  """

  name: str
  setup: Callable[[pathlib.Path, Mapping[str, int]], Mapping[str, float]]
  variants: Sequence[Variant]
  reference: str
  ours: str
  limits: Mapping[str, float]
  options: Mapping[str, int] = dataclasses.field(default_factory=dict)
  warm_up: int = GATE_STEPS + 1
  steps: int = _STEPS
  summary: Callable[
    [Mapping[str, verdict.Row], Mapping[str, float]],
    tuple[list[str], dict[str, Any]],
  ] = lambda rows, work: ([], {})

  def variant(self, name: str) -> Variant:
    """Returns the variant of a name."""
    return {v.name: v for v in self.variants}[name]


def main(bench: Bench) -> None:
  """Runs the benchmark, or one variant of it in the process it was given."""
  flags = _parser(bench).parse_args()
  if flags.variant:
    _child(bench, flags)
    return
  if flags.setup:
    options = {k: vars(flags)[k] for k in bench.options}
    work = bench.setup(flags.folder, options)
    (flags.folder / "work.json").write_text(json.dumps(dict(work)))
    return
  try:
    _parent(bench, flags)
  except GateError as error:
    sys.exit(f"{bench.name}: no timings, the variants disagree: {error}")


def _parser(bench: Bench) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog=f"python -m bench.{bench.name}")
  parser.add_argument("--out", type=pathlib.Path, default="bench/results")
  parser.add_argument("--name", default=bench.name, help="of the result files")
  parser.add_argument(
    "--steps", type=int, default=bench.steps, help="timed steps"
  )
  parser.add_argument("--only", default="", help="variants, comma-separated")
  for name, value in bench.options.items():
    parser.add_argument(f"--{name}", type=int, default=value)
  for name in ("variant", "folder", "result"):
    kind = str if name == "variant" else pathlib.Path
    parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
  parser.add_argument("--setup", action="store_true", help=argparse.SUPPRESS)
  return parser


def _parent(bench: Bench, flags) -> None:
  """Runs every variant and writes what came out."""
  began = time.monotonic()
  # Inherited by every process that is started from here.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
  chosen = _chosen(bench, flags.only)
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    sizes = [f"--{k}={vars(flags)[k]}" for k in bench.options]
    _run(bench, folder, "setup", ["--setup", *sizes])
    work = json.loads((folder / "work.json").read_text())
    found = {v.name: [_measure(bench, v, folder, flags)] for v in chosen}
    for variant in chosen:
      if variant.again:
        found[variant.name].append(_measure(bench, variant, folder, flags))
  rows = [_row(variant, found[variant.name]) for variant in chosen]
  lines, extra = bench.summary({row.name: row for row in rows}, work)
  report = _describe(bench, flags) | {
    "seconds": time.monotonic() - began,
    "work_of_a_step": work,
    "rows": [dataclasses.asdict(row) for row in rows],
    "runs": found,
    "summary": extra,
  }
  table = verdict.table(rows, bench.ours, work)
  text = record.markdown(report, table, lines, rows)
  print(text)
  record.write(flags.out, flags.name, text, report)


def _chosen(bench: Bench, only: str) -> list[Variant]:
  """Returns the variants to run, the reference first."""
  names = only.split(",") if only else [v.name for v in bench.variants]
  unknown = set(names) - {v.name for v in bench.variants}
  if unknown:
    sys.exit(f"--only: no variant is named {', '.join(sorted(unknown))}")
  rest = [v for v in bench.variants if v.name in names]
  first = bench.variant(bench.reference)
  return [first, *(v for v in rest if v.name != first.name)]


def _measure(bench: Bench, variant: Variant, folder, flags) -> dict[str, Any]:
  """Returns what one process of a variant measured."""
  print(f"{bench.name}: {variant.name}", file=sys.stderr, flush=True)
  result = folder / "result.json"
  arguments = [f"--variant={variant.name}", f"--result={result}"]
  before = os.getloadavg()[0]
  began = time.monotonic()
  _run(bench, folder, variant.name, [*arguments, f"--steps={flags.steps}"])
  found = json.loads(result.read_text())
  result.unlink()
  if found["failures"]:
    raise GateError(f"{variant.name}: {'; '.join(found['failures'])}")
  found["process_seconds"] = time.monotonic() - began
  return found | {"load_before": before, "load_after": os.getloadavg()[0]}


def _run(bench: Bench, folder, name: str, arguments: Sequence[str]) -> None:
  """Runs the benchmark's module in a process of its own."""
  caches = folder / "caches" / name
  environment = os.environ | {
    "OMP_NUM_THREADS": str(CORES),
    "OMP_WAIT_POLICY": "PASSIVE",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Empty at the first run of a variant, filled by it for the second.
    "JAX_COMPILATION_CACHE_DIR": str(caches / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "TORCHINDUCTOR_CACHE_DIR": str(caches / "torch"),
  }
  command = [sys.executable, "-m", f"bench.{bench.name}", *arguments]
  done = subprocess.run(
    [*command, f"--folder={folder}"],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  if done.returncode:
    sys.exit(f"{bench.name}: {name} ended with an error\n{done.stdout[-4000:]}")


def _child(bench: Bench, flags) -> None:
  """Measures one variant in this process and writes a JSON file."""
  variant = bench.variant(flags.variant)
  began = time.perf_counter()
  ready = variant.make(flags.folder)
  found: dict[str, Any] = {"make_seconds": time.perf_counter() - began}
  watch = _Watch(
    lambda: _gate(bench, variant, flags.folder, ready.numbers()),
    min(GATE_STEPS, bench.warm_up),
  )
  found["failures"] = []
  try:
    ready.drive(bench.warm_up + flags.steps, watch.begin, watch.end)
  except GateError as error:
    found["failures"] = error.args[0]
  timed = bench.warm_up
  walls, cpus = watch.walls[timed:], watch.cpus[timed:]
  found |= {
    "errors": watch.errors,
    "first_seconds": watch.walls[0],
    "walls": walls,
    "cpus": cpus,
    "other_work": (sum(watch.busy[timed:]) - sum(cpus)) / max(sum(walls), 1e-9),
    "peak_resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    / 1024,
  }
  flags.result.write_text(json.dumps(found))


def _gate(bench, variant, folder, numbers) -> dict[str, float]:
  """Returns the differences to the reference; raises GateError over a limit."""
  kept = folder / "reference.npz"
  if variant.name == bench.reference and not kept.exists():
    np.savez(kept, **numbers)
  limits = bench.limits if variant.limits is None else variant.limits
  differences = {
    kind: value
    for kind, value in verdict.errors(numbers, np.load(kept)).items()
    # A row of other limits need not give all numbers, but what it must.
    if kind in limits or np.isfinite(value)
  }
  failures = verdict.failures(differences, limits)
  if failures:
    raise GateError(failures)
  return differences


class _Watch:
  """Wall and CPU seconds of steps; opens the gate between two of them."""

  def __init__(self, gate: Callable[[], Mapping[str, float]], steps: int):
    self.walls: list[float] = []
    self.cpus: list[float] = []
    self.busy: list[float] = []
    self.errors: Mapping[str, float] = {}
    self._gate = gate
    self._steps = steps
    self._start = (0.0, 0.0, 0.0)

  def begin(self) -> None:
    self._start = (time.perf_counter(), _cpu_seconds(), _busy_seconds())

  def end(self) -> None:
    self.walls.append(time.perf_counter() - self._start[0])
    self.cpus.append(_cpu_seconds() - self._start[1])
    self.busy.append(_busy_seconds() - self._start[2])
    if len(self.walls) == self._steps:
      self.errors = self._gate()


def _cpu_seconds() -> float:
  """Returns the CPU seconds of this process and of its ended children."""
  both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  used = [resource.getrusage(who) for who in both]
  return sum(one.ru_utime + one.ru_stime for one in used)


def _busy_seconds() -> float:
  """Returns the seconds that all cores of the machine have been busy."""
  text = pathlib.Path("/proc/stat").read_text(encoding="ascii")
  user, nice, system, _, _, irq, softirq, steal = map(int, text.split()[1:9])
  ticks = user + nice + system + irq + softirq + steal
  return ticks / os.sysconf("SC_CLK_TCK")


def _row(variant: Variant, runs: Sequence[Mapping[str, Any]]) -> verdict.Row:
  first = runs[0]
  return verdict.Row(
    name=variant.name,
    label=variant.label,
    settings=variant.settings,
    walls=tuple(first["walls"]),
    cpus=tuple(first["cpus"]),
    first=tuple(run["first_seconds"] for run in runs),
    again=_medians(runs[1]) if len(runs) > 1 else None,
    errors=first["errors"],
    load=(first["load_before"], first["load_after"]),
    other_work=first["other_work"],
    part=variant.part,
  )


def _medians(run: Mapping[str, Any]) -> tuple[float, float]:
  return float(np.median(run["walls"])), float(np.median(run["cpus"]))


def _describe(bench: Bench, flags) -> dict[str, Any]:
  """Returns what was run and on what; of the flags those that change numbers."""
  defaults = {"steps": bench.steps, "only": ""} | dict(bench.options)
  said = [
    f"--{name}={vars(flags)[name]}"
    for name, value in defaults.items()
    if vars(flags)[name] != value
  ]
  return record.surroundings() | {
    "command": " ".join(["python -m", f"bench.{bench.name}", *said]),
    "cores_used": CORES,
    "warm_up_steps": bench.warm_up,
    "timed_steps": flags.steps,
    "limits": dict(bench.limits),
  }


if __name__ == "__main__":
  sys.exit("this is the harness; run a benchmark, like bench.dpo_cpu")
