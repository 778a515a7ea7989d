"""Inputs of a stage are told apart by what decides, and by nothing else."""

import json
import os
import pathlib
import shutil

import ml_collections
import pytest

from pivot_jax import addresses, files
from pivot_jax.data import opener
from pivot_jax.data.sources import mixtures
from pivot_jax.errors import InputError
from pivot_jax.recipe import run_folder
from pivot_jax.recipe.inputs import Inputs, Step
from tests.fixtures import published

TOKENIZER = pathlib.Path(addresses.parse("package:toy").path) / "tokenizer"


def marks(tmp_path, *, rules=2, kind="train", inputs=None, **fields):
  config = ml_collections.ConfigDict(fields)
  step = Step("a", kind, config, inputs or {}, tmp_path / "a")
  return Inputs().of(step, rules=rules)


@pytest.mark.parametrize(
  "one, other",
  [
    ("hf:{}", "hf:{}?feature_layer=-3"),
    ("hf:{}?feature_layer=-3", "hf:{}?feature_layer=-2"),
    ("hf:{}?image_size=8&positions=dinov2", "hf:{}?tokens=4"),
    ("{}:vision", "{}:llm"),
  ],
)
def test_choices_of_an_address_count(tmp_path, one, other):
  (tmp_path / "model.safetensors").write_bytes(b"weights")

  def of(address, rules):
    found = {"vision": address.format(tmp_path)}
    return marks(tmp_path, inputs=found, rules=rules)

  assert of(one, 2) == of(one, 2) != of(other, 2)
  # A record of an earlier version did not tell them apart.
  assert of(one, 1) == of(other, 1)


def test_the_rules_of_a_trainings_tokenizer_count(tmp_path):
  folder = pathlib.Path(shutil.copytree(TOKENIZER, tmp_path / "tokenizer"))
  before = marks(tmp_path, tokenizer=str(folder))
  path = folder / "tokenizer.json"
  rules = json.loads(path.read_text("utf-8"))
  rules["model"]["merges"] = rules["model"]["merges"][:-6]
  path.write_text(json.dumps(rules), encoding="utf-8")
  assert marks(tmp_path, tokenizer=str(folder)) != before
  # Another stage takes it from the model that it reads.
  assert marks(tmp_path, tokenizer=str(folder), kind="evaluate") == {}


def test_weights_count_to_their_middle(tmp_path):
  path = tmp_path / "weights" / "model.safetensors"
  path.parent.mkdir()
  path.write_bytes(bytes(17 * 2**20))
  given = {"init": f"hf:{path.parent}"}
  before = marks(tmp_path, inputs=given)
  with path.open("r+b") as file:
    file.seek(8 * 2**20)
    file.write(b"tuned")
  assert marks(tmp_path, inputs=given) != before


@pytest.mark.parametrize("make", ["make_onevision_mixture", "make_mmpr"])
def test_files_that_a_list_names_count_by_content(tmp_path, make):
  made = getattr(published, make)(tmp_path / "data")
  spec = dict(kind="preference" if make == "make_mmpr" else "llava")
  spec |= dict(path=str(made.path), image_root="")

  def of():
    return marks(tmp_path, sources={"rows": spec})

  before = of()
  listed = [
    x for x in made.path.parent.rglob("*.json*") if x.name != made.path.name
  ]
  for path in listed:
    os.utime(path, (1, 1))
  assert of() == before
  for path in listed:
    text = path.read_text("utf-8")
    path.write_text(text.replace(" the ", " any "), encoding="utf-8")
  assert of()["rows.rows"] != before["rows.rows"]


def test_a_list_that_ships_counts_by_its_content(tmp_path, monkeypatch):
  made = published.make_onevision_mixture(tmp_path / "data")
  monkeypatch.setattr(files, "input_path", lambda _: made.path)
  spec = dict(kind="llava", path="package:configs/data/some.yaml")
  spec |= dict(root=str(made.path.parent), image_root="")
  before = marks(tmp_path, sources={"rows": spec})
  text = made.path.read_text("utf-8")
  made.path.write_text(text.replace("first:2", "first:3"), encoding="utf-8")
  after = marks(tmp_path, sources={"rows": spec})
  assert after["rows.rows"] == before["rows.rows"]
  assert after["rows.path"] != before["rows.path"]


def result(folder, **model):
  folder.mkdir(exist_ok=True)
  meta = {"llm": {"heads": 4}, "versions": {"jax": "1"}, "unread": None} | model
  files.write_json(folder / "model.json", meta)
  (folder / "fingerprint.json").write_text("{}")
  return folder


def finish(folder, kind="train", **outputs):
  outputs = {"fingerprint.json": "1"} | outputs
  done = {"kind": kind, "outputs": outputs, "metrics": {}}
  files.write_json(folder / "done.json", done)


def test_a_result_counts_by_what_its_readers_compute_with(tmp_path):
  folder = result(tmp_path / "stage", sources={"init": "here"})
  finish(folder, **{"speed.jsonl": "1", "model.json": "1"})
  given = {"init": str(folder)}
  before = marks(tmp_path, inputs=given)
  # Made again elsewhere, with the same numbers.
  result(folder, sources={"init": "there"}, versions={"jax": "2"})
  finish(folder, **{"speed.jsonl": "2", "model.json": "2"})
  assert marks(tmp_path, inputs=given) == before
  result(folder, llm={"heads": 2})
  assert marks(tmp_path, inputs=given) != before
  result(folder)
  (folder / "fingerprint.json").write_text('{"llm/head": "00000000"}')
  assert marks(tmp_path, inputs=given) != before


def test_a_result_of_the_users_own_kind_counts_whole(tmp_path):
  folder = tmp_path / "stage"
  folder.mkdir()
  given = {"init": str(folder)}
  files.write_json(folder / "model.json", {"unread": "a text"})
  finish(folder, "mine.py:run", **{"speed.jsonl": "1"})
  before = marks(tmp_path, inputs=given)
  finish(folder, "mine.py:run", **{"speed.jsonl": "2"})
  assert marks(tmp_path, inputs=given) != before


def test_weights_count_by_the_files_that_are_read(tmp_path):
  folder = tmp_path / "weights"
  (folder / ".cache").mkdir(parents=True)
  (folder / "model.safetensors").write_bytes(b"1")
  given = {"init": f"hf:{folder}"}
  before = marks(tmp_path, inputs=given)
  for name in (".cache/model.json", "README.md", "pytorch_model.bin"):
    (folder / name).write_text("new")
  assert marks(tmp_path, inputs=given) == before
  # A kind of the user's own may read any.
  own = marks(tmp_path, inputs=given, kind="mine.py:run")
  (folder / "README.md").write_text("newer")
  assert marks(tmp_path, inputs=given, kind="mine.py:run") != own


def test_the_part_that_an_input_is_called_by_is_no_choice(tmp_path):
  (tmp_path / "model.safetensors").write_bytes(b"1")
  one, other = (
    marks(tmp_path, inputs={"vision": f"hf:{tmp_path}{part}"})
    for part in ("", ":vision")
  )
  assert one == other


@pytest.mark.parametrize("field", [{"max_bad": 0.9}, {"bad": "bad.jsonl"}])
def test_a_list_of_files_with_rows_to_skip_is_told_apart(tmp_path, field):
  made = published.make_onevision_mixture(tmp_path)
  path = made.path.parent / "llava_next_738k.json"
  lines = json.loads(path.read_text("utf-8"))
  lines[1] = "no record"
  path.write_text(json.dumps(lines), encoding="utf-8")
  if "bad" in field:
    field = {"bad": str(tmp_path / "bad.jsonl")}
    (tmp_path / "bad.jsonl").write_text("")
  spec = dict(kind="llava", path=str(made.path), image_root="") | field
  assert marks(tmp_path, sources={"rows": spec})["rows.rows"]


def test_shards_behind_a_pattern_count_by_their_ends(tmp_path, monkeypatch):
  made = published.make_onevision(tmp_path)
  monkeypatch.setattr("pivot_jax.recipe.inputs._SHARD", 8)
  read = []
  monkeypatch.setattr(
    "pivot_jax.recipe.inputs.hashlib.file_digest", lambda *x: read.append(x)
  )
  monkeypatch.setattr("pivot_jax.recipe.inputs._END", 4)
  spec = dict(kind="llava", path=f"{made.path}/train-*.parquet")
  assert marks(tmp_path, sources={"rows": spec})["rows.rows"]
  assert not read


def test_an_artifact_counts_by_its_configs_too(tmp_path):
  folder = result(tmp_path / "artifact")
  before = marks(tmp_path, inputs={"init": str(folder)})
  result(folder, llm={"heads": 2})
  assert marks(tmp_path, inputs={"init": str(folder)}) != before


def test_a_record_is_compared_by_the_rules_that_it_was_made_by(tmp_path):
  weights = tmp_path / "weights"
  weights.mkdir()
  (weights / "model.safetensors").write_bytes(b"1")
  config = ml_collections.ConfigDict({"tokenizer": "package:toy"})
  step = Step("a", "train", config, {"init": f"hf:{weights}"}, tmp_path / "a")
  inputs = Inputs()
  run_folder.begin(step, inputs)
  run_folder.finish(step, inputs, {}, 1.0)
  path = step.folder / "done.json"
  done = files.read_object(path)
  assert done["rules"] == 2
  for name in ("rules", "inputs"):
    del done[name]
  done["inputs"] = inputs.of(step, rules=1)
  assert done["inputs"].keys() == {"init"}
  files.write_json(path, done)
  assert run_folder.change(step, Inputs()) == ""
  (weights / "model.safetensors").write_bytes(b"2")
  assert run_folder.change(step, Inputs()) == "other init"
  files.write_json(path, done | {"rules": 3})
  with pytest.raises(InputError, match="recorded by a later version"):
    run_folder.change(step, Inputs())


def test_files_count_by_content_and_images_of_a_folder_by_size(tmp_path):
  rows, folder = tmp_path / "rows.jsonl", tmp_path / "images"
  folder.mkdir()

  def hashes():
    source = {"path": str(rows), "image_root": str(folder)}
    config = ml_collections.ConfigDict({"sources": {"rows": source}})
    step = Step("a", "detach", config, {}, tmp_path / "a")
    return Inputs().of(step)

  rows.write_text("1")
  (folder / "a.PNG").write_text("12")
  before = hashes()
  assert before.keys() == {"rows.path", "rows.image_root"}
  rows.touch()
  assert hashes() == before
  rows.write_text("2")
  assert hashes()["rows.path"] != before["rows.path"]
  (folder / "a.PNG").write_text("123")
  assert hashes()["rows.image_root"] != before["rows.image_root"]


def test_other_weights_at_a_hugging_face_address_are_other_inputs(tmp_path):
  weights = tmp_path / "model.safetensors"
  address = {"vision": f"hf:{tmp_path}"}
  config = ml_collections.ConfigDict({})
  step = Step("a", "train", config, address, tmp_path / "a")
  weights.write_bytes(b"1")
  before = Inputs().of(step)
  weights.write_bytes(b"2")
  assert Inputs().of(step) != before


def test_files_that_a_mixture_lists_count_too(tmp_path):
  made = published.make_onevision_mixture(tmp_path)
  source = {"kind": "llava", "path": str(made.path), "image_root": ""}
  config = ml_collections.ConfigDict({"sources": {"rows": source}})
  step = Step("a", "train", config, {}, tmp_path / "a")
  before = Inputs().of(step)
  assert Inputs().of(step) == before
  path = made.path.parent / "llava_next_738k.json"
  path.write_text(path.read_text().replace("the", "that"))
  after = Inputs().of(step)
  assert after["rows.path"] == before["rows.path"]
  assert after["rows.rows"] != before["rows.rows"]


def test_a_mixture_is_opened_once_in_a_run_for_its_stamp(tmp_path, monkeypatch):
  made = published.make_onevision_mixture(tmp_path)
  opened = []

  def count(*given, **more):
    opened.append(given)
    return mixtures.Mixture(*given, **more)

  monkeypatch.setitem(opener.KINDS, "mixture", count)
  inputs, found = Inputs(), []
  for stage, seed in (("a", 0), ("b", 0), ("c", 1)):
    source = {"kind": "mixture", "path": str(made.path), "seed": seed}
    config = ml_collections.ConfigDict({"sources": {"rows": source}})
    step = Step(stage, "train", config, {}, tmp_path / stage)
    found += [inputs.of(step)["rows.rows"] for _ in range(2)]
  assert len(opened) == 2
  assert len(set(found)) == 1  # No entry of the mixture draws rows.
