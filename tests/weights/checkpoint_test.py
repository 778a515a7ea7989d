"""What is saved comes back bit for bit; what is damaged is named."""

import gc
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pivot_jax import files, trees
from pivot_jax.errors import InputError
from pivot_jax.weights import artifacts, checkpoint

META = {"vision": None, "llm": None, "sources": {}, "not_carried": []}


# Orbax leaves its other reads unawaited where one of them fails.
_BROKEN_READ = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


def _params():
  rng = np.random.default_rng(0)
  return {
    "vision": {"fc": {"kernel": rng.normal(size=(64, 32)).astype(np.float32)}},
    "llm": {"norm": {"scale": rng.normal(size=8).astype(np.float32)}},
  }


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
  folder = tmp_path_factory.mktemp("artifact") / "a"
  artifacts.save(folder, _params(), meta=META)
  return folder


def test_an_artifact_comes_back_bit_for_bit(artifact):
  loaded = checkpoint.load(str(artifact))
  assert trees.fingerprint(loaded.params) == trees.fingerprint(_params())
  assert loaded.vision is None and loaded.meta["sources"] == {}
  assert "jax" in loaded.meta["versions"]


def test_a_subtree_comes_under_its_own_name(artifact):
  loaded = checkpoint.load(f"{artifact}:vision")
  assert list(trees.flatten(loaded.params)) == ["vision/fc/kernel"]
  np.testing.assert_array_equal(
    loaded.params["vision"]["fc"]["kernel"], _params()["vision"]["fc"]["kernel"]
  )


def test_a_subtree_that_is_not_there_is_named(artifact):
  with pytest.raises(InputError, match="projector"):
    checkpoint.load(f"{artifact}:projector")


def test_a_packaged_artifact_comes_back_as_float32_of_its_bfloat16(tmp_path):
  artifacts.save_packaged(tmp_path, _params(), meta=META)
  kernel = checkpoint.load(str(tmp_path)).params["vision"]["fc"]["kernel"]
  assert kernel.dtype == np.float32
  rounded = jnp.asarray(_params()["vision"]["fc"]["kernel"], jnp.bfloat16)
  np.testing.assert_array_equal(kernel, np.asarray(rounded, np.float32))


def test_a_flipped_bit_of_a_packaged_leaf_is_named(tmp_path):
  artifacts.save_packaged(tmp_path, _params(), meta=META)
  path = tmp_path / "params.safetensors"
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  with pytest.raises(InputError, match=r"leaf (vision/fc|llm/norm)/"):
    checkpoint.load(str(tmp_path))


def test_another_value_of_a_leaf_is_named(tmp_path):
  artifacts.save(tmp_path, _params(), meta=META)
  crcs = files.read_json(tmp_path / "fingerprint.json")
  crcs["llm/norm/scale"] = "00000000"
  files.write_json(tmp_path / "fingerprint.json", crcs)
  with pytest.raises(InputError, match="leaf llm/norm/scale"):
    checkpoint.load(str(tmp_path))
  # The other part is sound.
  checkpoint.load(f"{tmp_path}:vision")


def _data_file(folder: pathlib.Path) -> pathlib.Path:
  files = [path for path in folder.rglob("*") if path.is_file()]
  inside = [path for path in files if path.parent.name == "d"]
  return max(inside, key=lambda path: path.stat().st_size)


def _flip(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0xFF
  path.write_bytes(content)


@_BROKEN_READ
def test_a_flipped_byte_of_an_artifact_is_an_input_error(tmp_path):
  artifacts.save(tmp_path, _params(), meta=META)
  _flip(_data_file(tmp_path / "params"))
  with pytest.raises(InputError, match="damaged") as caught:
    checkpoint.load(str(tmp_path))
  assert "\n" not in str(caught.value)
  gc.collect()


def test_a_folder_that_is_no_artifact_is_refused(tmp_path):
  with pytest.raises(InputError, match="no model.json"):
    checkpoint.load(str(tmp_path))


# --- resuming ----------------------------------------------------------------


def _state(step):
  return {
    "step": jnp.int32(step),
    "w": jnp.asarray(
      np.random.default_rng(step).normal(size=(64, 32)), jnp.float32
    ),
  }


def _target():
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    _state(0),
  )


def _saved(folder, steps):
  saver = checkpoint.Resumable(folder)
  for step in steps:
    saver.save(step, _state(step), {"examples": 10 * step})
  saver.close()


def test_the_newest_state_comes_back_bit_for_bit(tmp_path):
  _saved(tmp_path, [1, 2, 3])
  saver = checkpoint.Resumable(tmp_path)
  step, state, note = saver.restore(_target())
  saver.close()
  assert (step, note) == (3, {"examples": 30})
  np.testing.assert_array_equal(state["w"], _state(3)["w"])
  # Two are kept.
  assert not (tmp_path / "1").exists()


def test_nothing_saved_gives_none(tmp_path):
  saver = checkpoint.Resumable(tmp_path)
  assert saver.restore(_target()) is None
  saver.close()


@_BROKEN_READ
def test_a_damaged_newest_state_is_set_aside_and_the_one_before_taken(tmp_path):
  _saved(tmp_path, [1, 2])
  _flip(_data_file(tmp_path / "2"))
  saver = checkpoint.Resumable(tmp_path)
  step, state, note = saver.restore(_target())
  assert (step, note) == (1, {"examples": 10})
  np.testing.assert_array_equal(state["w"], _state(1)["w"])
  assert (tmp_path / "2.bad").is_dir() and not (tmp_path / "2").exists()
  # The run goes on and passes the step again.
  saver.save(2, _state(2), {"examples": 20})
  assert saver.restore(_target())[0] == 2
  saver.close()
  gc.collect()


@_BROKEN_READ
def test_damage_of_every_state_is_an_error_that_touches_nothing(tmp_path):
  _saved(tmp_path, [1, 2])
  for step in ("1", "2"):
    _flip(_data_file(tmp_path / step))
  before = sorted(tmp_path.rglob("*"))
  saver = checkpoint.Resumable(tmp_path)
  for _ in range(2):
    with pytest.raises(InputError, match=rf"{tmp_path}: .*2 .*; 1 .*delete"):
      saver.restore(_target())
  saver.close()
  assert sorted(tmp_path.rglob("*")) == before
  gc.collect()


@_BROKEN_READ
def test_states_that_were_set_aside_are_no_reason_to_begin_anew(tmp_path):
  _saved(tmp_path, [1, 2])
  _flip(_data_file(tmp_path / "2"))
  saver = checkpoint.Resumable(tmp_path)
  assert saver.restore(_target())[0] == 1
  saver.close()
  _flip(_data_file(tmp_path / "1"))
  saver = checkpoint.Resumable(tmp_path)
  with pytest.raises(InputError, match=r"1 .*; 2.bad"):
    saver.restore(_target())
  saver.close()
  gc.collect()


@_BROKEN_READ
def test_a_state_without_its_arrays_is_set_aside(tmp_path):
  _saved(tmp_path, [1, 2])
  _data_file(tmp_path / "2").unlink()
  saver = checkpoint.Resumable(tmp_path)
  assert saver.restore(_target())[0] == 1
  saver.close()
  gc.collect()


@_BROKEN_READ
@pytest.mark.parametrize("what", ["data", "metadata", "manifest"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_artifact_is_an_error_of_one_kind(tmp_path, what, how):
  noise = np.random.default_rng(0).normal(size=20_000)
  tree = {"vision": {"w": noise.astype(np.float32)}}
  meta = {"vision": None, "llm": None, "not_carried": []}
  artifacts.save(tmp_path / "a", tree, meta=meta)
  params = tmp_path / "a" / "params"
  path = {
    "data": _data_file(params),
    "metadata": params / "_METADATA",
    "manifest": params / "manifest.ocdbt",
  }[what]
  if how == "gone":
    path.unlink()
  else:
    path.write_bytes(path.read_bytes()[:7])
  with pytest.raises(InputError, match="damaged or incomplete|fingerprint"):
    checkpoint.load(str(tmp_path / "a"))
  gc.collect()
