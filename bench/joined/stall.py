"""The time that a training waits for a save, in a process of its own.

A state is that of so many float32 parameters with Adam's two moments, 12 bytes
each, in `LEAVES` arrays a tree. After each save its arrays are donated to an
update, as in a training. The first save, which compiles, is left out.
"""

import argparse
import functools
import gc
import json
import os
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp

from bench import load
from pivot_jax import sharding
from pivot_jax.weights import orbax_files, resumable

LEAVES = 16
BYTES = 12
# Of the host's memory, in states: those that are needed at once, and GB more.
NEED = {"asynchronous": 2.1, "leaf by leaf": 1.2}
MORE = 2e9
_BLOCK = 2**26


def refused(parameters: float, way: str, folder: pathlib.Path) -> str:
  """Return why a state is too large for this machine, "" if it is not."""
  state = BYTES * parameters
  need, free = NEED[way] * state + MORE, available_memory()
  if need > free:
    return f"needs {need / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free"
  # Two saves stay while a third is written.
  need, free = 3.3 * state, shutil.disk_usage(folder).free
  if need > free:
    return f"needs {need / 1e9:.0f} GB of disk, {free / 1e9:.0f} are free"
  return ""


def available_memory() -> int:
  """Return the bytes of memory that programs can still take."""
  text = pathlib.Path("/proc/meminfo").read_text("ascii")
  lines = dict(line.split(":") for line in text.splitlines())
  return 1024 * int(lines["MemAvailable"].split()[0])


def make_state(parameters: int) -> dict[str, Any]:
  """Return a state, which is filled where it lies."""
  mesh = sharding.make_mesh({"data": -1})
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  @functools.partial(jax.jit, static_argnums=1, out_shardings=where)
  def fill(seed, size):
    # Of other values in each place: what repeats may be stored smaller.
    return jnp.sin(jnp.arange(size, dtype=jnp.float32) + seed)

  trees = ("trainable", "mu", "nu")
  state: dict[str, Any] = {
    name: {
      f"leaf{number:02d}": fill(100.0 * tree + number, parameters // LEAVES)
      for number in range(LEAVES)
    }
    for tree, name in enumerate(trees)
  }
  return jax.block_until_ready(state)


@functools.partial(jax.jit, donate_argnums=0)
def _update(state):
  return jax.tree.map(lambda x: x * 0.999, state)


def measure(
  parameters: int, way: str, folder: pathlib.Path, rounds: int
) -> dict[str, Any]:
  """Return seconds and bytes of some saves and of a restore."""
  state = make_state(parameters)
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  # Enough for all, or so little that one leaf is held at a time.
  limit = 2 * size / 1e9 if way == "asynchronous" else 1e-6
  saved = resumable.Resumable(folder / "saved", save_concurrent_gb=limit)
  found: dict[str, Any] = {
    "bytes": size,
    "stalls": [],
    "totals": [],
    "above": [],
  }
  for step in range(rounds + 1):
    gc.collect()
    with load.Memory() as memory:
      began = time.monotonic()
      saved.save(step, state, {"rows": 0})
      stall = time.monotonic() - began
      state = jax.block_until_ready(_update(state))
      saved.wait()
      total = time.monotonic() - began
    if step:
      found["stalls"].append(stall)
      found["totals"].append(total)
      found["above"].append(memory.peak["RssAnon"] - memory.start["RssAnon"])
  return found | _restored(saved, state, size)


def _restored(saved, state, size: int) -> dict[str, Any]:
  """Return seconds of a restore, into memory that is free, and bytes above."""
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  jax.tree.map(lambda x: x.delete(), state)
  gc.collect()
  with load.Memory() as memory:
    began = time.monotonic()
    restored = saved.restore(target)
    jax.block_until_ready(restored)
    seconds = time.monotonic() - began
  saved.close()
  if restored is None:
    raise SystemExit("nothing was restored")
  above = memory.peak["RssAnon"] - memory.start["RssAnon"] - size
  return {"restore": seconds, "restore_above": above}


def plain_write(folder: pathlib.Path, size: int) -> float:
  """Return the seconds that writing so many bytes to disk takes, alone."""
  block, path = os.urandom(_BLOCK), folder / "plain"
  began = time.monotonic()
  with open(path, "wb", buffering=0) as file:
    for _ in range(-(-size // _BLOCK)):
      file.write(block)
    os.fsync(file.fileno())
  seconds = time.monotonic() - began
  path.unlink()
  return seconds


def main() -> None:
  """Measure one way of saving and print JSON."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--parameters", type=int, required=True)
  parser.add_argument("--way", choices=list(NEED), required=True)
  parser.add_argument("--rounds", type=int, required=True)
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  flags = parser.parse_args()
  found = measure(flags.parameters, flags.way, flags.folder, flags.rounds)
  shutil.rmtree(flags.folder / "saved")
  found["plain"] = plain_write(flags.folder, found["bytes"])
  found["default_waits"] = found["bytes"] > orbax_files.memory() / 4
  print(json.dumps(found))


if __name__ == "__main__":
  main()
