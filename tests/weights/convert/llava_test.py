"""LLaVA-NeXT's layout is read, and the chat template written as we read it."""

import json

import jinja2
import numpy as np
import pytest

from pivot_jax import addresses, errors
from pivot_jax.data import chat
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.weights import checkpoint, export
from pivot_jax.weights.convert import hf, llava, towers
from tests.fixtures import tiny_models
from tests.weights.convert import folders

CONFIG = dict(
  model_type="llava_qwen",
  mm_vision_tower="tower",
  mm_projector_type="mlp2x_gelu",
  mm_vision_select_layer=-2,
  mm_vision_select_feature="patch",
  mm_use_im_start_end=False,
  tie_word_embeddings=False,
)


@pytest.fixture
def folder(tmp_path, params):
  """A model as the paper's code saves it, its tower cut before the last block."""
  whole = tmp_path / "llava"
  hf.save_llava(
    whole, tiny_models.VISION, tiny_models.UNTIED, params, image_token_id=60
  )
  arrays = {}
  for name, array in folders.stored(whole).items():
    name = name.replace("language_model.model.", "model.")
    name = name.replace("language_model.", "")
    name = name.replace("vision_tower.", "model.vision_tower.vision_tower.")
    name = name.replace(
      "multi_modal_projector.linear_1", "model.mm_projector.0"
    )
    name = name.replace(
      "multi_modal_projector.linear_2", "model.mm_projector.2"
    )
    if ".encoder.layers.2." not in name:
      arrays[name] = array
  out = tmp_path / "official"
  out.mkdir()
  folders.store(out, arrays)
  text = json.loads((whole / "config.json").read_text())["text_config"]
  (out / "config.json").write_text(json.dumps(text | CONFIG))
  hf.save_vision(out / "tower", tiny_models.VISION, params["vision"])
  return out


def _set(folder, **fields):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_whole_model_loads(folder, params):
  configs, got, info = folders.load(folder)
  assert configs == {"vision": tiny_models.VISION, "llm": tiny_models.UNTIED}
  folders.equal(got, params)
  assert info["format"] == "llava_qwen"
  # A norm without gradient that the tower kept.
  assert {x["name"].split(".")[-2] for x in info["not_carried"]} == {
    "post_layernorm"
  }


def test_the_encoder_alone_loads(folder, params):
  loaded = checkpoint.load(f"hf:{folder}:vision")
  folders.equal(loaded.params, {"vision": params["vision"]})


def test_the_block_that_was_cut_off_comes_from_the_towers_folder(
  folder, tmp_path
):
  loaded = checkpoint.load(f"hf:{folder}:vision")
  unread, _ = checkpoint.unread(loaded.meta)
  folders.equal(unread, hf.open_folder(folder / "tower").read_unread())
  export.export(f"hf:{folder}:vision", tmp_path / "out", format="hf")
  assert hf.open_folder(tmp_path / "out").vision == tiny_models.VISION


def test_a_towers_folder_may_hold_its_config_alone(folder, params):
  (folder / "tower" / "model.safetensors").unlink()
  loaded = checkpoint.load(f"hf:{folder}:vision")
  folders.equal(loaded.params, {"vision": params["vision"]})
  assert loaded.meta["unread"]["absent"] == ["encoder.layers.2"]
  with pytest.raises(errors.InputError, match="came without encoder.layers.2"):
    checkpoint.unread(loaded.meta)


def test_a_pickle_beside_the_towers_config_is_refused(folder):
  (folder / "tower" / "model.safetensors").rename(folder / "tower" / "x.bin")
  with pytest.raises(errors.InputError, match="x.bin: a pickle"):
    checkpoint.load(f"hf:{folder}:vision")


def test_what_the_tower_has_behind_its_features_is_its_own(folder, params):
  arrays = folders.stored(folder)
  name = "post_layernorm.weight"
  key = f"model.vision_tower.vision_tower.vision_model.{name}"
  arrays[key] = arrays[key] + 1
  folders.store(folder, arrays)
  unread, _ = checkpoint.unread(checkpoint.load(f"hf:{folder}").meta)
  np.testing.assert_array_equal(unread[name], arrays[key])
  assert "encoder.layers.2.mlp.fc1.bias" in unread


def test_an_uncut_tower_is_read_to_the_same_layer(folder, params):
  arrays = folders.stored(folder)
  for name, array in folders.stored(folder / "tower").items():
    arrays["model.vision_tower.vision_tower." + name] = array
  folders.store(folder, arrays)
  configs, got, _ = folders.load(folder)
  assert configs["vision"] == tiny_models.VISION
  folders.equal(got, params)


@pytest.mark.parametrize("stored", [11, 12])
def test_the_published_depth_tells_whether_a_block_is_cut_off(stored):
  assert _inferred(stored).num_hidden_layers == 12
  assert _inferred(stored).used_layers == 11


def test_another_depth_is_no_siglip_tower():
  with pytest.raises(errors.InputError, match="10 blocks of width 768"):
    _inferred(10)


def _inferred(blocks):
  shapes = {
    "embeddings.patch_embedding.weight": (768, 3, 16, 16),
    "embeddings.position_embedding.weight": (196, 768),
    "encoder.layers.0.mlp.fc1.weight": (3072, 768),
  }
  for block in range(blocks):
    shapes[f"encoder.layers.{block}.layer_norm1.weight"] = (768,)
  return towers.from_shapes(
    "x", shapes, family="siglip", layout="siglip", cut=True
  )


def test_a_source_can_be_given_where_the_weights_came_without(folder, tmp_path):
  tower = folder.parent / "tower"
  (folder / "tower").rename(tower)
  _set(folder, mm_vision_tower=str(tower))
  loaded = checkpoint.load(f"hf:{folder}:vision?tower={tower}")
  meta = loaded.meta | {"unread": None}
  assert checkpoint.unread(meta) == (None, None)
  # As of a checkpoint whose tower is nowhere.
  moved = tower.rename(tower.with_name("elsewhere"))
  arrays, known = checkpoint.unread(meta, source=f"hf:{moved}")
  folders.equal(arrays, hf.open_folder(moved).read_unread())
  assert known["modules"] == ["encoder.layers.2", "post_layernorm"]
  assert known["absent"] == []


def test_without_the_towers_config_its_width_must_be_a_published_one(folder):
  _set(folder, mm_vision_tower="google/siglip2-tiny-patch8-28")
  with pytest.raises(errors.InputError, match="width 32.*cannot be told"):
    hf.open_folder(folder)


def test_a_newline_token_is_named_and_left_out(folder):
  arrays = folders.stored(folder)
  arrays["model.image_newline"] = np.ones(40, np.float32)
  folders.store(folder, arrays)
  reasons = {
    x["name"]: x["reason"] for x in folders.load(folder)[2]["not_carried"]
  }
  assert "one tile" in reasons["model.image_newline"]


@pytest.mark.parametrize(
  "fields",
  [
    {"mm_projector_type": "linear"},
    {"mm_vision_select_feature": "cls_patch"},
    {"mm_vision_select_layer": -1},
    {"image_aspect_ratio": "anyres_max_9"},
    {"mm_patch_merge_type": "spatial_unpad"},
    {"mm_use_im_start_end": True},
  ],
  ids=str,
)
def test_another_way_of_seeing_is_refused(folder, fields):
  _set(folder, **fields)
  (name,) = fields
  with pytest.raises(errors.InputError, match=f"{name} is"):
    hf.open_folder(folder)


def test_a_missing_tower_name_is_refused(folder):
  _set(folder, mm_vision_tower=None)
  with pytest.raises(errors.InputError, match="names no encoder"):
    hf.open_folder(folder)


@pytest.mark.parametrize("template", chat.TEMPLATES)
def test_the_template_writes_the_prompt_that_is_asked(template):
  tokenizer = load_tokenizer(addresses.tokenizer_folder("package:toy"))
  wanted = chat.encode_prompt(tokenizer, "what is it ?", template=template)
  content = [{"type": "image"}, {"type": "text", "text": "what is it ?"}]
  said = jinja2.Template(llava.chat_template(template)).render(
    messages=[{"role": "user", "content": content}],
    add_generation_prompt=True,
  )
  assert said == tokenizer.decode(wanted.prompt)
  assert chat.system(template) in said


@pytest.mark.parametrize("link", [False, True])
def test_a_towers_folder_outside_is_read_only_if_named(folder, params, link):
  tower = folder.parent / "tower"
  (folder / "tower").rename(tower)
  if link:
    (folder / "tower").symlink_to(tower)
  else:
    _set(folder, mm_vision_tower="../tower")
  with pytest.raises(errors.InputError, match="outside the model's.*tower="):
    hf.open_folder(folder)
  opened = hf.open_folder(folder, tower=tower)
  folders.equal(opened.params(), params)
  loaded = checkpoint.load(f"hf:{folder}:vision?tower={tower}")
  assert loaded.meta["unread"]["address"].endswith(
    f"tower={tower}".replace("/", "%2F")
  )


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, ["tower"], "~nobody/x"])
def test_a_name_of_no_tower_is_an_input_error(folder, name):
  _set(folder, mm_vision_tower=name)
  with pytest.raises(errors.InputError):
    hf.open_folder(folder)
