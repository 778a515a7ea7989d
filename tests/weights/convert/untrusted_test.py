"""Fields and headers of foreign weights: one line that names file and field."""

import json
import os
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from pivot_jax.errors import InputError
from pivot_jax.weights import checkpoint
from pivot_jax.weights.convert import big_vision, hf, timm
from tests.fixtures import tiny_models
from tests.weights.convert import folders

pytestmark = pytest.mark.usefixtures("unchecked")


def _refused(address, *said):
  with pytest.raises(InputError) as caught:
    checkpoint.load(address)
  line = str(caught.value)
  assert all(words in line for words in said), line
  assert "\n" not in line and len(line) < 5000


def _set(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("field, value", [
  ("layer_norm_eps", float("nan")),
  ("layer_norm_eps", float("inf")),
  ("layer_norm_eps", "1e-6"),
  ("layer_norm_eps", 1e30),
  ("layer_norm_eps", True),
  ("num_hidden_layers", 100_000),
  ("num_hidden_layers", -3),
  ("num_hidden_layers", True),
  ("num_attention_heads", 0),
  ("hidden_size", 10**4000),
  ("hidden_size", -32),
  ("intermediate_size", 2**40),
  ("image_size", 10**9),
  ("patch_size", 10**9),
  ("patch_size", 29),
  ("hidden_act", []),
  ("hidden_act", {"gelu": 1}),
])  # fmt: skip
def test_a_field_of_an_encoders_config_is_named(vision_folder, field, value):
  _set(vision_folder / "config.json", **{field: value})
  name = "not readable as JSON" if value in (np.inf,) else field
  name = "config.json" if isinstance(value, float) and value != 1e30 else name
  _refused(f"hf:{vision_folder}", "config.json: ", name)


@pytest.mark.parametrize("field, value", [
  ("image_mean", ["0.5"] * 3),
  ("image_mean", {"r": 0.5}),
  ("image_std", [0.5, 0.5, 1e-40]),
  ("image_std", 0),
  ("image_std", -1),
  ("resample", True),
  ("size", {"height": 10**9, "width": 10**9}),
  ("size", []),
  ("default_to_square", "no"),
  ("image_processor_type", ["SiglipImageProcessor"]),
])  # fmt: skip
def test_a_field_of_a_processor_is_named(vision_folder, field, value):
  _set(vision_folder / "preprocessor_config.json", **{field: value})
  _refused(f"hf:{vision_folder}", f"preprocessor_config.json: {field} is")


@pytest.mark.parametrize("field, value", [
  ("num_attention_heads", 0),
  ("num_key_value_heads", 0),
  ("num_key_value_heads", "2"),
  ("head_dim", 0),
  ("hidden_size", None),
  ("vocab_size", 10**12),
  ("rope_theta", [1e6]),
  ("rope_theta", 0),
  ("rms_norm_eps", 0),
  ("rms_norm_eps", "small"),
  ("initializer_range", -1),
  ("tie_word_embeddings", "yes"),
  ("rope_parameters", [1]),
  ("num_hidden_layers", 1001),
])  # fmt: skip
def test_a_field_of_a_language_model_is_named(tmp_path, params, field, value):
  hf.save_llm(tmp_path, tiny_models.UNTIED, params["llm"])
  _set(tmp_path / "config.json", **{field: value})
  _refused(f"hf:{tmp_path}", "config.json: ", f"{field} is")


@pytest.mark.parametrize("field, value", [
  ("vision_config", [1]),
  ("text_config", "qwen2"),
  ("vision_feature_layer", True),
  ("tie_word_embeddings", "no"),
])  # fmt: skip
def test_a_field_of_a_llava_is_named(tmp_path, params, field, value):
  models = tiny_models.VISION, tiny_models.UNTIED
  hf.save_llava(tmp_path, *models, params, image_token_id=60)
  _set(tmp_path / "config.json", **{field: value})
  _refused(f"hf:{tmp_path}", "config.json: ", f"{field} is")


@pytest.mark.parametrize("where, field, value", [
  ("model_args", "num_heads", 0),
  ("model_args", "num_heads", [4]),
  ("model_args", "img_size", {}),
  ("model_args", "act_layer", ["gelu"]),
  ("pretrained_cfg", "input_size", 28),
  ("pretrained_cfg", "input_size", [3, 28, "28"]),
  ("pretrained_cfg", "crop_pct", 0),
  ("pretrained_cfg", "crop_pct", "1"),
  ("pretrained_cfg", "interpolation", ["bicubic"]),
  ("pretrained_cfg", "crop_mode", {}),
  ("pretrained_cfg", "mean", [0.5]),
  ("pretrained_cfg", "std", [0, 0, 0]),
  (None, "model_args", [1]),
  (None, "pretrained_cfg", "siglip"),
])  # fmt: skip
def test_a_field_of_timms_config_is_named(
  tmp_path, params, where, field, value
):
  timm.save(tmp_path, tiny_models.VISION, params["vision"])
  path = tmp_path / "config.json"
  found = json.loads(path.read_text())
  (found[where] if where else found)[field] = value
  path.write_text(json.dumps(found))
  _refused(f"timm:{tmp_path}", str(tmp_path), f"{field} is")


def test_a_misshapen_bias_of_the_last_norm_is_named(vision_folder):
  arrays = folders.stored(vision_folder)
  key = "vision_model.post_layernorm.bias"
  arrays[key] = arrays[key][:5]
  folders.store(vision_folder, arrays)
  _refused(
    f"hf:{vision_folder}?feature_layer=-1&final_norm=true", f"{key} (5,)"
  )


@pytest.mark.parametrize("shape", [(), (5,), (0, 32)])
def test_a_misshapen_position_table_is_named(vision_folder, shape):
  arrays = folders.stored(vision_folder)
  key = "vision_model.embeddings.position_embedding.weight"
  arrays[key] = np.zeros(shape, np.float32)
  folders.store(vision_folder, arrays)
  _refused(f"hf:{vision_folder}", key)


@pytest.mark.parametrize("key", ["pos_embed", "patch_embed.proj.weight"])
@pytest.mark.parametrize("shape", [(), (1,), (0, 0, 0, 0)])
def test_a_misshapen_tensor_of_timms_is_named(tmp_path, params, key, shape):
  timm.save(tmp_path, tiny_models.VISION, params["vision"])
  arrays = folders.stored(tmp_path)
  arrays[key] = np.zeros(shape, np.float32)
  folders.store(tmp_path, arrays)
  _refused(f"timm:{tmp_path}", str(tmp_path))


def test_as_many_tensors_are_listed_as_can_be_read(vision_folder):
  arrays = folders.stored(vision_folder)
  for number in range(3000):
    arrays[f"more.{number}"] = np.zeros(1, np.float32)
  folders.store(vision_folder, arrays)
  _refused(f"hf:{vision_folder}", "unexpected: more.0", "and 2900 more")


@pytest.mark.parametrize(
  "file", [["model.safetensors"], None, 3, "..", "", "/x"]
)
def test_a_shard_of_an_index_is_the_name_of_a_file(vision_folder, file):
  (vision_folder / "model.safetensors").unlink()
  index = {"weight_map": {"vision_model.head.probe": file}}
  path = vision_folder / "model.safetensors.index.json"
  path.write_text(json.dumps(index))
  _refused(f"hf:{vision_folder}", str(vision_folder))


@pytest.mark.parametrize("head", [
  (2**62).to_bytes(8, "little"),
  (2**27).to_bytes(8, "little") + b"{" * 100,
  b"\x02" + b"\0" * 7 + b"[]",
  (60_000).to_bytes(8, "little") + b'{"a":' * 12_000,
])  # fmt: skip
def test_a_header_without_measure_is_refused(vision_folder, head):
  (vision_folder / "model.safetensors").write_bytes(head)
  _refused(f"hf:{vision_folder}", "cannot be read as safetensors")


def test_a_pipe_in_place_of_weights_is_refused(vision_folder):
  (vision_folder / "model.safetensors").unlink()
  os.mkfifo(vision_folder / "model.safetensors")
  _refused(f"hf:{vision_folder}", "no regular file")


@pytest.fixture
def npz(tmp_path, params):
  path = tmp_path / "siglip_28.npz"
  big_vision.save(path, tiny_models.VISION, params["vision"])
  return path


def test_an_encrypted_npz_is_refused(npz):
  content = bytearray(npz.read_bytes())
  with zipfile.ZipFile(npz) as archive:
    places = [entry.header_offset for entry in archive.infolist()]
    directory = archive.start_dir
  for place in places:
    content[place + 6] |= 1
  for _ in places:
    content[directory + 8] |= 1
    name, extra, note = np.frombuffer(content[directory + 28 :][:6], "<u2")
    directory += 46 + int(name) + int(extra) + int(note)
  npz.write_bytes(content)
  _refused(f"bv:{npz}", "cannot be read as npz", "encrypted")


@pytest.mark.parametrize(
  "shape", ["(-1,)", "(True,)", f"({10**12},)", "((),)", "(1", "(1 2)"]
)
def test_a_misshapen_member_of_an_npz_is_refused(npz, tmp_path, shape):
  with zipfile.ZipFile(npz) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  head = f"{{'descr':'<f4','fortran_order':False,'shape':{shape},}}".encode()
  head += b" " * (117 - len(head)) + b"\n"
  name = "params/img/embedding/bias.npy"
  members[name] = b"\x93NUMPY\x01\0" + len(head).to_bytes(2, "little") + head
  other = tmp_path / "other_28.npz"
  with zipfile.ZipFile(other, "w") as archive:
    for key, content in members.items():
      archive.writestr(key, content)
  _refused(f"bv:{other}", "other_28.npz")


def test_a_number_of_blocks_beyond_measure_is_refused(tmp_path, params):
  timm.save(tmp_path, tiny_models.VISION, params["vision"])
  arrays = folders.stored(tmp_path)
  arrays["blocks.99999999.norm1.weight"] = np.zeros(32, np.float32)
  safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
  _refused(f"timm:{tmp_path}", "num_hidden_layers is 100000000")
