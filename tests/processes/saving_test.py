"""Others restore what several processes save, and each reads its part."""

import json
import shutil

import pytest

from tests.processes import together
from tests.weights import damage

# A state over all devices, which `save` and `restore` see in every process.
STATE = """
import hashlib, json, logging, os, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from pivot_jax import output, sharding
from pivot_jax.weights import resumable
folder = pathlib.Path(sys.argv[1])
data, fsdp = map(int, sys.argv[2].split("x"))
mesh = sharding.make_mesh({"data": data, "fsdp": fsdp})
# As a training does.
jax.set_mesh(mesh)
whole = NamedSharding(mesh, PartitionSpec())
over = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

def placed(values, where):
  return jax.make_array_from_callback(
    values.shape, where, lambda index: values[index]
  )

def state(seed):
  rng = np.random.default_rng(seed)
  return {
    "step": placed(np.int32(seed), whole),
    "w": placed(rng.normal(size=(4, 16, 8)).astype(np.float32), over),
    "b": placed(rng.normal(size=(3, 16)).astype(jnp.bfloat16), over),
    "s": placed(rng.normal(size=5).astype(np.float32), whole),
    # Too large to be summed on the host.
    "large": placed(rng.normal(size=(2, 200, 256)).astype(np.float32), over),
  }

def target():
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state(0),
  )
"""
SAVE = (
  STATE
  + """
saver = resumable.Resumable(folder)
for seed in (1, 2):
  saver.save(seed, state(seed), {"rows": seed})
saver.close()
"""
)
RESTORE = (
  STATE
  + """
output.log()
saver = resumable.Resumable(folder)
step, found, note = saver.restore(target())
saver.close()
for name, leaf in state(step).items():
  same = jax.jit(lambda x, y: (x == y).all())(found[name], leaf)
  assert bool(same), name
  assert found[name].sharding == leaf.sharding, name
print(json.dumps([step, note]))
"""
)


def restored(folder, count, mesh, devices=1):
  ended = together.script(RESTORE, count, str(folder), mesh, devices=devices)
  return [json.loads(out) for out in together.outputs(ended)]


def saved(folder, count, mesh, devices=1, text=SAVE):
  ended = together.script(text, count, str(folder), mesh, devices=devices)
  together.outputs(ended)


def test_two_processes_save_and_one_restores(tmp_path):
  saved(tmp_path, 2, "1x2")
  assert {x.name for x in (tmp_path / "2" / "state").glob("ocdbt.*")} == {
    "ocdbt.process_0",
    "ocdbt.process_1",
  }
  assert restored(tmp_path, 1, "1x1") == [[2, {"rows": 2}]]


@pytest.mark.nightly
@pytest.mark.parametrize(
  ("before", "after"),
  [
    ((1, "1x1", 1), (2, "1x2", 1)),
    ((4, "2x2", 1), (2, "1x2", 1)),
    ((2, "2x4", 4), (1, "1x1", 1)),
    ((2, "1x8", 4), (4, "2x2", 1)),
    ((1, "4x2", 8), (4, "1x4", 1)),
    ((2, "2x1", 1), (2, "1x2", 1)),
  ],
)
def test_any_processes_restore_what_any_others_saved(tmp_path, before, after):
  saved(tmp_path, *before)
  assert restored(tmp_path, *after) == [[2, {"rows": 2}]] * after[0]


@pytest.mark.nightly
def test_of_what_all_hold_the_first_writes_all(tmp_path):
  watched = (
    """
import sys
def hook(event, args):
  if event == "open" and isinstance(args[0], (str, bytes)):
    flags = args[2] or 0
    writes = flags & 3 or any(x in str(args[1] or "") for x in "wax+")
    if writes and sys.argv[1] in str(args[0]):
      print(args[0])
sys.addaudithook(hook)
"""
    + SAVE
  )
  ended = together.script(watched, 2, str(tmp_path), "2x1")
  assert together.outputs(ended)[1] == ""
  inside = (tmp_path / "2" / "state" / "ocdbt.process_1").rglob("*")
  assert [x for x in inside if x.parent.name == "d"] == []


# Process 1 sees other files than process 0.
OTHER_VIEW = RESTORE.replace(
  "output.log()",
  "if jax.process_index() == 1:\n"
  "  folder = pathlib.Path(str(folder) + '_of_1')\n"
  "output.log()",
)


@pytest.mark.nightly
def test_damage_that_one_process_sees_counts_for_all(tmp_path):
  saved(tmp_path / "all", 2, "1x2")
  shutil.copytree(tmp_path / "all", tmp_path / "all_of_1")
  for path in (tmp_path / "all_of_1" / "2" / "state").rglob("d/*"):
    damage.flip(path)
  ended = together.script(OTHER_VIEW, 2, str(tmp_path / "all"), "1x2")
  assert [json.loads(out)[0] for out in together.outputs(ended)] == [1, 1]
  assert "checkpoint 2 is damaged (process 1: " in ended[0].err
  assert (tmp_path / "all" / "2" / "damaged.txt").exists()
  assert restored(tmp_path / "all", 1, "1x1") == [[1, {"rows": 1}]]


# An artifact with spread, whole and deferred leaves; small leaves are sliced.
ARTIFACT = """
import json, os, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from pivot_jax import processes, sharding, trees
from pivot_jax.weights import artifacts, checkpoint
folder = pathlib.Path(sys.argv[1])
data, fsdp = map(int, sys.argv[2].split("x"))
mesh = sharding.make_mesh({"data": data, "fsdp": fsdp})
META = {"vision": None, "llm": None, "sources": {}, "not_carried": []}
artifacts._GROUP = 64

def params():
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(2, 64, 32)).astype(np.float32)
  scale = rng.normal(size=8).astype(np.float32)
  return {
    "x": {"q_proj": {"kernel": kernel}, "norm": {"scale": scale}},
    "y": {"fc1": {"kernel": kernel[0] + 1}},
  }
"""
WRITE = (
  ARTIFACT
  + """
values = params()
tree = {
  "x": sharding.place(values["x"], mesh),
  "y": {
    "fc1": {
      "kernel": trees.Deferred(
        (64, 32), np.dtype(np.float32), lambda: values["y"]["fc1"]["kernel"]
      )
    }
  },
}
artifacts.save(folder, tree, meta=META)
"""
)
READ = (
  ARTIFACT
  + """
found = checkpoint.load(str(folder), deferred=True)
read, restore = [], artifacts._restore
def watched(path, wanted):
  read.extend(wanted)
  return restore(path, wanted)
artifacts._restore = watched
try:
  prints = sharding.fingerprint(found.params)
  whole = sorted(read)
  placed = trees.flatten(sharding.place(found.params, mesh))
except Exception as error:
  print(json.dumps(["error", str(error)]))
else:
  for path, leaf in trees.flatten(params()).items():
    for shard in placed[path].addressable_shards:
      np.testing.assert_array_equal(shard.data, leaf[shard.index])
  assert prints == trees.fingerprint(params())
  print(json.dumps([whole, sorted(read)]))
"""
)


def read(folder, count, mesh, devices=1):
  ended = together.script(READ, count, str(folder), mesh, devices=devices)
  return [json.loads(out) for out in together.outputs(ended)]


def test_two_processes_write_an_artifact_and_read_it_together(tmp_path):
  together.outputs(together.script(WRITE, 2, str(tmp_path / "a"), "1x2"))
  first, second = read(tmp_path / "a", 2, "1x2")
  # Each leaf is read whole by one of them; what is spread, then by slices.
  assert sorted(first[0] + second[0]) == [
    "x/norm/scale",
    "x/q_proj/kernel",
    "y/fc1/kernel",
  ]
  for whole, more in (first, second):
    assert set(more) - set(whole) <= {"x/norm/scale"}


@pytest.mark.nightly
def test_an_artifact_is_the_same_whoever_wrote_it(tmp_path):
  prints = []
  for count, mesh, devices in ((1, "1x1", 1), (1, "1x8", 8), (4, "2x2", 1)):
    folder = tmp_path / f"{count}x{devices}"
    text = together.script(WRITE, count, str(folder), mesh, devices=devices)
    together.outputs(text)
    found = json.loads((folder / "fingerprint.json").read_text())
    prints.append({k: v for k, v in found.items() if k != "model.json"})
    read(folder, 2, "2x1")
  assert prints[0] == prints[1] == prints[2]


@pytest.mark.nightly
def test_a_damaged_leaf_is_an_error_in_all_processes(tmp_path):
  together.outputs(together.script(WRITE, 1, str(tmp_path / "a"), "1x1"))
  path = tmp_path / "a" / "fingerprint.json"
  prints = json.loads(path.read_text())
  prints["y/fc1/kernel"] = "00000000"
  path.write_text(json.dumps(prints))
  found = read(tmp_path / "a", 2, "1x2")
  assert found[0] == found[1]
  assert found[0][0] == "error" and "leaf y/fc1/kernel" in found[0][1]
