"""Side-by-side benchmarks: one process for each variant, a gate, the clocks.

This file knows no model and imports neither jax nor torch; `bench/verdict.py`
turns what it measures into a table, `bench/results.py` writes it down. A
benchmark is a module `bench.NAME`:

  def ours(folder):             # in a process of its own; imports go in here
    ...
    return harness.stepping(step, numbers)

  BENCH = harness.Bench(
    name="NAME",
    setup=...,                  # (folder, options) -> {"": {"pairs": 8}}
    variants=(harness.Variant("torch", "torch, eager", theirs),
              harness.Variant("ours", "pivot_jax", ours, again=True)),
    reference="torch",          # its numbers are what the others must give
    ours={"": "ours"},
    limits={"logps": 1e-4},     # relative, for each kind of number
  )

  if __name__ == "__main__":
    harness.main(BENCH)

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
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bench import results, verdict

CORES = 2
# Steps before the numbers are compared; one more is not timed after that.
GATE_STEPS = 3
# No process does anything of use in fewer seconds.
LEAST = 20.0
# What jax and torch say when a device's memory is full, in upper case.
_FULL = ("RESOURCE_EXHAUSTED", "OUTOFMEMORYERROR", "OUT OF MEMORY")

Options = Mapping[str, int | bool]
Work = Mapping[str, Mapping[str, float]]
Summary = Callable[
  [Mapping[str, verdict.Row], Work], tuple[list[str], dict[str, Any]]
]


class GateError(Exception):
  """A variant computes something else than the reference."""


@dataclasses.dataclass(frozen=True)
class Ready:
  """A variant set up in its process.

  `drive(count, begin, end)` does `count` steps and calls `begin()` and `end()`
  around each: for a peer that owns its loop. Others use `stepping`. `facts()`
  is read before the first step and after the last one: what else is to be
  written down ("compile_seconds", "peak" bytes, "finite", "notes").
  """

  drive: Callable[[int, Callable[[], None], Callable[[], None]], None]
  numbers: Callable[[], verdict.Numbers] = dict
  facts: Callable[[], Mapping[str, Any]] = dict


def stepping(
  step: Callable[[], Any],
  numbers: Callable[[], verdict.Numbers] = dict,
  facts: Callable[[], Mapping[str, Any]] = dict,
) -> Ready:
  """Return a variant of a function that does one step."""

  def drive(count, begin, end):
    for _ in range(count):
      begin()
      step()
      end()

  return Ready(drive, numbers, facts)


@dataclasses.dataclass(frozen=True)
class Variant:
  """One row of the table.

  `settings` says how a peer is run, for the reader. `again` runs it a second
  time at the end, with the compiled code of the first run at hand: that gives
  the warm first step, and the difference of the two is the noise. `limits`
  replaces those of the benchmark for this row: {} reports and demands nothing.
  `part` is for a row that does not do the whole step: it is compared with none.
  `workload` names its entry of the work that `Bench.setup` returns. `steps`
  replaces the number of timed steps. With `Bench.minutes`, `seconds` is the
  most that the process may take. `quick` rows run with --tiny.
  """

  name: str
  label: str
  make: Callable[[pathlib.Path], Ready]
  settings: str = ""
  again: bool = False
  limits: Mapping[str, float] | None = None
  part: bool = False
  workload: str = ""
  steps: int = 0
  seconds: float = 100.0
  quick: bool = True


@dataclasses.dataclass(frozen=True)
class Bench:
  """A benchmark; `python -m bench.NAME` runs it.

  `setup(folder, options)` writes models and data that every variant reads, and
  returns what a step of each workload does, by one definition for all.
  `options` are flags of the command with their defaults, whole numbers or
  switches; a variant reads them by `options`. `ours` names our variant of each
  workload. `warm_up` counts the steps before the timed ones and `steps` is the
  default of `--steps`: where a step takes minutes, one of each is enough.
  `summary(rows, work)` returns (lines to print below the table, JSON).
  `minutes` is for a GPU: the time to spend, after which variants are "not run";
  one that fails or takes too long is then a result like any other.
  """

  name: str
  setup: Callable[[pathlib.Path, Options], Work]
  variants: Sequence[Variant]
  reference: str
  ours: Mapping[str, str]
  limits: Mapping[str, float]
  options: Options = dataclasses.field(default_factory=dict)
  warm_up: int = GATE_STEPS + 1
  steps: int = 8
  summary: Summary = lambda rows, work: ([], {})
  minutes: float = 0.0

  def variant(self, name: str) -> Variant:
    """Return the variant of a name."""
    return {v.name: v for v in self.variants}[name]

  def gates(self, variant: Variant) -> Mapping[str, float]:
    """Return the limits of a variant's numbers."""
    return self.limits if variant.limits is None else variant.limits


def options(folder: pathlib.Path) -> Options:
  """Return the options of the command whose folder this is."""
  return json.loads((folder / "options.json").read_text())


def main(bench: Bench) -> None:
  """Run the benchmark, or one variant of it in the process it was given."""
  flags = _parser(bench).parse_args()
  if flags.variant:
    _child(bench, flags)
    return
  if flags.setup:
    work = bench.setup(flags.folder, options(flags.folder))
    (flags.folder / "work.json").write_text(json.dumps(work))
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
  if bench.minutes:
    parser.add_argument("--minutes", type=float, default=bench.minutes)
  for name, value in bench.options.items():
    if isinstance(value, bool):
      parser.add_argument(f"--{name}", action="store_true")
    else:
      parser.add_argument(f"--{name}", type=int, default=value)
  for name in ("variant", "folder", "result"):
    kind = str if name == "variant" else pathlib.Path
    parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
  parser.add_argument("--setup", action="store_true", help=argparse.SUPPRESS)
  return parser


def _parent(bench: Bench, flags: argparse.Namespace) -> None:
  """Run every variant and write what came out."""
  defaults = {"steps": bench.steps, "only": ""} | dict(bench.options)
  if bench.minutes:
    defaults["minutes"] = bench.minutes
  else:
    # Inherited by every process that is started from here.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
  report = results.Report(results.command(bench.name, flags, defaults))
  chosen = _chosen(bench, flags)
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    given = {k: vars(flags)[k] for k in bench.options}
    (folder / "options.json").write_text(json.dumps(given))
    run = _Runs(bench, folder, flags)
    run.process("setup", ["--setup"], seconds=None)
    work = json.loads((folder / "work.json").read_text())
    found = {v.name: [run.measure(v)] for v in chosen}
    for variant in chosen:
      if variant.again and not found[variant.name][0]["status"]:
        found[variant.name].append(run.measure(variant))
  rows = _rows(bench, chosen, found)
  lines, extra = bench.summary({row.name: row for row in rows}, work)
  if vars(flags).get("tiny"):
    lines = ["Tiny sizes: that this ran is all it says; no goal is for them."]
  warned = verdict.warning(rows)
  limits = ", ".join(f"{k} {v:g}" for k, v in bench.limits.items())
  report.publish(
    flags.out,
    flags.name,
    verdict.table(rows, work),
    *(["\n".join(lines)] if lines else []),
    *warned,
    f"The last two columns say how many times faster ours is. Medians of a row's"
    f" timed steps after {bench.warm_up} of warm-up; every row is a process of"
    f" its own. Before its timed steps each gave the numbers of"
    f" `{bench.variant(bench.reference).label}`, allowed differences: {limits}.",
    verdict.notes(rows),
    machine=f", {CORES} cores" if not bench.minutes else "",
    warm_up_steps=bench.warm_up,
    timed_steps=flags.steps,
    limits=dict(bench.limits),
    work_of_a_step=work,
    rows=[dataclasses.asdict(row) for row in rows],
    runs=found,
    summary=extra,
  )


def _chosen(bench: Bench, flags: argparse.Namespace) -> list[Variant]:
  """Return the variants to run, the reference first."""
  tiny = vars(flags).get("tiny", False)
  names = [v.name for v in bench.variants if v.quick or not tiny]
  names = flags.only.split(",") if flags.only else names
  unknown = set(names) - {v.name for v in bench.variants}
  if unknown:
    sys.exit(f"--only: no variant is named {', '.join(sorted(unknown))}")
  rest = [v for v in bench.variants if v.name in names]
  first = bench.variant(bench.reference)
  return [first, *(v for v in rest if v.name != first.name)]


class _Runs:
  """Start the processes of a command."""

  def __init__(
    self, bench: Bench, folder: pathlib.Path, flags: argparse.Namespace
  ):
    self._bench, self._folder, self._flags = bench, folder, flags
    self._left = Budget(60 * flags.minutes) if bench.minutes else None
    self._environment = cpu_only(folder)
    if bench.minutes and results.gpu():
      self._environment = one_gpu(folder)

  def measure(self, variant: Variant) -> dict[str, Any]:
    """Return the measurements of a variant's process, and its "status"."""
    print(f"{self._bench.name}: {variant.name}", file=sys.stderr, flush=True)
    seconds = self._left.share(variant.seconds) if self._left else None
    if self._left and seconds is None:
      return {"status": "not run"}
    result = self._folder / "result.json"
    result.unlink(missing_ok=True)
    steps = variant.steps or self._flags.steps
    if vars(self._flags).get("tiny"):
      steps = min(steps, 3)
    before, began = os.getloadavg()[0], time.monotonic()
    status = self.process(
      variant.name,
      [f"--variant={variant.name}", f"--result={result}", f"--steps={steps}"],
      seconds=seconds,
    )
    found = json.loads(result.read_text()) if result.exists() else {}
    if found.get("failures"):
      raise GateError(f"{variant.name}: {'; '.join(found['failures'])}")
    return found | {
      "status": status,
      "process_seconds": time.monotonic() - began,
      "load_before": before,
      "load_after": os.getloadavg()[0],
    }

  def process(
    self, name: str, arguments: Sequence[str], *, seconds: float | None
  ) -> str:
    """Run the benchmark's module; returns what went wrong, "" if nothing."""
    # Empty at the first run of a variant, filled by it for the second.
    caches = self._folder / "caches" / name
    command = [sys.executable, "-m", f"bench.{self._bench.name}", *arguments]
    status, said = run(
      [*command, f"--folder={self._folder}"],
      environment=self._environment | _caches(caches),
      seconds=seconds,
      log=self._folder / "log.txt",
    )
    # Results hold no path of the machine.
    status = status.replace(str(self._folder), "FOLDER")
    if status and (name == "setup" or not self._bench.minutes):
      sys.exit(f"{self._bench.name}: {name} {status}\n{said[-4000:]}")
    if status:
      print(f"{name} {status}\n{said[-2000:]}", file=sys.stderr)
    return status


def cpu_only(folder: pathlib.Path) -> dict[str, str]:
  """Return the environment of a process that sees no device but the CPU."""
  return {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": str(CORES),
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
  } | _caches(folder / "caches")


def one_gpu(folder: pathlib.Path) -> dict[str, str]:
  """Return the environment of a process that is to use the first GPU."""
  return {
    # No "cpu" behind it: without its GPU jax is to fail.
    "JAX_PLATFORMS": "cuda",
    "CUDA_VISIBLE_DEVICES": results.first_gpu(),
    "XLA_PYTHON_CLIENT_MEM_FRACTION": ".92",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
  } | _caches(folder / "caches")


def _caches(folder: pathlib.Path) -> dict[str, str]:
  return {
    "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch"),
  }


class Budget:
  """Seconds to spend, from now on."""

  def __init__(
    self, seconds: float, clock: Callable[[], float] = time.monotonic
  ):
    self._clock, self._end = clock, clock() + seconds

  def share(self, wanted: float) -> float | None:
    """Return the seconds a process may take, None if it is not to begin."""
    left = self._end - self._clock()
    return min(wanted, left) if left >= LEAST else None


def run(
  command: Sequence[str],
  *,
  environment: Mapping[str, str],
  seconds: float | None,
  log: pathlib.Path,
) -> tuple[str, str]:
  """Run a process with all that it starts; return (outcome, its output)."""
  with log.open("w", encoding="utf-8") as out:
    process = subprocess.Popen(
      command,
      env={**os.environ, **environment},
      stdout=out,
      stderr=subprocess.STDOUT,
      # What it starts itself (compilers) is to end with it.
      start_new_session=True,
    )
    try:
      code = process.wait(seconds)
    except subprocess.TimeoutExpired:
      code = None
    finally:
      _end(process)
  said = log.read_text(encoding="utf-8", errors="replace")
  return outcome(code, said, seconds or 0.0), said


def _end(process: subprocess.Popen[bytes]) -> None:
  """End a process's group, if there is any of it left."""
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass
  process.wait()


def outcome(code: int | None, text: str, seconds: float) -> str:
  """Return in words how a process ended: "" if all went well."""
  if code == 0:
    return ""
  if code is None:
    return f"took longer than its {seconds:.0f} s"
  if any(word in text.upper() for word in _FULL):
    return "does not fit"
  said = [line.strip() for line in text.splitlines() if line.strip()]
  # Behind the error jax may have said how it shortened its traceback.
  errors = [
    line for line in said if re.match(r"[\w.]+(Error|Exception)\b", line)
  ]
  last = (errors or said or [f"code {code}"])[-1]
  return f"ended with an error: {last[:200]}"


def _child(bench: Bench, flags: argparse.Namespace) -> None:
  """Measure one variant in this process and write a JSON file."""
  variant = bench.variant(flags.variant)
  found: dict[str, Any] = {"failures": []}

  def save(**more):
    # At once: a process whose time runs out has said what it knew.
    found.update(more)
    aside = flags.result.with_suffix(".part")
    aside.write_text(json.dumps(found))
    aside.replace(flags.result)

  began = time.perf_counter()
  ready = variant.make(flags.folder)
  save(make_seconds=time.perf_counter() - began, **ready.facts())
  watch = _Watch(
    lambda: _gate(bench, variant, flags.folder, ready.numbers()),
    gate_steps=min(GATE_STEPS, bench.warm_up),
    warm_up=bench.warm_up,
    save=save,
  )
  try:
    ready.drive(bench.warm_up + flags.steps, watch.begin, watch.end)
  except GateError as error:
    save(failures=error.args[0])
    return
  save(**ready.facts())


def _gate(
  bench: Bench, variant: Variant, folder: pathlib.Path, numbers: verdict.Numbers
) -> dict[str, float]:
  """Return the differences to the reference; raise GateError over a limit."""
  kept, limits = folder / "reference.npz", bench.gates(variant)
  if not (numbers or limits):
    return {}
  if variant.name == bench.reference and not kept.exists():
    np.savez(kept, **numbers)
  if not kept.exists():
    raise RuntimeError(f"{bench.reference} gave no numbers to compare with")
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

  def __init__(
    self,
    gate: Callable[[], Mapping[str, float]],
    *,
    gate_steps: int,
    warm_up: int,
    save: Callable[..., None],
  ):
    self._seconds: list[tuple[float, float, float]] = []
    self._errors: Mapping[str, float] = {}
    self._gate, self._gate_steps = gate, gate_steps
    self._warm_up, self._save = warm_up, save

  def begin(self) -> None:
    self._start = _clocks()

  def end(self) -> None:
    now = _clocks()
    self._seconds.append(tuple(b - a for a, b in zip(self._start, now)))
    if len(self._seconds) == self._gate_steps:
      self._errors = self._gate()
    walls, cpus, busy = zip(*self._seconds)
    timed = slice(self._warm_up, None)
    other = sum(busy[timed]) - sum(cpus[timed])
    self._save(
      errors=self._errors,
      first_seconds=walls[0],
      walls=walls[timed],
      cpus=cpus[timed],
      other_work=other / max(sum(walls[timed]), 1e-9),
      peak_resident_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
      / 1024,
    )


def _clocks() -> tuple[float, float, float]:
  """Return seconds: wall, CPU of this process and its children, all cores."""
  both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  used = [resource.getrusage(who) for who in both]
  cpu = sum(one.ru_utime + one.ru_stime for one in used)
  return time.perf_counter(), cpu, busy_seconds()


def busy_seconds() -> float:
  """Return the seconds that all cores of the machine have been busy."""
  text = pathlib.Path("/proc/stat").read_text(encoding="ascii")
  user, nice, system, _, _, irq, softirq, steal = map(int, text.split()[1:9])
  ticks = user + nice + system + irq + softirq + steal
  return ticks / os.sysconf("SC_CLK_TCK")


def _rows(
  bench: Bench,
  chosen: Sequence[Variant],
  found: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[verdict.Row]:
  """Return the rows; compared with ours if every gate could be asked."""
  gated = [v.name for v in chosen if bench.gates(v)]
  compared = not any(found[name][0]["status"] for name in gated)
  return [
    _row(v, found[v.name], bench.ours.get(v.workload, "") if compared else "")
    for v in chosen
  ]


def _row(
  variant: Variant, runs: Sequence[Mapping[str, Any]], beside: str
) -> verdict.Row:
  first = runs[0]
  # Compiled ahead or in the first step: either way it is what a user waits for.
  starts = [
    run["first_seconds"] + run.get("compile_seconds", 0.0)
    for run in runs
    if "first_seconds" in run
  ]
  again = runs[1].get("walls") if len(runs) > 1 else None
  return verdict.Row(
    name=variant.name,
    label=variant.label,
    settings=variant.settings,
    walls=tuple(first.get("walls", ())),
    cpus=tuple(first.get("cpus", ())),
    first=tuple(starts),
    again=(float(np.median(again)), float(np.median(runs[1]["cpus"])))
    if again
    else None,
    errors=first.get("errors", {}),
    load=(first.get("load_before", 0.0), first.get("load_after", 0.0)),
    other_work=first.get("other_work", 0.0),
    part=variant.part,
    status=first["status"],
    workload=variant.workload,
    beside="" if variant.part else beside,
    peak=first.get("peak", 0),
    said=tuple(first.get("notes", ())),
  )
