"""Saved parameters come back bit for bit; damaged ones are named."""

import gc

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pivot_jax import files, sharding, trees
from pivot_jax.errors import InputError
from pivot_jax.weights import artifacts, checkpoint
from tests.weights import damage

META = {"vision": None, "llm": None, "sources": {}, "not_carried": []}


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


@damage.BROKEN_READ
def test_a_flipped_byte_of_an_artifact_is_an_input_error(tmp_path):
  artifacts.save(tmp_path, _params(), meta=META)
  damage.flip(damage.data_file(tmp_path / "params"))
  with pytest.raises(InputError, match="damaged") as caught:
    checkpoint.load(str(tmp_path))
  assert "\n" not in str(caught.value)
  gc.collect()


def test_a_folder_that_is_no_artifact_is_refused(tmp_path):
  with pytest.raises(InputError, match="no model.json"):
    checkpoint.load(str(tmp_path))


@damage.BROKEN_READ
@pytest.mark.parametrize("what", ["data", "metadata", "manifest"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_artifact_is_an_error_of_one_kind(tmp_path, what, how):
  noise = np.random.default_rng(0).normal(size=20_000)
  tree = {"vision": {"w": noise.astype(np.float32)}}
  meta = {"vision": None, "llm": None, "not_carried": []}
  artifacts.save(tmp_path / "a", tree, meta=meta)
  params = tmp_path / "a" / "params"
  path = {
    "data": damage.data_file(params),
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


def test_another_choice_in_model_json_is_named(tmp_path):
  artifacts.save(tmp_path, _params(), meta=META | {"template": "plain"})
  path = tmp_path / "model.json"
  path.write_text(path.read_text("utf-8").replace("plain", "qwen_1_5"), "utf-8")
  with pytest.raises(InputError, match="model.json: differs from fingerprint"):
    checkpoint.load(str(tmp_path))


def test_a_packaged_artifact_covers_its_model_json_too(tmp_path):
  artifacts.save_packaged(tmp_path, _params(), meta=META)
  path = tmp_path / "model.json"
  path.write_text(path.read_text("utf-8") + "\n", "utf-8")
  with pytest.raises(InputError, match="model.json: differs from fingerprint"):
    checkpoint.load(str(tmp_path))


def test_an_artifact_without_the_entry_loads_and_says_so(tmp_path, caplog):
  artifacts.save(tmp_path, _params(), meta=META)
  prints = tmp_path / "fingerprint.json"
  prints.write_text(artifacts.leaf_prints(prints), "utf-8")
  with caplog.at_level("INFO", "pivot_jax"):
    loaded = checkpoint.load(str(tmp_path))
  assert trees.fingerprint(loaded.params) == trees.fingerprint(_params())
  assert "model.json is not covered by fingerprint.json" in caplog.text


def test_the_entry_of_model_json_is_no_print_of_the_leaves(tmp_path):
  for name, meta in (("a", META), ("b", META | {"template": "plain"})):
    artifacts.save(tmp_path / name, _params(), meta=meta)
  one, other = (tmp_path / name / "fingerprint.json" for name in "ab")
  assert one.read_text("utf-8") != other.read_text("utf-8")
  assert artifacts.leaf_prints(one) == artifacts.leaf_prints(other)


def test_an_artifact_of_an_earlier_version_is_read_and_verified(tmp_path):
  artifacts.save(tmp_path, _params(), meta=META)
  for wrong in (False, True):
    values = _params()
    values["llm"]["norm"]["scale"][3] += wrong
    with ocp.PyTreeCheckpointer() as saver:
      saver.save(tmp_path / "params", values, force=True)
    if not wrong:
      found = checkpoint.load(str(tmp_path)).params
      assert trees.fingerprint(found) == trees.fingerprint(_params())
  with pytest.raises(InputError, match="leaf llm/norm/scale"):
    checkpoint.load(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slices_of_a_leaf_are_those_of_the_whole(tmp_path, monkeypatch, dtype):
  monkeypatch.setattr(artifacts, "_GROUP", 64)
  kernel = np.random.default_rng(0).normal(size=(2, 64, 32))
  kernel[0, 0, :3] = 1.00390625, 1.01171875, 3.4e38
  tree = {"vision": {"q_proj": {"kernel": kernel.astype(np.float32)}}}
  artifacts.save(tmp_path, tree, meta=META)
  found = checkpoint.load(str(tmp_path), deferred=True).params
  leaf = found["vision"]["q_proj"]["kernel"]
  prints = sharding.fingerprint(found)
  assert prints == trees.fingerprint(tree) and leaf.verified
  monkeypatch.setattr(leaf, "read", None)
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  path = "vision/q_proj/kernel"
  placed = sharding.place(found, mesh, dtypes={path: jnp.dtype(dtype)})
  placed = placed["vision"]["q_proj"]["kernel"]
  assert placed.sharding.shard_shape(placed.shape) == (2, 16, 16)
  wanted = tree["vision"]["q_proj"]["kernel"].astype(jnp.dtype(dtype))
  np.testing.assert_array_equal(placed, wanted)
