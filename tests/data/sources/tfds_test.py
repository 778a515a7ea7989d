import concurrent.futures
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from pivot_jax.data import images
from pivot_jax.data.sources import tfds
from pivot_jax.errors import InputError
from tests.fixtures import published_parts, published_tfds


@pytest.fixture
def imagenet(tmp_path):
  return published_tfds.make_imagenet2012(tmp_path)


def test_imagenet_is_read_as_published(imagenet):
  source = tfds.Tfds("imagenet2012", "train", imagenet.path)
  assert source.kind == "classify"
  published_parts.assert_reads(source, imagenet)
  assert source.name(4) == f"{imagenet.path}/imagenet2012/5.1.0/train:4"


def test_parts_of_splits_are_read(imagenet):
  source = tfds.Tfds("imagenet2012:5.1.0", "train[2:5]", imagenet.path)
  assert [source.text(i)["id"] for i in range(len(source))] == [
    row["id"] for row in imagenet.rows[2:5]
  ]
  validation = tfds.Tfds("imagenet2012", "validation", imagenet.path)
  assert len(validation) == len(imagenet.rows)
  assert validation.encoded(0) != source.encoded(0)


def test_the_latest_version_is_read(imagenet):
  folder = imagenet.path / "imagenet2012"
  (folder / "5.1.0").rename(folder / "5.10.0")
  for old in ("5.9.0", "5.1.0"):
    (folder / old).mkdir()
    (folder / old / "dataset_info.json").write_text("not read")
  (folder / "6.0.0").mkdir()  # Not prepared.
  source = tfds.Tfds("imagenet2012", "train", imagenet.path)
  assert source.path.name == "5.10.0"


def test_data_dir_is_where_tfds_looks(imagenet, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(imagenet.path))
  assert len(tfds.Tfds("imagenet2012", "train")) == len(imagenet.rows)


def test_grey_annotations_are_labels(tmp_path):
  made = published_tfds.make_scene_parse150(tmp_path, grey=True)
  source = tfds.Tfds("scene_parse150", "train", tmp_path)
  assert source.kind == "segment"
  for index, (row, files) in enumerate(zip(made.rows, made.files)):
    found = source[index]
    assert found["id"] == row["id"]
    assert source.encoded(index) == tuple(files)
    pixels = images.decode(files[0], name="image")
    np.testing.assert_array_equal(found["image"], pixels)
    np.testing.assert_array_equal(found["labels"], row["labels"])
    assert found["labels"].dtype == np.int32
  text = {"id": "train-1", "image": True, "labels": True}
  assert source.text(1) == text
  small = tfds.Tfds(
    "scene_parse150", "train", tmp_path, image_spec=images.ImageSpec(4)
  )[0]
  assert small["image"].shape == (4, 4, 3)
  assert small["labels"].shape == (4, 4)
  assert set(small["labels"].flat) <= set(made.rows[0]["labels"].flat)


def test_instance_annotations_are_labels_only_if_they_are_wanted(tmp_path):
  made = published_tfds.make_scene_parse150(tmp_path)
  source = tfds.Tfds("scene_parse150", "train", tmp_path)
  with pytest.raises(
    InputError,
    match="1.0.0/train:2: annotation: RGB, .* not of the 150 classes",
  ):
    source[2]
  source = tfds.Tfds("scene_parse150", "train", tmp_path, instances=True)
  for index, row in enumerate(made.rows):
    np.testing.assert_array_equal(source[index]["labels"], row["labels"])


def test_an_annotation_must_be_as_large_as_its_image(tmp_path, monkeypatch):
  published_tfds.make_scene_parse150(tmp_path, grey=True)
  # Also where both are made the same size.
  source = tfds.Tfds(
    "scene_parse150", "train", tmp_path, image_spec=images.ImageSpec(4)
  )
  height, width = images.decode(source.encoded(1)[0], name="image").shape[:2]
  small = published_parts.encode(np.zeros((height - 1, width), "uint8"), "PNG")
  record = dict(source._record(1), annotation=small)
  monkeypatch.setattr(source, "_record", lambda index: record)
  with pytest.raises(
    InputError,
    match=f"train:1: annotation: the label map is {width}x{height - 1} pixels,"
    f" its image {width}x{height}",
  ):
    source[1]


def test_other_annotations_are_refused(tmp_path):
  published_tfds.make_scene_parse150(tmp_path, grey=True)
  source = tfds.Tfds("scene_parse150", "train", tmp_path, instances=True)
  with pytest.raises(InputError, match="annotation: grey, but instances=True"):
    source[0]
  deep = np.zeros((3, 4), np.uint16)
  for data in (published_parts.encode(deep, "PNG"), b"GIF89a"):
    with pytest.raises(
      InputError, match="annotation: must be a grey or RGB PNG"
    ):
      source._labels(data)


def test_threads_and_processes_read_any_rows(imagenet):
  source = tfds.Tfds("imagenet2012", "train", imagenet.path)
  order = np.random.default_rng(0).permutation(np.arange(7).repeat(20)).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(source.encoded, order))
  assert found == [tuple(imagenet.files[i]) for i in order]
  copy = pickle.loads(pickle.dumps(source))
  assert copy.text(3) == source.text(3)
  for index in (-1, 7):
    for read in (source.__getitem__, source.text, source.encoded, source.name):
      with pytest.raises(IndexError):
        read(index)


def test_tensorflow_is_not_imported(imagenet):
  script = f"""
import sys
from pivot_jax.data.sources import tfds
source = tfds.Tfds("imagenet2012", "train", {str(imagenet.path)!r})
assert source[6]["image"].ndim == 3
assert "tensorflow" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", script], check=True)


def test_a_row_without_label_is_refused(tmp_path):
  made = published_tfds.make_imagenet2012(tmp_path, label=-1)
  source = tfds.Tfds("imagenet2012", "train", made.path)
  with pytest.raises(
    InputError, match="train:1: label: is -1; this split has no"
  ):
    source[1]


def test_a_set_that_is_not_there_is_refused(imagenet, tmp_path):
  for name in ("imagenet2012:4.0.0", "scene_parse150"):
    place = name.replace(":", "/")
    with pytest.raises(
      InputError, match=f"{place}: no prepared set .* tfds bui"
    ):
      tfds.Tfds(name, "train", imagenet.path)
  with pytest.raises(InputError, match="split 'val': Unknown split 'val'"):
    tfds.Tfds("imagenet2012", "val", imagenet.path)


def test_a_set_in_part_or_in_another_format_is_refused(imagenet):
  folder = imagenet.path / "imagenet2012" / "5.1.0"
  (folder / "imagenet2012-train.array_record-00001-of-00003").unlink()
  with pytest.raises(
    InputError, match="1 shards of train are missing, .*00001"
  ):
    tfds.Tfds("imagenet2012", "train", imagenet.path)
  info = folder / "dataset_info.json"
  text = info.read_text()
  info.write_text(text.replace('"array_record"', '"tfrecord"'))
  with pytest.raises(
    InputError, match="is in the format tfrecord, which cannot"
  ):
    tfds.Tfds("imagenet2012", "train", imagenet.path)
  info.write_text("{")
  with pytest.raises(
    InputError, match="dataset_info.json: .*JSON|5.1.0: cannot be opened: "
  ):
    tfds.Tfds("imagenet2012", "train", imagenet.path)
  info.write_text(text)
  (folder / "features.json").unlink()
  with pytest.raises(
    InputError, match="dataset_info.json: .*JSON|5.1.0: cannot be opened: "
  ):
    tfds.Tfds("imagenet2012", "train", imagenet.path)


def test_a_set_of_other_features_is_refused(imagenet):
  features = imagenet.path / "imagenet2012" / "5.1.0" / "features.json"
  features.write_text(features.read_text().replace('"label"', '"word"'))
  with pytest.raises(
    InputError, match="has the features file_name, image, word"
  ):
    tfds.Tfds("imagenet2012", "train", imagenet.path)


def test_a_damaged_record_is_named(imagenet):
  folder = imagenet.path / "imagenet2012" / "5.1.0"
  shard = folder / "imagenet2012-train.array_record-00001-of-00003"
  data = bytearray(shard.read_bytes())
  at = data.index(b"\xff\xd8\xff")
  data[at : at + 4] = bytes(4)
  shard.write_bytes(data)
  source = tfds.Tfds("imagenet2012", "train", imagenet.path)
  with pytest.raises(InputError, match="train:3: cannot be read: .*hash"):
    source.text(3)
  assert source.text(4)["id"] == imagenet.rows[4]["id"]


def test_a_missing_package_is_named_with_its_command(imagenet, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(InputError, match=r'pip install "pivot_jax\[tfds\]"'):
    tfds.Tfds("imagenet2012", "train", imagenet.path)


def _told(made, change):
  path = made.path / "imagenet2012" / "5.1.0" / "dataset_info.json"
  told = json.loads(path.read_text("utf-8"))
  change(told)
  path.write_text(json.dumps(told), encoding="utf-8")


def test_shards_hold_what_the_set_says(imagenet):
  def shorten(told):
    for split in told["splits"]:
      split["shardLengths"][1] = "1"

  _told(imagenet, shorten)
  for split in ("train", "train[1:4]"):
    with pytest.raises(InputError, match=r"00001-of.*records.*says 1: "):
      tfds.Tfds("imagenet2012", split, imagenet.path)


def test_a_set_of_other_types_is_named(imagenet):
  _told(imagenet, lambda told: told.update(splits=[{"name": {}}]))
  with pytest.raises(InputError, match="5.1.0: cannot be opened"):
    tfds.Tfds("imagenet2012", "train", imagenet.path)


def test_a_record_without_its_picture_is_named(imagenet):
  source = tfds.Tfds("imagenet2012", "train", imagenet.path)
  record = source._records[2] | {"image": None}
  source._records = {2: record}
  source.name = lambda index: f"train:{index}"
  with pytest.raises(InputError, match="train:2.*image: is empty"):
    source.text(2)
