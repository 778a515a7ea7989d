"""Weight files: shards, types, and the ones that are refused."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pivot_jax import errors
from pivot_jax.weights.convert import safetensor_files
from tests.weights.convert import folders


def test_shards_with_an_index_load_as_one_file(vision_folder, params):
  arrays = folders.stored(vision_folder)
  (vision_folder / "model.safetensors").unlink()
  safetensor_files.write(vision_folder, arrays, shard_bytes=20_000)
  assert len(list(vision_folder.glob("model-*.safetensors"))) > 2
  folders.equal(folders.load(vision_folder)[1], {"vision": params["vision"]})
  next(vision_folder.glob("model-00002-*")).unlink()
  with pytest.raises(errors.InputError, match="model-00002.*download"):
    folders.load(vision_folder)


def test_an_index_may_not_leave_the_folder(vision_folder):
  index = {"weight_map": {"x": "../elsewhere.safetensors"}}
  (vision_folder / "model.safetensors").unlink()
  path = vision_folder / "model.safetensors.index.json"
  path.write_text(json.dumps(index))
  with pytest.raises(errors.InputError, match="outside the folder"):
    folders.load(vision_folder)


def test_bfloat16_loads_as_float32(vision_folder, params):
  arrays = folders.stored(vision_folder)
  halved = {k: v.astype(ml_dtypes.bfloat16) for k, v in arrays.items()}
  folders.store(vision_folder, halved)
  _, got, _ = folders.load(vision_folder)
  folders.equal(
    got["vision"],
    jax.tree.map(
      lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32),
      params["vision"],
    ),
  )
  assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(np.float32)}


def test_pickles_are_refused_with_advice(vision_folder):
  (vision_folder / "model.safetensors").rename(
    vision_folder / "pytorch_model.bin"
  )
  with pytest.raises(errors.InputError, match="pytorch_model.bin.*convert"):
    folders.load(vision_folder)


def test_damaged_weights_are_refused(vision_folder):
  path = vision_folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(errors.InputError, match="model.safetensors: cannot"):
    folders.load(vision_folder)


def test_whole_numbers_are_refused_as_weights(vision_folder):
  arrays = folders.stored(vision_folder)
  name = "vision_model.encoder.layers.0.mlp.fc1.weight"
  arrays[name] = arrays[name].astype(np.int8)
  folders.store(vision_folder, arrays)
  with pytest.raises(
    errors.InputError, match="not stored as floats: .*fc1.weight I8"
  ):
    folders.load(vision_folder)


def test_a_file_beside_an_index_is_refused(vision_folder):
  arrays = folders.stored(vision_folder)
  safetensor_files.write(vision_folder, arrays, shard_bytes=20_000)
  with pytest.raises(errors.InputError, match="both model.safetensors and"):
    folders.load(vision_folder)


def test_a_tensor_that_the_index_places_elsewhere_is_refused(vision_folder):
  arrays = folders.stored(vision_folder)
  (vision_folder / "model.safetensors").unlink()
  safetensor_files.write(vision_folder, arrays, shard_bytes=20_000)
  shards = sorted(vision_folder.glob("model-*.safetensors"))
  first, last = shards[0], shards[-1]
  stale = safetensors.numpy.load_file(first)
  name = sorted(stale)[0]
  inside = safetensors.numpy.load_file(last) | {name: stale[name] + 1}
  safetensors.numpy.save_file(inside, last, metadata={"format": "pt"})
  with pytest.raises(errors.InputError, match=f"{last.name}: holds {name}"):
    folders.load(vision_folder)
