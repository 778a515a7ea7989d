"""The copies have the layout of what they copy; readers' tests read them."""

import json

import pytest
import yaml
from pyarrow import parquet

from pivot_jax.data.sources import folders, json_records
from tests.fixtures import (
  published,
  published_evaluations,
  published_parts,
  published_tfds,
)


def test_pretraining_captions_are_one_list_with_numbered_folders(tmp_path):
  made = published.make_llava_pretrain(tmp_path, rows=5)
  assert made.path.name == "blip_laion_cc_sbu_558k.json"
  first = json.loads(made.path.read_text())[0]
  assert list(first) == ["id", "image", "conversations"]
  assert first["image"] == "00000/000000000.jpg"
  published_parts.assert_reads(
    json_records.LlavaJson(made.path, made.root), made
  )


def test_parquet_sets_have_shards_of_row_groups_and_the_published_columns(
  tmp_path,
):
  made = published.make_onevision(tmp_path, rows=12, shards=2)
  names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
  assert sorted(path.name for path in made.path.iterdir()) == names
  file = parquet.ParquetFile(made.path / names[0])
  assert file.num_row_groups == 2
  assert [f"{field.name}: {field.type}" for field in file.schema_arrow] == [
    "id: string",
    "image: struct<bytes: binary, path: string>",
    "conversations: list<element: struct<from: string, value: string>>",
    "data_source: string",
  ]
  told = json.loads(file.schema_arrow.metadata[b"huggingface"])
  assert told["info"]["features"]["image"] == {"_type": "Image"}
  assert [len(files) for files in made.files[:6]] == [1, 1, 1, 1, 0, 1]
  made = published.make_llava_next(tmp_path, rows=3)
  columns = parquet.read_schema(next(made.path.iterdir())).names
  assert columns == ["id", "conversations", "data_source", "image"]


@pytest.mark.parametrize("name, split, columns", [
  ("MME", "test", {"question_id", "question", "answer", "category", "image"}),
  ("MMBench_EN", "dev", {"index", "hint", "A", "D", "l2-category", "image"}),
  ("ScienceQA", "test", {"question", "choices", "answer", "hint", "image"}),
  ("textvqa", "validation", {"question_id", "answers", "ocr_tokens", "image"}),
  ("VQAv2", "validation", {"question_id", "answers", "image_id", "image"}),
  ("DocVQA", "validation", {"questionId", "answers", "docId", "image"}),
  ("SEED-Bench", "test", {"question_id", "choice_a", "answer", "image"}),
  ("MMMU", "validation", {"id", "options", "answer", "image_1", "image_7"}),
])  # fmt: skip
def test_evaluations_have_the_published_columns(tmp_path, name, split, columns):
  made = published.make_evaluation(tmp_path, name=name)
  (file,) = made.path.iterdir()
  assert file.name == f"{split}-00000-of-00001.parquet"
  assert made.path.parent.name == name
  schema = parquet.read_schema(file)
  assert columns <= set(schema.names)
  assert set(made.rows[0]["columns"]) <= set(schema.names)


def test_all_evaluations_are_looked_at():
  assert len(published_evaluations.EVALUATIONS) == 8


def test_mmpr_is_a_meta_file_with_lines_and_images_a_source(tmp_path):
  made = published.make_mmpr(tmp_path, rows=3)
  meta = json.loads(made.path.read_text())
  assert len(meta) == 2
  rows, files = [], []
  for entry in meta.values():
    assert entry["length"] == 3
    source = json_records.JsonLines(
      made.root / entry["annotation"], made.root / entry["root"]
    )
    for index in range(len(source)):
      row = source.text(index)
      rows.append({key: row[key] for key in ("question", "chosen", "rejected")})
      files.append([*source.encoded(index)])
  assert (rows, files) == (made.rows, made.files)


def test_a_mixture_names_files_and_strategies(tmp_path):
  made = published.make_onevision_mixture(tmp_path, rows=4)
  entries = yaml.safe_load(made.path.read_text())["datasets"]
  assert [entry["sampling_strategy"] for entry in entries] == [
    "all", "first:30%", "first:2"
  ]  # fmt: skip
  rows, files = [], []
  for entry in entries:
    source = json_records.LlavaJson(entry["json_path"], made.root)
    for index in range(len(source)):
      row = source.text(index)
      rows.append({key: row[key] for key in ("id", "conversations")})
      files.append([*source.encoded(index)])
  assert (rows, files) == (made.rows, made.files)


def test_an_image_folder_has_a_folder_a_class(tmp_path):
  made = published.make_image_folder(tmp_path, rows=2)
  published_parts.assert_reads(folders.ImageFolder(made.path, "train"), made)
  val = folders.ImageFolder(made.path, "val")
  assert [val[i]["label"] for i in range(len(val))] == [0, 1, 2]


def test_tfds_sets_have_what_its_own_builder_leaves(tmp_path):
  published_tfds.make_imagenet2012(tmp_path, rows=7)
  published_tfds.make_scene_parse150(tmp_path, rows=2)
  names = {path.name for path in (tmp_path / "imagenet2012/5.1.0").iterdir()}
  shards = {
    f"imagenet2012-{split}.array_record-0000{k}-of-00003"
    for split in ("train", "validation")
    for k in range(3)
  }
  assert names - {"label.labels.txt"} == {
    "dataset_info.json", "features.json", *shards
  }  # fmt: skip
  folder = tmp_path / "scene_parse150/1.0.0"
  told = json.loads((folder / "dataset_info.json").read_text())
  assert told["fileFormat"] == "array_record"
  assert [split["name"] for split in told["splits"]] == ["test", "train"]


def test_a_seed_makes_the_same_set_and_another_one_another(tmp_path):
  first, again, other = (
    published.make_mmpr(tmp_path / name, seed=seed)
    for name, seed in (("a", 0), ("b", 0), ("c", 1))
  )
  assert (first.rows, first.files) == (again.rows, again.files)
  assert first.rows != other.rows and first.files != other.files
