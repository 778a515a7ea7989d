"""big_vision's npz files: both layouts of blocks, bfloat16, and what is refused."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from pivot_jax import errors
from pivot_jax.weights import checkpoint
from pivot_jax.weights.convert import big_vision, hf, towers
from tests.fixtures import tiny_models
from tests.weights.convert import folders

BLOCK = "params/img/Transformer/encoderblock"
QUERY = "MultiHeadDotProductAttention_0/query"


def _head(config=tiny_models.VISION):
  """Random tensors of the pooling head and of all that lies behind."""
  rng = np.random.default_rng(3)
  shapes = {**towers.unread(config), **towers.extras(config)}
  return {
    name: rng.standard_normal(shape).astype(np.float32)
    for name, shape in shapes.items()
  }


@pytest.fixture
def file(tmp_path, params):
  path = tmp_path / "siglip_28.npz"
  big_vision.save(path, tiny_models.VISION, params["vision"], unread=_head())
  return path


def _members(path):
  with np.load(path) as found:
    return dict(found)


def test_an_encoder_returns_with_the_same_bytes_head_included(file, params):
  opened = big_vision.open_file(file)
  assert opened.vision == tiny_models.VISION
  folders.equal(opened.params(), {"vision": params["vision"]})
  folders.equal(opened.read_unread(), _head())


def test_leaves_have_the_names_and_axes_of_big_vision(file, params):
  members = _members(file)
  side, width, heads = 8, 32, 4
  assert members["params/img/embedding/kernel"].shape == (side, side, 3, width)
  assert members["params/img/pos_embedding"].shape == (1, 9, width)
  kernel = members[f"{BLOCK}/{QUERY}/kernel"]
  assert kernel.shape == (3, width, heads, width // heads)
  ours = params["vision"]["encoder"]["layers"]["self_attn"]
  # Head a of the query reads columns a * 8 and on of our matrix.
  np.testing.assert_array_equal(
    kernel[1, :, 2], ours["q_proj"]["kernel"][1][:, 16:24]
  )
  out = members[f"{BLOCK}/MultiHeadDotProductAttention_0/out/kernel"]
  np.testing.assert_array_equal(out[0, 3], ours["out_proj"]["kernel"][0][24:32])
  assert members["params/img/MAPHead_0/probe"].shape == (1, 1, width)


def _unstack(members):
  found = {}
  for name, array in members.items():
    if not name.startswith(f"{BLOCK}/"):
      found[name] = array
      continue
    for layer, part in enumerate(array):
      found[name.replace(BLOCK, f"{BLOCK}_{layer}")] = part
  return found


@pytest.mark.parametrize(
  "change",
  [
    _unstack,
    lambda m: {n.removeprefix("params/"): x for n, x in m.items()},
    lambda m: {n.removeprefix("params/img/"): x for n, x in m.items()},
    lambda m: m | {"params/txt/head/bias": np.ones(3), "params/t": np.ones(1)},
  ],
  ids=["blocks one by one", "no params", "the tower alone", "with text"],
)
def test_every_published_layout_loads_alike(file, params, change):
  np.savez(file, **change(_members(file)))
  opened = big_vision.open_file(file)
  folders.equal(opened.params(), {"vision": params["vision"]})
  folders.equal(opened.read_unread(), _head())


def test_bfloat16_is_stored_as_void_and_comes_back(tmp_path, params):
  path = tmp_path / "b_28.npz"
  big_vision.save(
    path, tiny_models.VISION, params["vision"], unread=_head(), dtype="bfloat16"
  )
  assert _members(path)["params/img/pos_embedding"].dtype == np.dtype("V2")
  got = big_vision.open_file(path).params()
  table = params["vision"]["embeddings"]["position_embedding"]["embedding"]
  rounded = table.astype(ml_dtypes.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(
    got["vision"]["embeddings"]["position_embedding"]["embedding"], rounded
  )


def test_addresses_name_the_tower(file, params):
  for address in (f"bv:{file}", f"bv:{file}:img", f"bv:{file}:vision"):
    loaded = checkpoint.load(address)
    folders.equal(loaded.params, {"vision": params["vision"]})
  with pytest.raises(errors.InputError, match="no image tower at 'txt'"):
    checkpoint.load(f"bv:{file}:txt")


def test_the_size_in_the_name_tells_384_from_378(tmp_path, params):
  # 28 pixels of patches of 8 give the grid of 24 pixels.
  path = tmp_path / "siglip_b8.npz"
  big_vision.save(path, tiny_models.VISION, params["vision"])
  assert big_vision.open_file(path).vision.image_size == 24
  named = path.with_name("siglip_b8_28.npz")
  path.rename(named)
  assert big_vision.open_file(named).vision.image_size == 28


def test_what_does_not_fit_is_listed(file):
  members = _members(file)
  del members[f"{BLOCK}/MlpBlock_0/Dense_1/bias"]
  members["params/img/extra"] = np.zeros((2, 3))
  members["params/img/MAPHead_0/probe"] = np.zeros((1, 2, 32))
  np.savez(file, **members)
  with pytest.raises(errors.InputError) as caught:
    big_vision.open_file(file)
  for part in (
    "missing: Transformer/encoderblock/MlpBlock_0/Dense_1/bias (3, 32)",
    "unexpected: extra (2, 3)",
    "misshapen: MAPHead_0/probe (1, 2, 32) for (1, 1, 32)",
  ):
    assert part in str(caught.value)


def test_object_arrays_are_refused_unopened(file):
  members = _members(file)
  members["params/img/pos_embedding"] = np.array([{}], dtype=object)
  np.savez(file, **members)
  with pytest.raises(errors.InputError, match="pickled object"):
    big_vision.open_file(file)


def test_a_truncated_file_is_refused(file):
  file.write_bytes(file.read_bytes()[:-200])
  with pytest.raises(errors.InputError, match="cannot be read as npz"):
    big_vision.open_file(file)


def test_a_file_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(errors.InputError, match="no such file"):
    big_vision.open_file(tmp_path / "x.npz")


def test_an_encoder_of_another_family_has_no_such_file(tmp_path, params):
  config = dataclasses.replace(
    tiny_models.VISION, family="clip", class_token=True
  )
  with pytest.raises(errors.InputError, match="is a clip encoder"):
    big_vision.save(tmp_path / "x.npz", config, params["vision"])


def test_npz_to_hugging_face_and_back_is_bitwise(file, tmp_path):
  opened = big_vision.open_file(file)
  hf.save_vision(
    tmp_path / "hf",
    opened.vision,
    opened.params()["vision"],
    unread=opened.read_unread(),
  )
  again = hf.open_folder(tmp_path / "hf")
  back = tmp_path / "back_28.npz"
  big_vision.save(
    back,
    again.vision,
    again.params()["vision"],
    unread=again.read_unread(),
  )
  folders.equal(_members(back), _members(file))


def test_what_the_format_cannot_say_is_refused(tmp_path, params):
  config = dataclasses.replace(
    tiny_models.VISION, hidden_act="gelu", layer_norm_eps=1e-3
  )
  with pytest.raises(errors.InputError, match="hidden_act is 'gelu'.*0.001"):
    big_vision.save(tmp_path / "x.npz", config, params["vision"])


def test_numbers_beyond_float16_are_refused(tmp_path, params):
  large = jax.tree.map(lambda x: x * np.float32(1e7), params["vision"])
  with pytest.raises(errors.InputError, match="beyond float16"):
    big_vision.save(
      tmp_path / "x.npz", tiny_models.VISION, large, dtype="float16"
    )


def test_another_tower_in_a_file_is_found_again(file, params):
  members = {
    n.replace("params/img/", "params/ema/"): x
    for n, x in _members(file).items()
  }
  np.savez(file, **members)
  loaded = checkpoint.load(f"bv:{file}:ema")
  folders.equal(loaded.params, {"vision": params["vision"]})
  arrays, _ = checkpoint.unread(loaded.meta)
  folders.equal(arrays, _head())


def test_whole_numbers_are_refused_before_anything_is_read(file):
  members = _members(file)
  name = "params/img/pos_embedding"
  members[name] = members[name].astype(np.int32)
  np.savez(file, **members)
  with pytest.raises(errors.InputError, match="as floats: pos_embedding int32"):
    big_vision.open_file(file)


@pytest.mark.parametrize("unstack", [False, True])
def test_all_blocks_behind_another_layer_are_given_back(file, params, unstack):
  if unstack:
    np.savez(file, **_unstack(_members(file)))
  opened = big_vision.open_file(file, choices={"feature_layer": -3})
  assert opened.vision.used_layers == 1
  whole = towers.complete(tiny_models.VISION, params["vision"], _head())
  behind = {
    name: array
    for name, array in whole.items()
    if not name.startswith(("encoder.layers.0.", "embeddings."))
  }
  folders.equal(opened.read_unread(), behind)
  named = {x["name"] for x in opened.not_carried}
  block = "Transformer/encoderblock_2/LayerNorm_0/scale"
  assert (block in named) == unstack
