"""The files of a side-by-side benchmark: NAME.json with all, NAME.md to read.

Neither holds a path or a host's name. What the numbers mean is said by
`bench/verdict.py`, how they were measured by `bench/side_by_side.py`.
"""

import datetime
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from bench import verdict

_LIBRARIES = (
  "jax",
  "jaxlib",
  "jax-cuda12-plugin",
  "jax-cuda13-plugin",
  "nvidia-cudnn-cu12",
  "nvidia-cudnn-cu13",
  "flax",
  "torch",
  "transformers",
  "trl",
  "scikit-learn",
  "numpy",
)


def surroundings() -> dict[str, Any]:
  """Returns the date, the CPU and the versions of what is installed."""
  installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
  versions = {
    name: importlib.metadata.version(name)
    for name in _LIBRARIES
    if name in installed
  }
  return {
    "date": datetime.date.today().isoformat(),
    "cpu": _cpu_model(),
    "versions": {"python": platform.python_version()} | versions,
  }


def _cpu_model() -> str:
  text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
  names = [s.split(":")[1] for s in text.splitlines() if "model name" in s]
  return names[0].strip() if names else platform.machine()


def markdown(
  found: Mapping[str, Any],
  table: str,
  lines: Sequence[str],
  rows: Sequence[verdict.Row],
) -> str:
  """Returns the page: the command, the table, `lines`, how it was measured."""
  warned = verdict.warning(rows)
  versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
  limits = ", ".join(f"{k} {v:g}" for k, v in found["limits"].items())
  return "\n".join(
    [
      f"`{found['command']}`",
      "",
      f"{found['date']}, {found['cpu']}, {found['cores_used']} cores; {versions};"
      f" took {found['seconds']:.0f} s.",
      "",
      table,
      "",
      *[text for text in (*lines, "") if lines],
      *[text for text in (*warned, "") if warned],
      "The last two columns say how many times faster ours is. Medians of"
      f" {found['timed_steps']} steps after {found['warm_up_steps']} of warm-up;"
      " every row is a process of its own. Before its timed steps each gave the"
      f" numbers of `{rows[0].label}`, allowed differences: {limits}.",
      "",
      verdict.notes(rows),
      "",
    ]
  )


def write(
  folder: pathlib.Path, name: str, text: str, found: Mapping[str, Any]
) -> None:
  """Writes NAME.md and NAME.json."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f"{name}.md").write_text(text, encoding="utf-8")
  whole = json.dumps(found, indent=1) + "\n"
  (folder / f"{name}.json").write_text(whole, encoding="utf-8")
