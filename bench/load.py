"""Loading 3 GB of published weights: seconds, MB/s, peak host memory.

  python -m bench.load [--folder=DIR] [--dtype=bfloat16]

Makes a random bfloat16 folder of Qwen2.5-1.5B's shapes (3.1 GB, sharded) if
DIR has none, reads its files plainly, loads it leaf by leaf onto a mesh of one
device, and reads it plainly again. Prints a table, and JSON with --json=FILE.
Memory is the anonymous resident memory of the process above what it was before
and above the placed parameters, sampled every few milliseconds; pages of the
mapped file, which the system can drop, are given apart. MB/s are of the files.
"""

import argparse
import datetime
import gc
import json
import multiprocessing
import pathlib
import platform
import tempfile
import threading
import time

import jax
import ml_dtypes
import numpy as np

from pivot_jax import files, sharding, trees
from pivot_jax.configs import presets
from pivot_jax.models import qwen2
from pivot_jax.weights import checkpoint
from pivot_jax.weights.convert import (
  hf_config,
  names,
  open_weights,
  safetensor_files,
)

_SHARD = 2_000_000_000


def main() -> None:
  """Run the benchmark."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--folder", default="")
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--json", default="")
  flags = parser.parse_args()
  folder = pathlib.Path(flags.folder or tempfile.mkdtemp())
  if not (folder / "config.json").exists():
    # In a process of its own, whose memory is none of what is measured.
    maker = multiprocessing.get_context("spawn").Process(
      target=make, args=(folder,)
    )
    maker.start()
    maker.join()
    if maker.exitcode:
      raise SystemExit(f"{folder}: the weights could not be written")
  found = measure(folder, flags.dtype)
  print(table(found))
  if flags.json:
    files.write_json(pathlib.Path(flags.json), found)


def make(folder: pathlib.Path) -> None:
  """Write random weights, a shard at a time."""
  config = qwen2.LLMConfig(**presets.LLM["qwen2.5-1.5b"])
  shapes = names.slots(open_weights.shapes_of(None, config)["llm"])
  rng = np.random.default_rng(0)
  noise = rng.standard_normal(2**20).astype(ml_dtypes.bfloat16)
  arrays = {
    f"model.{name}": np.resize(noise, slot.shape)
    for name, slot in shapes.items()
  }
  safetensor_files.write(folder, arrays, dtype="bfloat16", shard_bytes=_SHARD)
  safetensor_files.write_json(
    folder / "config.json", hf_config.llm_json(config, eos_token_id=None)
  )


def measure(folder: pathlib.Path, dtype: str) -> dict:
  """Return seconds, bytes and memory, plain reads before and after."""
  size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
  before = plain_read(folder)
  fresh = write_fresh(2 * size if dtype == "float32" else size)
  mesh = sharding.make_mesh({"data": -1})
  jax.block_until_ready(jax.numpy.zeros(8))
  gc.collect()
  with Memory() as memory:
    began = time.monotonic()
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    loaded = checkpoint.load(f"hf:{folder}", dtype=kind, mesh=mesh)
    jax.block_until_ready(loaded.params)
    seconds = time.monotonic() - began
  leaves = trees.flatten(loaded.params)
  placed = sum(leaf.nbytes for leaf in leaves.values())
  largest = max(leaf.nbytes for leaf in leaves.values())
  above = memory.peak["RssAnon"] - memory.start["RssAnon"] - placed
  return {
    "date": datetime.date.today().isoformat(),
    "hardware": f"{jax.devices()[0].device_kind}, {platform.machine()}",
    "versions": files.versions(),
    "dtype": dtype,
    "file_bytes": size,
    "placed_bytes": placed,
    "largest_leaf_bytes": largest,
    "plain_read_seconds": [before, plain_read(folder)],
    "fresh_memory_seconds": fresh,
    "load_seconds": seconds,
    "peak_above_placed_bytes": above,
    "peak_over_largest_leaf": above / largest,
    "peak_mapped_file_bytes": memory.peak["RssFile"] - memory.start["RssFile"],
  }


def plain_read(folder: pathlib.Path) -> float:
  """Return the seconds that reading the files takes, nothing done with them."""
  buffer = memoryview(bytearray(16 * 2**20))
  began = time.monotonic()
  for path in sorted(folder.glob("*.safetensors")):
    with open(path, "rb", buffering=0) as file:
      while file.readinto(buffer):
        pass
  return time.monotonic() - began


def write_fresh(size: int) -> float:
  """Return the seconds that writing so many bytes of new memory takes."""
  began = time.monotonic()
  np.empty(size, np.uint8).fill(1)
  return time.monotonic() - began


class Memory:
  """Sample the process's resident memory, in bytes, while it is open."""

  def __enter__(self):
    self.start = self.peak = _resident()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._sample)
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._stop.set()
    self._thread.join()

  def _sample(self):
    while not self._stop.wait(0.003):
      now = _resident()
      self.peak = {k: max(now[k], self.peak[k]) for k in now}


def _resident() -> dict[str, int]:
  text = pathlib.Path("/proc/self/status").read_text()
  rows = dict(line.split(":", 1) for line in text.splitlines())
  return {k: int(rows[k].split()[0]) * 1024 for k in ("RssAnon", "RssFile")}


def table(found: dict) -> str:
  """Return the result as a Markdown table."""
  size = found["file_bytes"] / 1e6
  rows = [("", "seconds", "MB/s")]
  for name, seconds in (
    ("plain read, before", found["plain_read_seconds"][0]),
    ("writing as much new memory", found["fresh_memory_seconds"]),
    (f"load to {found['dtype']}, checked and placed", found["load_seconds"]),
    ("plain read, after", found["plain_read_seconds"][1]),
  ):
    rows.append((name, f"{seconds:.2f}", f"{size / seconds:,.0f}"))
  lines = [f"| {' | '.join(row)} |" for row in rows]
  lines.insert(1, "|---|---|---|")
  lines.append("")
  lines.append(
    f"{size:,.0f} MB of files, {found['placed_bytes'] / 1e6:,.0f} MB placed;"
    f" peak host memory above that {found['peak_above_placed_bytes'] / 1e6:,.0f}"
    f" MB, {found['peak_over_largest_leaf']:.2f} times the largest stacked leaf"
    f" ({found['largest_leaf_bytes'] / 1e6:,.0f} MB); at most"
    f" {found['peak_mapped_file_bytes'] / 1e6:,.0f} MB of the file mapped."
  )
  lines.append(
    f"{found['date']}, {found['hardware']},"
    f" {json.dumps(found['versions'], sort_keys=True)}"
  )
  return "\n".join(lines)


if __name__ == "__main__":
  main()
