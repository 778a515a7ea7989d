"""An artifact from elsewhere: fields checked, and nothing read that nobody named."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import pivot_jax
from pivot_jax import addresses, files
from pivot_jax.errors import InputError
from pivot_jax.stages import detach
from pivot_jax.weights import artifacts, checkpoint, export
from pivot_jax.weights.convert import hf, towers
from tests.fixtures import tiny_models, tiny_stages

pytestmark = pytest.mark.usefixtures("unchecked")

TOY = pathlib.Path(pivot_jax.__file__).parent / "assets" / "toy"


@pytest.fixture
def toy(tmp_path):
  """Return a function that copies an artifact with other fields in model.json."""

  def copy(change, entry=False):
    folder = tmp_path / "toy"
    shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("stage1"))
    meta = json.loads((folder / "model.json").read_text("utf-8"))
    change(meta)
    files.write_json(folder / "model.json", meta)
    if not entry:
      prints = folder / "fingerprint.json"
      prints.write_text(artifacts.leaf_prints(prints), "utf-8")
    return folder

  return copy


def _refused(folder, *said):
  with pytest.raises(InputError) as caught:
    checkpoint.load(str(folder), deferred=True)
  line = str(caught.value)
  assert all(words in line for words in said) and "\n" not in line, line


def test_other_heads_are_damage_where_the_entry_is(toy):
  folder = toy(lambda meta: meta["vision"].update(num_attention_heads=2), True)
  _refused(folder, "model.json: differs from fingerprint.json")


@pytest.mark.parametrize("field, value", [
  ("vision", []),
  ("llm", "qwen2"),
  ("not_carried", None),
  ("not_carried", [{"name": "x"}]),
  ("sources", ["x"]),
  ("sources", {"vision": 3}),
  ("versions", {"jax": 1}),
  ("preprocessing", "bicubic"),
  ("unread", {"address": "hf:a/b"}),
  ("unread", {"address": 1, "fingerprint": "", "modules": [], "absent": []}),
  ("unread", {"address": "", "fingerprint": "", "modules": [1], "absent": []}),
  ("parts", "vision"),
  ("template", ["qwen_1_5"]),
  ("tokenizer", 5),
])  # fmt: skip
def test_a_field_of_model_json_is_named(toy, field, value):
  folder = toy(lambda meta: meta.update({field: value}))
  _refused(folder, f"model.json: {field} is")


@pytest.mark.parametrize("part, field, value", [
  ("vision", "num_attention_heads", 0),
  ("vision", "layer_norm_eps", 0),
  ("vision", "image_std", [0, 0, 0]),
  ("vision", "image_mean", [[0.5]] * 3),
  ("vision", "num_hidden_layers", 100_000),
  ("vision", "no_such", 1),
  ("llm", "rope_theta", -1),
  ("llm", "vocab_size", 10**12),
  ("llm", "head_dim", 2.0),
])  # fmt: skip
def test_a_number_of_model_json_is_named(toy, part, field, value):
  folder = toy(lambda meta: meta[part].update({field: value}))
  _refused(folder, f"model.json: {part}: ", field)


@pytest.mark.parametrize("field", ["vision", "llm", "not_carried"])
def test_a_field_that_is_missing_is_named(toy, field):
  _refused(toy(lambda meta: meta.pop(field)), f"model.json: has no {field}")


def test_a_size_that_is_missing_is_named(toy):
  _refused(toy(lambda meta: meta["llm"].pop("vocab_size")), "vocab_size")


def test_a_way_of_framing_is_one_of_ours(toy):
  folder = toy(lambda meta: meta["preprocessing"].update(resample="[x](y)"))
  _refused(folder, "model.json: resample=")


def test_leaves_that_are_not_those_of_model_json_are_refused(toy):
  folder = toy(lambda meta: meta["vision"].update(intermediate_size=385))
  _refused(folder, "do not fit the model of model.json", "mlp/fc1/bias")


@pytest.mark.parametrize("content", [
  "{", "[]", "null", '{"tree_metadata": []}', '{"tree_metadata": {"x": 1}}',
  '{"tree_metadata":' * 50_000,
])  # fmt: skip
def test_damaged_metadata_of_parameters_are_an_input_error(tmp_path, content):
  tiny_stages.save(tmp_path, tiny_stages.params())
  path = tmp_path / "params" / "_METADATA"
  path.write_text(content)
  with pytest.raises(InputError) as caught:
    checkpoint.load(str(tmp_path))
  assert "\n" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch):
  """Return the models that the hub is asked for; nothing is named yet."""
  asked = []

  def ask(name, revision):
    asked.append((name, revision))
    raise InputError("the hub did not give it")

  monkeypatch.setattr(addresses, "_from_hub", ask)
  monkeypatch.setattr(addresses, "_named", set())
  return asked


def _behind(address, **more):
  known = {"address": address, "fingerprint": "00000000", "absent": []}
  return known | {"modules": ["head"]} | more


@pytest.mark.parametrize("more", [
  {},
  {"absent": ["encoder.layers.4"]},
  {"copy": "hf:someone/other"},
])  # fmt: skip
def test_the_hub_is_not_asked_for_what_an_artifact_names(
  toy, hub, tmp_path, more
):
  known = _behind("hf:someone/tower", **more)
  folder = toy(lambda meta: meta.update(unread=known))
  with pytest.raises(InputError, match=r"--source="):
    export.export(f"{folder}:vision", tmp_path / "out", format="hf")
  assert not hub and not (tmp_path / "out").exists()


def test_the_hub_is_asked_for_what_was_named(toy, hub, tmp_path):
  folder = toy(lambda meta: meta.update(unread=_behind("hf:some/tower")))
  with pytest.raises(InputError, match="the hub did not give it"):
    source = "hf:some/tower?revision=main"
    export.export(
      f"{folder}:vision", tmp_path / "out", format="hf", source=source
    )
  addresses.name("hf:some/tower")
  with pytest.raises(InputError, match="the hub did not give it"):
    export.export(f"{folder}:vision", tmp_path / "out", format="hf")
  assert hub == [("some/tower", "main"), ("some/tower", None)]


@pytest.fixture
def trained(tmp_path, params, monkeypatch):
  """Return an artifact that was trained from a folder, and the folder."""
  monkeypatch.setattr(addresses, "_named", set())
  config = tiny_models.VISION
  behind = {
    name: np.full(shape, 0.5, np.float32)
    for name, shape in towers.unread(config).items()
  }
  hf.save_vision(tmp_path / "origin", config, params["vision"], unread=behind)
  loaded = checkpoint.load(f"hf:{tmp_path / 'origin'}")
  artifacts.save(tmp_path / "trained", loaded.params, meta=loaded.meta)
  addresses._named.clear()
  return tmp_path / "trained", tmp_path / "origin"


def test_a_folder_that_an_artifact_names_is_not_read(trained, tmp_path):
  artifact, origin = trained
  with pytest.raises(InputError, match="nobody named") as caught:
    export.export(str(artifact), tmp_path / "out", format="hf")
  assert f"--source=hf:{origin}" in str(caught.value)
  source = f"hf:{origin}"
  export.export(str(artifact), tmp_path / "out", format="hf", source=source)


def test_a_link_out_of_an_artifact_is_not_followed(trained, tmp_path):
  artifact, origin = trained
  (artifact / "tower").symlink_to(origin)
  meta = files.read_json(artifact / "model.json")
  meta["unread"]["address"] = f"hf:{artifact / 'tower'}"
  artifacts.save(artifact, checkpoint.load(str(artifact)).params, meta=meta)
  with pytest.raises(InputError, match="nobody named"):
    export.export(str(artifact), tmp_path / "out", format="hf")


def test_a_detached_encoder_has_its_own_copy(trained, tmp_path):
  artifact, origin = trained
  # As the run does, whose config names where it starts.
  addresses.name(f"hf:{origin}")
  cut = tmp_path / "cut"
  detach.run(None, {"init": str(artifact)}, cut)
  addresses._named.clear()
  shutil.rmtree(origin)
  export.export(str(cut), tmp_path / "out", format="hf")
  one, other = (
    hf.open_folder(x).read_unread() for x in (tmp_path / "out", cut / "hf")
  )
  assert one.keys() == other.keys()
  assert all(np.array_equal(one[name], other[name]) for name in one)
  text = (tmp_path / "out" / "README.md").read_text("utf-8")
  assert "original weights (`hf:origin`" in text
  # A training from it takes the copy along, and a changed copy is refused.
  assert checkpoint.unread(checkpoint.load(str(cut)).meta)[1]["copy"]
  (cut / "hf" / "model.safetensors").unlink()
  hf.save_vision(
    cut / "hf", tiny_models.VISION, checkpoint.load(str(cut)).params["vision"]
  )
  with pytest.raises(InputError, match="another fingerprint"):
    export.export(str(cut), tmp_path / "other", format="hf")


def test_named_is_what_lies_inside_too(monkeypatch, tmp_path):
  monkeypatch.setattr(addresses, "_named", set())
  addresses.name(f"{tmp_path / 'a'}:vision")
  assert addresses.is_named(f"hf:{tmp_path / 'a' / 'hf'}?final_norm=true")
  assert not addresses.is_named(f"hf:{tmp_path / 'a' / '..' / 'b'}")
  assert not addresses.is_named(f"hf:{tmp_path / 'a'}?tower={tmp_path / 'b'}")
  assert not addresses.is_named("hf:some/tower")
  addresses.name("hf:some/tower?revision=1")
  assert addresses.is_named("hf:some/tower?revision=2")
