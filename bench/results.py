"""The files of a benchmark: NAME.json with all, NAME.md to read.

Neither holds a path or the name of a host. The command, the date, the machine,
the versions and the time taken head every page.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

LIBRARIES = (
  *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin"),
  *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "flax", "torch", "transformers"),
  *("trl", "scikit-learn", "numpy"),
)
_GPU_FIELDS = (
  *("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm"),
  *("clocks.mem", "power.limit", "temperature.gpu", "utilization.gpu"),
)


def command(
  name: str, flags: argparse.Namespace, defaults: Mapping[str, Any]
) -> str:
  """Return the command, with the flags that are not at their defaults.

  `defaults` names the flags that change numbers; a folder is not shown.
  """
  said = [f"python -m bench.{name}"]
  for key, default in defaults.items():
    value = vars(flags)[key]
    if value == default:
      continue
    if isinstance(value, bool):
      said.append(f"--{key}")
    elif isinstance(value, list):
      said += [f"--{key}", *value]
    else:
      said.append(f"--{key}={value}")
  return " ".join(said)


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
  """Return the versions of python and of those that are installed."""
  installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
  return {"python": platform.python_version()} | {
    name: importlib.metadata.version(name)
    for name in libraries
    if name in installed
  }


class Report:
  """A command's results; made before the first measurement."""

  def __init__(
    self, command: str, *, software: Mapping[str, str] | None = None
  ):
    self.found: dict[str, Any] = {
      "command": command,
      "date": datetime.date.today().isoformat(),
      "cpu": _cpu_model(),
      "gpu": described(gpu()),
      "versions": dict(versions() if software is None else software),
      "load": [os.getloadavg()[0]],
    }
    self._began = time.monotonic()

  def publish(
    self,
    folder: pathlib.Path,
    name: str,
    *blocks: str,
    machine: str = "",
    **found: object,
  ) -> None:
    """Print the page and write NAME.md and NAME.json.

    `machine` follows the CPU's name in the page: how much of it was used.
    """
    self.found["seconds"] = time.monotonic() - self._began
    self.found["load"].append(os.getloadavg()[0])
    # Its clocks and its temperature, once it has worked.
    self.found["gpu_after"] = described(gpu())
    self.found |= found
    text = "\n\n".join([*self._head(machine), *blocks]) + "\n"
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    whole = json.dumps(self.found, indent=1) + "\n"
    (folder / f"{name}.json").write_text(whole, encoding="utf-8")

  def _head(self, machine: str) -> list[str]:
    software = ", ".join(f"{k} {v}" for k, v in self.found["versions"].items())
    before, after = self.found["load"]
    return [
      f"`{self.found['command']}`",
      f"{self.found['date']}, {self.found['gpu'] or self.found['cpu']}{machine};"
      f" {software}; took {self.found['seconds']:.0f} s; load {before:.1f}"
      f" before, {after:.1f} after.",
    ]


def first_gpu() -> str:
  """Return the number of the GPU that is used."""
  return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def gpu() -> dict[str, str]:
  """Return the facts that nvidia-smi has of the GPU, {} without one."""
  if not shutil.which("nvidia-smi"):
    return {}
  done = subprocess.run(
    [
      *("nvidia-smi", f"--id={first_gpu()}", "--format=csv,noheader,nounits"),
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


def described(gpu: Mapping[str, str]) -> str:
  """Return a GPU in a line, "" without one."""
  if not gpu:
    return ""
  rest = ", ".join(f"{k} {gpu[k]}" for k in _GPU_FIELDS if k != "name")
  return f"{gpu['name']} ({rest})"


def _cpu_model() -> str:
  text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
  names = [s.split(":")[1] for s in text.splitlines() if "model name" in s]
  return names[0].strip() if names else platform.machine()
