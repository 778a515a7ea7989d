"""Check a GPU that nobody has tried yet: six minutes, no peer, no network.

  python -m bench.gpu smoke                       # one GPU
  python -m bench.gpu smoke --tiny --out=FOLDER   # the same code on a CPU

Each part is a process of its own, so that one that dies leaves the others:

  numbers    cuDNN's attention against plain attention in float32, at the heads
             and lengths of So400m and Qwen2.5-1.5B, values and gradients; the
             DPO loss of a packed batch and its gradient against the CPU's, in
             float32 (products at "highest" precision) and in bfloat16
  update     ten DPO updates of So400m and Qwen2.5-1.5B on eight pairs of the
             paper's lengths: pairs/s, peak memory
  recipe     configs/pivot.py:debug from its first stage to its report

It writes gpu_smoke.md and gpu_smoke.json and returns 1 where a check failed.
The README gives the status line of that page, which `python -m bench.gpu
status` prints.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from bench import harness, results, verdict

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "bench" / "results" / "gpu_smoke.md"
NEVER = "never run on a GPU"
MINUTES = 6.0
# The most seconds that a part may take.
PARTS = {"numbers": 120.0, "update": 180.0, "recipe": 300.0}
GOAL = 28  # pairs/s on an H200, an estimate

_STATUS = "Status: "
_QUICK = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# Instead of all stages: one that trains, and the report.
_SHORT_RECIPE = (
  "--config.order=('stage1_proj','report')",
  "--config.stage1_proj.steps=2",
  "--config.stage1_proj.batch=4",
)


def main(argv: Sequence[str]) -> int:
  """Run the smoke test and return its exit code."""
  parser = argparse.ArgumentParser(prog="python -m bench.gpu smoke")
  parser.add_argument("--out", type=pathlib.Path, help="folder of the page")
  parser.add_argument("--minutes", type=float, default=MINUTES)
  parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU")
  for name in ("part", "result"):
    parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
  flags = parser.parse_args(argv)
  if flags.part:
    # Only here: the process that starts the others takes no device.
    from bench.gpu import checks

    found = checks.run(flags.part, tiny=flags.tiny)
    text = json.dumps(list(map(dataclasses.asdict, found)))
    pathlib.Path(flags.result).write_text(text, encoding="utf-8")
    return 0
  if flags.tiny and not flags.out:
    parser.error("--tiny says nothing about a GPU: give a folder with --out")
  if not (flags.tiny or results.gpu()):
    sys.exit("gpu smoke: there is no NVIDIA GPU here; --tiny runs on a CPU")
  return run(flags.out or PAGE.parent, flags.minutes, tiny=flags.tiny)


def run(out: pathlib.Path, minutes: float, *, tiny: bool) -> int:
  """Run every part, write the page and return 1 where a check failed."""
  report = results.Report("python -m bench.gpu smoke" + " --tiny" * tiny)
  # A CPU that others use, too, takes its time.
  patience = 5 if tiny else 1
  left = harness.Budget(60 * minutes * patience)
  lines = [("check", "figures", "")]
  with tempfile.TemporaryDirectory() as scratch:
    for part, seconds in PARTS.items():
      folder = pathlib.Path(scratch) / part
      folder.mkdir()
      lines += _part(part, folder, left.share(seconds * patience), tiny=tiny)
  failed = [name for name, _, passed in lines[1:] if passed != "pass"]
  said = f"{len(lines) - 1 - len(failed)} of {len(lines) - 1} checks passed"
  said += f"; failed: {', '.join(failed)}" if failed else ""
  line = _line(report.found["date"], report.found["versions"], said, tiny=tiny)
  report.publish(
    out,
    "gpu_smoke",
    _STATUS + line,
    verdict.markdown(lines),
    *(["Toy sizes on a CPU: that the code runs is all this says."] * tiny),
    f"Differences are |a - b| / |b|, the worst. {GOAL} pairs/s on an H200 is an"
    " estimate and no condition.",
    status=line,
    checks=lines[1:],
  )
  return 1 if failed else 0


def _line(
  date: str, versions: Mapping[str, str], said: str, *, tiny: bool
) -> str:
  """Return date, hardware, versions and outcome."""
  gpu = {} if tiny else results.gpu()
  device = f"{gpu['name']}, driver {gpu['driver_version']}" if gpu else "no GPU"
  shown = {k: v for k, v in versions.items() if "jax" in k or k == "flax"}
  names = ", ".join(f"{name} {version}" for name, version in shown.items())
  return f"{date}, {device}, {names}: {said}"


def status(page: pathlib.Path = PAGE) -> str:
  """Return the line for the README: the last run's, or that none was."""
  if not page.exists():
    return NEVER
  lines = page.read_text(encoding="utf-8").splitlines()
  (line,) = [line for line in lines if line.startswith(_STATUS)]
  return line.removeprefix(_STATUS)


def show(argv: Sequence[str]) -> int:
  """Print the status."""
  argparse.ArgumentParser(prog="python -m bench.gpu status").parse_args(argv)
  print(status())
  return 0


def _part(
  name: str, folder: pathlib.Path, seconds: float | None, *, tiny: bool
) -> list[tuple[str, str, str]]:
  """Return the lines of a part, a failed one if its process did not end."""
  if seconds is None:
    return [(name, "not run: the time was over", "FAIL")]
  print(f"gpu smoke: {name}", file=sys.stderr, flush=True)
  began = time.monotonic()
  outcome, said = harness.run(
    _command(name, folder, tiny=tiny),
    environment=_environment(folder, tiny=tiny),
    seconds=seconds,
    log=folder / "log.txt",
  )
  if outcome:
    print(said[-4000:], file=sys.stderr)
    return [(name, outcome.replace(str(folder), "FOLDER"), "FAIL")]
  if name == "recipe":
    return [_recipe(folder, time.monotonic() - began)]
  found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
  return [
    (one["name"], one["figures"], "pass" if one["passed"] else "FAIL")
    for one in found
  ]


def _environment(folder: pathlib.Path, *, tiny: bool) -> dict[str, str]:
  if not tiny:
    # The CPU is there to compare with.
    return harness.one_gpu(folder) | {"JAX_PLATFORMS": "cuda,cpu"}
  found = harness.cpu_only(folder)
  kept = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  # One device, and programs that run once are not to be compiled for speed.
  found["XLA_FLAGS"] = _QUICK
  return found | ({"JAX_COMPILATION_CACHE_DIR": kept} if kept else {})


def _command(name: str, folder: pathlib.Path, *, tiny: bool) -> list[str]:
  if name == "recipe":
    return [
      *(sys.executable, "-m", "pivot_jax.main"),
      f"--config={ROOT / 'configs' / 'pivot.py'}:debug",
      f"--workdir={folder / 'run'}",
      *(_SHORT_RECIPE if tiny else ()),
    ]
  return [
    *(sys.executable, "-m", "bench.gpu", "smoke", f"--part={name}"),
    f"--result={folder / 'result.json'}",
    *(["--tiny"] if tiny else ()),
  ]


def _recipe(folder: pathlib.Path, seconds: float) -> tuple[str, str, str]:
  report = folder / "run" / "report.json"
  stages = 0
  if report.exists() and report.with_suffix(".html").exists():
    stages = len(json.loads(report.read_text(encoding="utf-8"))["stages"])
  figures = f"{stages} stages and the report of them in {seconds:.0f} s"
  name = "configs/pivot.py:debug to its report"
  return name, figures, "pass" if stages else "FAIL"
