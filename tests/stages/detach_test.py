"""The cut-out encoder's artifact, bit for bit."""

import json

import pytest

from pivot_jax import trees
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError
from pivot_jax.stages import detach
from pivot_jax.weights import artifacts, checkpoint
from tests.fixtures import tiny_stages
from tests.weights.convert import folders


@pytest.fixture(scope="module")
def source(init):
  return checkpoint.load(init).params


@pytest.fixture(scope="module")
def finished(init, tmp_path_factory):
  out = tmp_path_factory.mktemp("detach")
  return detach.run(None, {"init": init}, out), out


def prints(tree, *parts):
  return trees.fingerprint({part: tree[part] for part in parts})


def test_the_artifact_is_the_encoder_and_the_projector_of_the_source(
  finished, source, init
):
  _, out = finished
  cut = checkpoint.load(str(out))
  assert set(cut.params) == {"vision", "projector"}
  assert trees.fingerprint(cut.params) == prints(source, "vision", "projector")
  assert cut.vision == tiny_stages.VISION
  meta = json.loads((out / "model.json").read_text())
  assert meta["parts"] == ["projector", "vision"]
  assert meta["detached_from"] == init
  found = json.loads(artifacts.leaf_prints(out / "fingerprint.json"))
  assert {path.split("/")[0] for path in found} == {"projector", "vision"}


def test_the_report_counts_and_names_the_encoder_alone(finished, source):
  found, _ = finished
  assert found == {
    "parameters": sum(x.size for x in trees.flatten(source["vision"]).values()),
    "fingerprint": trees.digest(trees.fingerprint(source["vision"])),
  }


def test_the_portable_folder_holds_the_same_encoder(finished, source):
  _, out = finished
  configs, params, info = folders.load(out / "hf")
  assert configs["llm"] is None and configs["vision"] == tiny_stages.VISION
  assert trees.fingerprint(params) == prints(source, "vision")
  # The block behind the features, which nobody reads, and the last norm.
  names = {x["name"] for x in info["not_carried"]}
  assert all("layers.1." in name or "post_layernorm" in name for name in names)
  assert len(names) == 16 + 2


def test_the_tokenizer_goes_along(finished):
  _, out = finished
  found = load_tokenizer(out / "tokenizer")
  assert found.fingerprint == tiny_stages.TOKENIZER.fingerprint


def test_a_subtree_gives_the_encoder_without_a_projector(
  init, source, tmp_path
):
  detach.run(None, {"init": f"{init}:vision"}, tmp_path)
  cut = checkpoint.load(str(tmp_path)).params
  assert trees.fingerprint(cut) == prints(source, "vision")


def test_of_a_model_no_more_is_read_than_is_kept(init, tmp_path, monkeypatch):
  read, original = [], artifacts._restore

  def watched(path, wanted):
    read.extend(wanted)
    return original(path, wanted)

  monkeypatch.setattr(artifacts, "_restore", watched)
  detach.run(None, {"init": init}, tmp_path)
  parts = {name.partition("/")[0] for name in read}
  assert parts == {"vision", "projector"}


def test_the_vision_input_does_where_there_is_no_init(init, finished, tmp_path):
  found = detach.run(None, {"vision": init}, tmp_path)
  assert found == finished[0]


def test_a_model_without_an_encoder_is_refused(init, tmp_path):
  address = f"{init}:llm"
  with pytest.raises(InputError, match=f"{address}: holds no 'vision'"):
    detach.run(None, {"init": address}, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_the_folder_says_how_images_were_resized(tmp_path):
  params = tiny_stages.params()
  for name, number in (("bicubic", 3), ("bilinear", 2), ("crop_bicubic", 3)):
    folder = tmp_path / name
    tiny_stages.save(folder, params)
    meta = json.loads((folder / "model.json").read_text())
    meta["preprocessing"] = {"resize": "squash", "resample": name}
    artifacts.save(folder, params, meta=meta)
    detach.run(None, {"init": str(folder)}, folder / "out")
    written = folder / "out" / "hf" / "preprocessor_config.json"
    assert json.loads(written.read_text())["resample"] == number
