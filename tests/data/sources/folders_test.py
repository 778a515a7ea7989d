"""Folders of images and label maps, and gaps in the numbers of the maps."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from pivot_jax.data import images, rows
from pivot_jax.data.sources import folders
from pivot_jax.errors import InputError
from pivot_jax.recipe import preflight
from pivot_jax.recipe.inputs import Step
from tests import unpack_cifar10


def _image(path, *, level: int = 0, size=(6, 4)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", size, (level,) * 3).save(path)


@pytest.fixture
def classes(tmp_path):
  for split, count in (("train", 2), ("val", 1)):
    for level, name in enumerate(("zebra", "ant")):
      for index in range(count):
        _image(tmp_path / split / name / f"{index}.png", level=100 * level)
  return tmp_path


def test_an_image_folder_numbers_its_classes_by_name(classes):
  (classes / "train" / ".hidden").write_bytes(b"")
  (classes / "train" / "ant" / ".hidden").write_bytes(b"")
  source = folders.ImageFolder(classes, "train", image_spec=images.ImageSpec(3))
  assert source.classes == ("ant", "zebra")
  assert [source[i]["label"] for i in range(len(source))] == [0, 0, 1, 1]
  row = source[3]
  assert row["id"] == "zebra/1.png"
  assert row["image"].shape == (3, 3, 3) and row["image"].max() == 0
  assert source[0]["image"].min() == 100
  val = folders.ImageFolder(classes, "val")
  assert [val[i]["id"] for i in range(2)] == ["ant/0.png", "zebra/0.png"]
  assert val.name(1).endswith("val#1")
  assert rows.unreadable(val) == []


def test_an_image_folder_that_is_not_one_is_refused(classes):
  with pytest.raises(InputError, match="test: no such folder"):
    folders.ImageFolder(classes, "test")
  _image(classes / "val" / "bee" / "0.png")
  with pytest.raises(InputError, match="differ from train's: .'bee'."):
    folders.ImageFolder(classes, "val")
  (classes / "train" / "ant" / "notes.txt").write_text("x")
  with pytest.raises(InputError, match="ant: notes.txt is not an image"):
    folders.ImageFolder(classes, "train")


def test_a_bad_file_of_an_image_folder_is_named(classes, tmp_path):
  (classes / "val" / "ant" / "0.png").write_bytes(b"")
  source = folders.ImageFolder(classes, "val")
  with pytest.raises(InputError, match="val#0: .*ant/0.png: .* is empty"):
    source[0]
  outside = tmp_path / "outside.png"
  _image(outside)
  (classes / "val" / "ant" / "0.png").unlink()
  (classes / "val" / "ant" / "0.png").symlink_to(outside)
  with pytest.raises(InputError, match="escapes the image root by a link"):
    source[0]


@pytest.fixture
def streets(tmp_path):
  for name in ("b", "a"):
    _image(tmp_path / "train" / "images" / f"{name}.jpg", level=50)
    (tmp_path / "train" / "labels").mkdir(exist_ok=True)
    labels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(labels).save(tmp_path / "train" / "labels" / f"{name}.png")
  return tmp_path


def test_a_segment_folder_pairs_images_and_labels_by_name(streets):
  source = folders.SegmentFolder(streets, "train")
  assert [source[i]["id"] for i in range(2)] == ["a", "b"]
  row = source[0]
  assert row["image"].shape == (4, 6, 3)
  assert row["labels"].dtype == np.int32
  np.testing.assert_array_equal(row["labels"], np.arange(24).reshape(4, 6))
  small = folders.SegmentFolder(
    streets, "train", image_spec=images.ImageSpec(2)
  )[1]
  assert small["image"].shape == (2, 2, 3)
  assert small["labels"].shape == (2, 2)
  assert set(small["labels"].flat) <= set(range(24))


def test_a_segment_folder_that_is_not_one_is_refused(streets):
  labels = streets / "train" / "labels"
  _image(labels / "a.png", size=(5, 4))
  source = folders.SegmentFolder(streets, "train")
  with pytest.raises(InputError, match="train#0: .*a.png: .* not mode RGB"):
    source[0]
  Image.new("L", (5, 4)).save(labels / "a.png")
  with pytest.raises(InputError, match="a.png: the label map is 5x4 .* 6x4"):
    source[0]
  _image(streets / "train" / "images" / "a.png")
  with pytest.raises(InputError, match="a.(png|jpg) and a.(png|jpg) have one"):
    folders.SegmentFolder(streets, "train")
  (streets / "train" / "images" / "a.png").unlink()
  (labels / "a.png").unlink()
  with pytest.raises(InputError, match="1 names are not in both .*: a"):
    folders.SegmentFolder(streets, "train")


def test_the_real_streets_have_twelve_labels(test_data):
  source = folders.SegmentFolder(test_data / "camvid", "val")
  found = [source[i]["labels"] for i in range(0, len(source), 8)]
  assert set(np.unique(found)) <= set(range(12))
  assert source[0]["image"].shape == (*found[0].shape, 3)


def test_the_real_photos_unpack_into_an_image_folder(test_data, tmp_path):
  archive = test_data / "cifar10" / "cifar10_jpeg_4k_1k.npz"
  unpack_cifar10.unpack(archive, tmp_path)
  train = folders.ImageFolder(tmp_path, "train")
  val = folders.ImageFolder(tmp_path, "val")
  assert (len(train), len(val), len(train.classes)) == (4000, 1000, 10)
  assert train[0]["image"].shape == (32, 32, 3)
  with np.load(archive, allow_pickle=False) as arrays:
    last, classes = int(arrays["test_labels"][-1]), arrays["classes"]
  name = f"{classes[last]}/00999.jpg"
  labels = {val[i]["id"]: val[i]["label"] for i in range(len(val))}
  assert train.classes[labels[name]] == classes[last]


COMPOSED, PARTS = "\u00c5se", "A\u030ase"


def test_class_folders_are_one_however_their_letters_are_composed(tmp_path):
  # By bytes PARTS comes before "Bo" and COMPOSED after it.
  for split, name in (("train", PARTS), ("val", COMPOSED)):
    _image(tmp_path / split / name / "0.png")
    _image(tmp_path / split / "Bo" / "0.png")
  found = {}
  for split in ("train", "val"):
    source = folders.ImageFolder(tmp_path, split)
    assert source.classes == ("Bo", COMPOSED)
    found[split] = {source[i]["id"]: source[i]["label"] for i in range(2)}
  assert found["train"] == {"Bo/0.png": 0, f"{PARTS}/0.png": 1}
  assert found["val"] == {"Bo/0.png": 0, f"{COMPOSED}/0.png": 1}
  _image(tmp_path / "train" / COMPOSED / "0.png")
  with pytest.raises(InputError, match="have one name"):
    folders.ImageFolder(tmp_path, "train")


def test_label_maps_are_matched_however_their_names_are_composed(tmp_path):
  folder = tmp_path / "train"
  _image(folder / "images" / f"{PARTS}.png")
  (folder / "labels").mkdir()
  Image.new("L", (6, 4), 2).save(folder / "labels" / f"{COMPOSED}.png")
  source = folders.SegmentFolder(tmp_path, "train")
  assert source[0]["id"] == COMPOSED and (source[0]["labels"] == 2).all()


def test_a_single_class_is_refused_with_the_layout(tmp_path):
  for split in ("train", "val"):
    _image(tmp_path / split / "photos" / "0.png")
  for split in ("train", "val"):
    with pytest.raises(InputError, match="train: .*'photos'.*CLASS/"):
      folders.ImageFolder(tmp_path, split)


@pytest.mark.parametrize("labels, ignore, said", [
  ([0, 1, 2, 255], -1, "labels 0 to 2 and 255: is 255 "),
  ([0, 1, 255], "none", "labels 0 to 1 and 255: is 255 "),
  ([0, 65535], -1, "labels 0 and 65535: is 65535 "),
  ([*range(200), 255], -1, "labels 0 to 199 and 255: is 255 "),
  ([0, 1, 254, 255], 255, "labels 0 to 1 and 254: is 254 "),
  ([0, 1, 254, 255], -1, "labels 0 to 1 and 254 to 255: number "),
  ([3, 4, 40], -1, "labels 3 to 4 and 40: is 40 "),
])  # fmt: skip
def test_a_gap_is_named_with_the_labels_on_its_sides(labels, ignore, said):
  found = folders.label_gap(labels, ignore)
  assert found.startswith(said)
  if " is " in said:
    mark = said.split(" is ")[1].strip()
    assert f"--config.files.segment_ignore={mark}" in found


@pytest.mark.parametrize("labels, ignore", [
  ([], -1),
  ([7], -1),
  ([0, 1, 2, 255], 255),
  (range(256), -1),
  ([0, 2, 3, 9], -1),
  # A few maps of 150 classes hold some of them.
  ([*range(0, 60, 2), 75, 100, 120, 149], -1),
])  # fmt: skip
def test_no_gap_is_told_of_what_may_be_classes(labels, ignore):
  assert not folders.label_gap(labels, ignore)


def test_a_look_is_at_so_many_maps_from_first_to_last(tmp_path):
  for folder in ("images", "labels"):
    (tmp_path / "train" / folder).mkdir(parents=True)
  for index in range(50):
    Image.new("RGB", (3, 2)).save(tmp_path / "train/images" / f"{index:02}.png")
    labels = np.full((2, 3), index % 3, np.uint8)
    labels[0, 0] = 255 if index == 49 else 0
    name = tmp_path / "train/labels" / f"{index:02}.png"
    Image.fromarray(labels).save(name)
  source = folders.SegmentFolder(tmp_path, "train")
  found = folders.sampled_label_gap(source, -1)
  assert found.startswith("in 32 of 50 label maps: labels 0 to 2 and 255: ")
  assert not folders.sampled_label_gap(source, 255)


def test_a_dry_run_tells_a_gap_unless_classes_are_counted(
  tmp_path, monkeypatch
):
  for folder in ("images", "labels"):
    (tmp_path / "val" / folder).mkdir(parents=True)
  Image.new("RGB", (2, 1)).save(tmp_path / "val/images/a.png")
  labels = np.array([[1, 255]], np.uint8)
  Image.fromarray(labels).save(tmp_path / "val/labels/a.png")

  looks, look = [], folders.sampled_label_gap

  def watched(source, ignore):
    looks.append(ignore)
    return look(source, ignore)

  monkeypatch.setattr(folders, "sampled_label_gap", watched)

  def told(**fields):
    spec = dict(kind="segment", path=str(tmp_path), split="val")
    config = dict(data=(("maps", 1.0),), sources=dict(maps=spec)) | fields
    step = Step("s", "segment_probe", ConfigDict(config), {}, tmp_path)
    return preflight.label_gaps(step)

  (said,) = told(num_classes=0, ignore=-1)
  assert "maps: in 1 of 1 label maps: labels 1 and 255: " in said
  assert told(num_classes=0, ignore=255) == told(num_classes=256, ignore=-1)
  assert not told(num_classes=0, ignore=255)
  # Once for each way of reading, however many stages read so.
  assert told(num_classes=0, ignore=-1) == [said]
  assert looks == [-1, 255]
