"""Numbers of label maps that have a gap are told, and others are not."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from pivot_jax.data.sources import json_records, label_maps
from pivot_jax.recipe import dry_run, run_folder


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
  found = label_maps.gap(labels, ignore)
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
  assert not label_maps.gap(labels, ignore)


def test_a_look_is_at_so_many_maps_from_first_to_last(tmp_path):
  for folder in ("images", "labels"):
    (tmp_path / "train" / folder).mkdir(parents=True)
  for index in range(50):
    Image.new("RGB", (3, 2)).save(tmp_path / "train/images" / f"{index:02}.png")
    labels = np.full((2, 3), index % 3, np.uint8)
    labels[0, 0] = 255 if index == 49 else 0
    name = tmp_path / "train/labels" / f"{index:02}.png"
    Image.fromarray(labels).save(name)
  source = json_records.SegmentFolder(tmp_path, "train")
  found = label_maps.look(source, -1)
  assert found.startswith("in 32 of 50 label maps: labels 0 to 2 and 255: ")
  assert not label_maps.look(source, 255)


def test_a_dry_run_tells_a_gap_unless_classes_are_counted(tmp_path):
  for folder in ("images", "labels"):
    (tmp_path / "val" / folder).mkdir(parents=True)
  Image.new("RGB", (2, 1)).save(tmp_path / "val/images/a.png")
  labels = np.array([[1, 255]], np.uint8)
  Image.fromarray(labels).save(tmp_path / "val/labels/a.png")

  def told(**fields):
    spec = dict(kind="segment", path=str(tmp_path), split="val")
    config = dict(data=(("maps", 1.0),), sources=dict(maps=spec)) | fields
    step = run_folder.Step(
      "s", "segment_probe", ConfigDict(config), {}, tmp_path
    )
    return dry_run.label_gaps(step)

  (said,) = told(num_classes=0, ignore=-1)
  assert "maps: in 1 of 1 label maps: labels 1 and 255: " in said
  assert told(num_classes=0, ignore=255) == told(num_classes=256, ignore=-1)
  assert not told(num_classes=0, ignore=255)
