"""One update of a model of real size on one GPU, beside TRL and torch.

  python -m bench.gpu            # an H200 or H100, at most ten minutes
  python -m bench.gpu --tiny     # the same code in a minute or two, CPU or GPU

Needs `pip install -e ".[bench]"` with a CUDA build of jax, and torch for CUDA.
SigLIP2-So400m at 384 pixels and Qwen2.5-1.5B with random weights, bfloat16
products, float32 parameters and AdamW, and pairs of 667 prompt, 280 and 309
answer tokens. Both sides first give the same numbers for a small model with
equal weights (`bench/gpu_gate.py`). Rows come in the order of their importance
(`bench/gpu_rows.py`); one that does not fit or takes too long is a result, and
where the time is over the rest is "not run": --minutes=30 gives more of it, and
--only=ROW,ROW --name=gpu_2 runs some of them another time.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from bench import budget, gpu_report, gpu_rows, record

_TINY_STEPS = 3
_GPU_FIELDS = (
  *("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm"),
  *("clocks.mem", "power.limit", "temperature.gpu", "utilization.gpu"),
)


def main() -> None:
  """Runs the benchmark, or one row of it in the process it was given."""
  flags = _parser().parse_args()
  if flags.row:
    _child(flags)
    return
  gpu = _gpu()
  if not (gpu or flags.tiny):
    sys.exit("gpu: there is no NVIDIA GPU here; --tiny runs on a CPU")
  with tempfile.TemporaryDirectory() as scratch:
    _parent(flags, gpu, pathlib.Path(scratch))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="python -m bench.gpu")
  parser.add_argument("--out", type=pathlib.Path, default="bench/results")
  parser.add_argument("--name", default="gpu", help="of the result files")
  parser.add_argument("--minutes", type=float, default=10.0)
  parser.add_argument("--only", default="", help="rows, comma-separated")
  parser.add_argument("--tiny", action="store_true", help="for a CPU")
  for name in ("row", "folder", "result"):
    kind = str if name == "row" else pathlib.Path
    parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
  return parser


def _parent(flags, gpu: Mapping[str, str], folder: pathlib.Path) -> None:
  began, left = time.monotonic(), budget.Budget(60 * flags.minutes)
  # Refuses a name that is none before anything is run.
  rows = _chosen(flags)
  before = {
    row.name: _measure(row, flags, folder, left, gpu) for row in gpu_rows.BEFORE
  }
  compared = _compared(before)
  results = {row.name: _measure(row, flags, folder, left, gpu) for row in rows}
  works = before["device"]["works"]
  goals = gpu_report.goals(results, works, compared=compared)
  lines = [
    *gpu_report.ceilings(before["device"]),
    *gpu_report.gate(before),
    # They are of the full sizes.
    *([] if flags.tiny else goals),
    *(gpu_report.charged(results) if compared else []),
  ]
  found = record.surroundings() | {
    "command": _command(flags),
    "tiny": flags.tiny,
    "gpu": _described(gpu),
    "gpu_after": _described(_gpu()),
    "peak_flops": before["device"].get("peak_flops"),
    "seconds": time.monotonic() - began,
    "warm_up_steps": budget.WARM_UP,
    "works": works,
    "compared": compared,
    "before": before,
    "rows": results,
    "lines": lines,
  }
  text = gpu_report.markdown(found, results, lines)
  print(text)
  record.write(flags.out, flags.name, text, found)


def _chosen(flags) -> list[gpu_rows.Row]:
  names = flags.only.split(",") if flags.only else []
  unknown = set(names) - {row.name for row in gpu_rows.ROWS}
  if unknown:
    sys.exit(f"--only: no row is named {', '.join(sorted(unknown))}")
  if names:
    return [row for row in gpu_rows.ROWS if row.name in names]
  return [row for row in gpu_rows.ROWS if row.tiny or not flags.tiny]


def _compared(before: Mapping[str, Mapping[str, Any]]) -> bool:
  """Returns whether the sides may be compared; ends where they disagree.

  A side that could not be asked is not compared; its rows will say why.
  """
  if "works" not in before["device"]:
    sys.exit(f"gpu: no timings, the device {before['device']['status']}")
  sides = {name: before[name] for name in ("gate_torch", "gate_ours")}
  failures = [
    f"{name}: {line}"
    for name, side in sides.items()
    for line in side.get("failures", ())
  ]
  if failures:
    sys.exit(f"gpu: no timings, the sides disagree: {'; '.join(failures)}")
  return not any(side["status"] for side in sides.values())


def _measure(
  row: gpu_rows.Row, flags, folder: pathlib.Path, left, gpu
) -> dict[str, Any]:
  """Returns what a row's process saved, and what became of it as "status"."""
  seconds = left.share(row.seconds)
  if seconds is None:
    return {"status": "not run"}
  if row.memory and gpu and _gigabytes(gpu) < row.memory:
    return {"status": f"not tried: needs {row.memory:.0f} GB"}
  print(
    f"gpu: {row.name}, {left.left():.0f} s left", file=sys.stderr, flush=True
  )
  result, log = folder / "result.json", folder / "log.txt"
  result.unlink(missing_ok=True)
  command = [sys.executable, "-m", "bench.gpu", f"--row={row.name}"]
  command += [f"--folder={folder}", f"--result={result}"]
  code = budget.run(
    [*command, *(["--tiny"] if flags.tiny else [])],
    environment=_environment(folder, gpu),
    seconds=seconds,
    log=log,
  )
  said = log.read_text(encoding="utf-8", errors="replace")
  # Results hold no path of the machine.
  said = said.replace(str(folder), "FOLDER")
  found = json.loads(result.read_text()) if result.exists() else {}
  status = budget.outcome(code, said, seconds) or found.get("skipped", "")
  if status:
    print(f"gpu: {row.name} {status}\n{said[-2000:]}", file=sys.stderr)
  return found | {"status": status}


def _environment(folder: pathlib.Path, gpu) -> dict[str, str]:
  device = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_WAIT_POLICY": "PASSIVE",
  }
  if gpu:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    # No "cpu" behind it: without its GPU jax is to fail.
    device = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": first}
  return device | {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": ".92",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Empty at our first row, filled by it for the same program again.
    "JAX_COMPILATION_CACHE_DIR": str(folder / "caches" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "TORCHINDUCTOR_CACHE_DIR": str(folder / "caches" / "torch"),
  }


def _child(flags) -> None:
  row = gpu_rows.by_name()[flags.row]
  job = budget.Job(
    workload=row.workload,
    steps=_TINY_STEPS if flags.tiny else row.steps,
    tiny=flags.tiny,
    folder=flags.folder,
    result=flags.result,
  )
  row.run(job)


def _gpu() -> dict[str, str]:
  """Returns what nvidia-smi says of the GPU that is used, {} without one."""
  if not shutil.which("nvidia-smi"):
    return {}
  first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
  done = subprocess.run(
    [
      *("nvidia-smi", f"--id={first}", "--format=csv,noheader,nounits"),
      f"--query-gpu={','.join(_GPU_FIELDS)}",
    ],
    capture_output=True,
    text=True,
    check=False,
    timeout=30,
  )
  values = [value.strip() for value in done.stdout.strip().split(",")]
  if done.returncode or len(values) != len(_GPU_FIELDS):
    return {}
  return dict(zip(_GPU_FIELDS, values, strict=True))


def _gigabytes(gpu: Mapping[str, str]) -> float:
  """Returns the device's memory, all that one could ask for if not known."""
  said = gpu["memory.total"]
  # nvidia-smi counts in MiB.
  return float(said) * 2**20 / 1e9 if said.isdigit() else float("inf")


def _described(gpu: Mapping[str, str]) -> str:
  """Returns "" without a GPU."""
  if not gpu:
    return ""
  rest = ", ".join(f"{k} {gpu[k]}" for k in _GPU_FIELDS if k != "name")
  return f"{gpu['name']} ({rest})"


def _command(flags) -> str:
  said = ["--tiny"] if flags.tiny else []
  said += [f"--only={flags.only}"] if flags.only else []
  said += [f"--minutes={flags.minutes:g}"] if flags.minutes != 10 else []
  return " ".join(["python -m bench.gpu", *said])


if __name__ == "__main__":
  main()
