"""Saving and placing hold little beside the arrays themselves."""

import subprocess
import sys

import pytest

from tests.fixtures import programs

# Three leaves of 256 MiB, which eight devices hold in shards of 32 MiB.
START = """
import gc, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from pivot_jax import sharding, trees
folder = pathlib.Path(sys.argv[1])
SHAPE, LEAVES, SHARD = (64, 1024, 1024), 3, 2**25
WHOLE = LEAVES * 2**28
mesh = sharding.make_mesh({"fsdp": 8})
FLAT = {f"b{i}/q_proj/kernel": i for i in range(LEAVES)}
META = {"vision": None, "llm": None, "sources": {}, "not_carried": []}

def host(seed):
  return np.random.default_rng(seed).standard_normal(SHAPE, np.float32)

def peak():
  text = pathlib.Path("/proc/self/status").read_text()
  lines = dict(x.split(":", 1) for x in text.splitlines())
  return {k: int(lines[k].split()[0]) * 1024 for k in ("VmHWM", "VmRSS")}

def beyond(do):
  gc.collect()
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  before = peak()["VmRSS"]
  found = do()
  return found, peak()["VmHWM"] - before
"""
SAVE = (
  START
  + """
from pivot_jax.weights import resumable
leaves = {k: host(i) for k, i in FLAT.items()}
state = sharding.place(trees.unflatten(leaves), mesh)
del leaves
limit = float(sys.argv[2])
saver = resumable.Resumable(folder, save_concurrent_gb=limit)

def save():
  saver.save(1, state, {})
  saver.close()

print(beyond(save)[1] / WHOLE)
"""
)
WRITE = (
  START
  + """
from pivot_jax.weights import artifacts
tree = trees.unflatten({
  k: trees.Deferred(SHAPE, np.dtype(np.float32), lambda i=i: host(i))
  for k, i in FLAT.items()
})
print(beyond(lambda: artifacts.save(folder, tree, meta=META))[1] / WHOLE)
"""
)
PLACE = (
  START
  + """
from pivot_jax.weights import checkpoint
found = checkpoint.load(str(folder), deferred=True)
for leaf in trees.flatten(found.params).values():
  # As after `sharding.fingerprint`.
  leaf.verified = True
# What libraries need once is no matter of size.
one = dict([*trees.flatten(found.params).items()][:1])
sharding.place(trees.unflatten(one), mesh)
placed, more = beyond(lambda: sharding.place(found.params, mesh))
for k, i in FLAT.items():
  assert np.array_equal(trees.flatten(placed)[k], host(i))
print((more - WHOLE) / SHARD)
"""
)


def printed(text, *arguments):
  flags = "--xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-c", text, *map(str, arguments)],
    env=programs.one_device() | {"XLA_FLAGS": flags, "MALLOC_ARENA_MAX": "2"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return float(done.stdout)


@pytest.mark.nightly
@pytest.mark.parametrize("limit", [4, 0.1])
def test_a_save_holds_a_third_of_the_state_beside_it(tmp_path, limit):
  assert printed(SAVE, tmp_path, limit) <= 0.3


@pytest.mark.nightly
def test_an_artifact_is_written_and_placed_in_parts(tmp_path):
  # A leaf is read, made smaller and read back: three of three that there are
  # would be 1, and more with what is on its way to the files.
  assert printed(WRITE, tmp_path) <= 1
  # The shard that is read, its chunks, and one that goes to its device.
  assert printed(PLACE, tmp_path) <= 3
