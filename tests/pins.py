"""Pins the computed numbers of a run, to compare code before and after.

  python -m tests.pins write FILE [--config=CONFIG] [--workdir=DIR]
  python -m tests.pins compare FILE [--config=CONFIG] [--workdir=DIR]

Runs the debug recipe (or CONFIG) into a new folder (or DIR, where a finished run
is read and not repeated), exports its models, and writes or compares: the losses
and metrics of every stage, the fingerprint of every leaf, the results of the
report, and the bytes of the exports. Floats of a training depend on the CPU and
on the versions of what computes, so that both sides have to come from one
machine and one environment, and no such file is committed.
"""

import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from pivot_jax.errors import InputError
from pivot_jax.weights import artifacts

ROOT = pathlib.Path(__file__).parents[1]
# (address below the workdir, format) of the exports whose bytes are pinned.
EXPORTS = (
  ("detach_dpo", "hf"),
  ("detach_dpo", "timm"),
  ("detach_dpo", "big_vision"),
  ("stage2_dpo", "llava"),
  ("stage2_dpo:llm", "hf"),
)
# Files with paths and seconds of their run, whose numbers are pinned one by one.
_NO_NUMBERS = ("model.json", "speed.jsonl", "report.json", "report.html")


def main(argv: list[str]) -> int:
  """Write or compare pins; return 1 if any differs."""
  parser = argparse.ArgumentParser(prog="python -m tests.pins")
  parser.add_argument("what", choices=("write", "compare"))
  parser.add_argument("file", type=pathlib.Path)
  parser.add_argument("--config", default="configs/pivot.py:debug")
  parser.add_argument("--workdir", type=pathlib.Path)
  asked = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as scratch:
    found = pins(
      asked.workdir or pathlib.Path(scratch, "run"),
      config=asked.config,
      exports=pathlib.Path(scratch, "exports"),
    )
  if asked.what == "write":
    text = json.dumps(found, indent=1, sort_keys=True)
    asked.file.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(found)} pins in {asked.file}\n")
    return 0
  kept = json.loads(asked.file.read_text("utf-8"))
  wrong = differences(kept, found)
  sys.stdout.write("".join(f"{line}\n" for line in wrong))
  sys.stdout.write(f"{len(kept)} pins, {len(wrong)} differ\n")
  return 1 if wrong else 0


def pins(
  workdir: pathlib.Path, *, config: str, exports: pathlib.Path
) -> dict[str, Any]:
  """Return the pins of a run, by place; run it where it is not finished."""
  if not (workdir / "report.json").exists():
    flags = (f"--config={config}", f"--workdir={workdir}")
    _command("pivot_jax.main", *flags)
  found = {}
  for path in sorted(workdir.rglob("done.json")):
    stage = path.parent.relative_to(workdir).as_posix()
    found |= _stage(stage, path.parent)
  report = json.loads((workdir / "report.json").read_text("utf-8"))
  found |= _flat("results", report["results"])
  for address, form in EXPORTS:
    out = exports / f"{address.replace(':', '_')}_{form}"
    flags = (f"--from={workdir / address}", f"--to={out}", f"--format={form}")
    _command("pivot_jax.export", *flags)
    found |= _bytes(f"export/{out.name}", out)
  return found


def differences(kept: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
  """Return a line for each pin that is missing, new or of another value."""
  lines = []
  for name in sorted({*kept, *found}):
    if kept.get(name) != found.get(name):
      lines.append(f"{name}: {kept.get(name)!r} is {found.get(name)!r}")
  return lines


def _stage(name: str, folder: pathlib.Path) -> dict[str, Any]:
  """Return the outputs, metrics and leaf fingerprints of a finished stage."""
  done = json.loads((folder / "done.json").read_text("utf-8"))
  outputs = {k: v for k, v in done["outputs"].items() if k not in _NO_NUMBERS}
  prints = folder / "fingerprint.json"
  leaves = "{}"
  if prints.exists():
    # Without the entry of model.json, as done.json recorded it before there was one.
    leaves = artifacts.leaf_prints(prints)
    outputs[prints.name] = hashlib.sha256(leaves.encode()).hexdigest()[:16]
  found = _flat(f"{name}/outputs", outputs)
  for file in ("metrics.jsonl", "predictions.jsonl", "logps.jsonl"):
    path = folder / file
    if path.exists():
      lines = path.read_text("utf-8").splitlines()
      for number, line in enumerate(lines):
        found |= _flat(f"{name}/{file}/{number}", json.loads(line))
  found |= _flat(f"{name}/leaf", json.loads(leaves))
  return found


def _flat(place: str, content: Any) -> dict[str, Any]:
  """Return the leaves of nested JSON by their path; floats as written."""
  if isinstance(content, dict):
    parts = content.items()
  elif isinstance(content, list):
    parts = enumerate(content)
  else:
    return {place: content}
  found = {}
  for key, value in parts:
    found |= _flat(f"{place}/{key}", value)
  return found


def _bytes(place: str, folder: pathlib.Path) -> dict[str, str]:
  """Return the hash of each exported file but the card, which has prose."""
  return {
    f"{place}/{path.relative_to(folder).as_posix()}": hashlib.sha256(
      path.read_bytes()
    ).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.name != "README.md"
  }


def _command(module: str, *flags: str) -> None:
  ran = subprocess.run(
    [sys.executable, "-m", module, *flags],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  if ran.returncode:
    raise InputError(f"{module} {' '.join(flags)}: {ran.stderr[-2000:]}")


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
