"""One error for every tensor that does not fit, with the reason if it shows."""

import json
import logging

import numpy as np
import pytest

from pivot_jax import addresses, errors
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.weights import checkpoint, export
from pivot_jax.weights.convert import hf
from tests.fixtures import tiny_models
from tests.weights.convert import folders


def _refused(folder, *parts):
  with pytest.raises(errors.InputError) as caught:
    hf.open_folder(folder)
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert part in message


def _change(folder, change):
  arrays = folders.stored(folder)
  change(arrays)
  folders.store(folder, arrays)


def test_a_tower_cut_to_fewer_layers_is_recognised(vision_folder):
  def cut(arrays):
    for name in [n for n in arrays if ".layers.2." in n]:
      del arrays[name]

  _change(vision_folder, cut)
  _refused(
    vision_folder,
    "missing: vision.encoder.layers.2.",
    "this looks like a tower cut to 2 of 3 layers",
  )


def test_a_naflex_model_is_recognised(vision_folder):
  name = "vision_model.embeddings.patch_embedding.weight"

  def flatten(arrays):
    arrays[name] = arrays[name].reshape(32, -1)

  _change(vision_folder, flatten)
  _refused(vision_folder, f"{name} (32, 192)", "looks like SigLIP2 NaFlex")


def test_a_naflex_config_is_recognised(vision_folder):
  path = vision_folder / "config.json"
  config = json.loads(path.read_text()) | {"model_type": "siglip2"}
  path.write_text(json.dumps(config))
  _refused(vision_folder, "model_type is 'siglip2'", "NaFlex")


@pytest.mark.parametrize(
  "name, said",
  [
    ("base_model.q_proj.lora_A.weight", "looks like a LoRA adapter"),
    ("vision_model.encoder.layers.0.mlp.fc1.qweight", "looks quantised"),
    ("embeddings.register_tokens", "DINOv2 with registers"),
  ],
)
def test_other_kinds_of_files_are_recognised(vision_folder, name, said):
  _change(
    vision_folder, lambda arrays: arrays.update({name: np.zeros(4, "f4")})
  )
  _refused(vision_folder, f"unexpected: {name} (4,)", said)


def _grow(folder, side=4):
  """A folder whose position table is of another image size."""
  name = "vision_model.embeddings.position_embedding.weight"
  rng = np.random.default_rng(0)
  table = rng.standard_normal((side * side, 32)).astype(np.float32)
  _change(folder, lambda arrays: arrays.update({name: table}))


def test_positions_of_another_size_say_how_to_ask_for_the_resize(
  vision_folder,
):
  _grow(vision_folder)
  _refused(
    vision_folder,
    "(16, 32) for (9, 32)",
    "its positions are for 4 x 4 patches, images of 32 pixels",
    "?image_size=28&positions=big_vision",
  )


@pytest.mark.parametrize("method", ["big_vision", "dinov2"])
def test_positions_are_resized_only_when_asked_and_logged(
  vision_folder, params, method, caplog, monkeypatch
):
  monkeypatch.setattr(logging.getLogger("pivot_jax"), "propagate", True)
  caplog.set_level("INFO", "pivot_jax")
  loaded = checkpoint.load(
    f"hf:{vision_folder}?image_size=40&positions={method}"
  )
  assert loaded.vision.image_size == 40
  inside = loaded.params["vision"]["embeddings"]["position_embedding"]
  assert inside["embedding"].shape == (25, 32)
  assert f"from 3 x 3 to 5 x 5 patches, as {method} does" in caplog.text
  # Everything else is as it was.
  folders.equal(loaded.params["vision"]["encoder"], params["vision"]["encoder"])


@pytest.mark.parametrize(
  "query, said",
  [
    ("image_size=40", "needs both choices"),
    ("positions=dinov2", "needs both choices"),
    ("image_size=40&positions=nearest", "nearest"),
    ("image_size=4&positions=dinov2", "less than a patch"),
    ("tokens=5", "no square number"),
    ("feature_layer=-9", "leaves -5 blocks"),
  ],
)
def test_choices_that_do_not_go_are_refused(vision_folder, query, said):
  with pytest.raises(errors.InputError, match=said):
    checkpoint.load(f"hf:{vision_folder}?{query}")


def test_another_layer_can_be_chosen(vision_folder):
  loaded = checkpoint.load(
    f"hf:{vision_folder}?feature_layer=-1&final_norm=true"
  )
  assert loaded.vision.used_layers == tiny_models.VISION.num_hidden_layers
  assert "post_layernorm" in loaded.params["vision"]
  assert loaded.meta["unread"] is None


def test_all_blocks_behind_another_layer_are_given_back(
  vision_folder, tmp_path
):
  address = f"hf:{vision_folder}?feature_layer=-3"
  loaded = checkpoint.load(address)
  modules = ["encoder.layers.1", "encoder.layers.2", "post_layernorm"]
  assert loaded.meta["unread"]["modules"] == modules
  export.export(address, tmp_path / "out", format="hf")
  folders.equal(folders.stored(tmp_path / "out"), folders.stored(vision_folder))


@pytest.mark.parametrize("size", [4, 100])
def test_a_truncated_file_is_refused(vision_folder, size):
  path = vision_folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:size])
  _refused(vision_folder, "cannot be read as safetensors")


def test_a_malformed_header_is_refused(vision_folder):
  path = vision_folder / "model.safetensors"
  path.write_bytes(b"\x10\0\0\0\0\0\0\0{not json at all" + b"\0" * 50)
  _refused(vision_folder, "cannot be read as safetensors")


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
def test_a_pickle_is_refused_with_what_to_do(tmp_path, suffix):
  path = tmp_path / f"weights.{suffix}"
  path.write_bytes(b"\x80\x02}q\x00.")
  with pytest.raises(errors.InputError, match="pickle.*docs/formats.md"):
    checkpoint.load(f"timm:{path}")


def test_no_tokens_beyond_the_vocabulary(tmp_path, params):
  hf.save_llm(tmp_path / "llm", tiny_models.UNTIED, params["llm"])
  root = addresses.tokenizer_folder("package:toy")
  load_tokenizer(root).save(tmp_path / "llm")
  with pytest.raises(errors.InputError, match="the language model only 61"):
    export.export(f"hf:{tmp_path / 'llm'}", tmp_path / "out", format="hf")
  assert [path.name for path in tmp_path.iterdir()] == ["llm"]


def test_numbers_beyond_float16_are_refused(tmp_path, params):
  vision = params["vision"] | {}
  table = np.full((9, 32), 1e5, np.float32)
  vision["embeddings"] = vision["embeddings"] | {
    "position_embedding": {"embedding": table}
  }
  with pytest.raises(errors.InputError, match="position.* beyond float16"):
    hf.save_vision(tmp_path, tiny_models.VISION, vision, dtype="float16")


def test_moved_weights_read_to_another_layer_are_found(vision_folder):
  loaded = checkpoint.load(f"hf:{vision_folder}?feature_layer=-3")
  moved = vision_folder.rename(vision_folder.with_name("moved"))
  with pytest.raises(errors.InputError, match="put it back, or at export"):
    checkpoint.unread(loaded.meta)
  arrays, known = checkpoint.unread(loaded.meta, source=f"hf:{moved}")
  assert known["fingerprint"] == loaded.meta["unread"]["fingerprint"]
  assert {name.split(".")[2] for name in arrays if "layers" in name} == {
    "1",
    "2",
  }
