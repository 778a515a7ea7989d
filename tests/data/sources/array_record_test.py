import concurrent.futures
import json
import os
import pickle

import msgpack
import numpy as np
import pytest
from array_record.python import array_record_module

from pivot_jax.data import images
from pivot_jax.data.sources import array_record, folders, json_records
from pivot_jax.errors import InputError
from tests.fixtures import published, published_parts


def _write(source, folder, **changes):
  given = {"kind": "conversation", "shards": 2, "origin": "here"} | changes
  return array_record.write(source, folder, **given)


@pytest.fixture
def captions(tmp_path):
  made = published.make_llava_pretrain(tmp_path, rows=8)
  return made, json_records.LlavaJson(made.path, made.root)


@pytest.fixture
def folder(captions, tmp_path):
  _write(captions[1], tmp_path / "set", shards=3)
  return tmp_path / "set"


def test_conversations_come_back_as_they_were(captions, folder):
  source = array_record.ArrayRecord(folder)
  assert source.kind == "conversation"
  published_parts.assert_reads(source, captions[0])
  assert [source.name(i).rpartition("/")[2] for i in (0, 2, 7)] == [
    "rows-00000-of-00003.array_record:0",
    "rows-00000-of-00003.array_record:2",
    "rows-00002-of-00003.array_record:1",
  ]


def test_text_rows_and_several_images_come_back(tmp_path):
  for index in range(3):
    image = published_parts.picture(np.random.default_rng(index), "PNG")
    (tmp_path / f"{index}.png").write_bytes(image)
  pair = {"question": "q", "chosen": "a", "rejected": "b \u20ac"}
  given = [None, "0.png", ["1.png", "2.png", "0.png"]]
  lines = [json.dumps({"image": image, **pair}) for image in given]
  (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
  source = json_records.JsonLines(
    tmp_path / "a.jsonl", image_spec=images.ImageSpec(4)
  )
  _write(source, tmp_path / "set", kind="preference", shards=9)
  found = array_record.ArrayRecord(
    tmp_path / "set", image_spec=images.ImageSpec(4)
  )
  for index in range(3):
    row, expected = found[index], source[index]
    np.testing.assert_equal(row.pop("image"), expected.pop("image"))
    assert row == expected
    assert found.encoded(index) == source.encoded(index)
  assert [found.text(i)["image"] for i in range(3)] == [None, True, [True] * 3]
  assert len(list((tmp_path / "set").glob("rows-*"))) == 3  # One a row at most.


def test_texts_are_read_without_the_images(captions, folder):
  source = array_record.ArrayRecord(folder)
  for file in folder.glob("rows-*"):
    file.write_bytes(bytes(file.stat().st_size))
  for index, row in enumerate(captions[0].rows):
    assert source.text(index) == {**row, "image": True}
  with pytest.raises(
    InputError, match="rows-00000-of-00003.array_record:0: the"
  ):
    source.encoded(0)


def test_labels_of_both_kinds_come_back(tmp_path, test_data):
  made = published.make_image_folder(tmp_path)
  _write(
    folders.ImageFolder(made.path, "train"),
    tmp_path / "a",
    kind="classify",
  )
  published_parts.assert_reads(array_record.ArrayRecord(tmp_path / "a"), made)
  streets = folders.SegmentFolder(
    test_data / "camvid", "val", image_spec=images.ImageSpec(16)
  )
  _write(streets, tmp_path / "b", kind="segment")
  found = array_record.ArrayRecord(
    tmp_path / "b", image_spec=images.ImageSpec(16)
  )
  assert len(found) == len(streets) > 0
  for index in (0, len(found) - 1):
    row, expected = found[index], streets[index]
    assert row["id"] == expected["id"]
    np.testing.assert_array_equal(row["image"], expected["image"])
    np.testing.assert_array_equal(row["labels"], expected["labels"])
    assert row["labels"].dtype == np.int32
    assert found.encoded(index) == streets.encoded(index)
  text = {"id": streets.text(0)["id"], "image": True, "labels": True}
  assert found.text(0) == text


def test_threads_and_processes_read_any_rows(captions, folder):
  source = array_record.ArrayRecord(folder, image_spec=images.ImageSpec(6))
  order = np.random.default_rng(0).permutation(np.arange(8).repeat(20)).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(source.encoded, order))
  assert found == [tuple(captions[0].files[i]) for i in order]
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(copy[5]["image"], source[5]["image"])


def test_rows_outside_are_no_rows(folder):
  source = array_record.ArrayRecord(folder)
  for index in (-1, 8):
    for read in (source.__getitem__, source.text, source.encoded, source.name):
      with pytest.raises(IndexError):
        read(index)


def test_bad_rows_are_left_out_up_to_a_share(captions, tmp_path):
  made, source = captions
  lost = [
    made.root / json.loads(made.path.read_text())[i]["image"] for i in (2, 3)
  ]
  lost[0].unlink()
  lost[1].write_bytes(b"<html>404</html>")
  with pytest.raises(
    InputError, match="2 of 8 rows are bad, allowed is a share"
  ):
    _write(source, tmp_path / "none", max_bad=0.2)
  with pytest.raises(InputError, match="was written only in part"):
    array_record.ArrayRecord(tmp_path / "none")
  written = _write(source, tmp_path / "set", max_bad=0.25, shards=8)
  assert written.rows == 6
  assert "json#2: image: " in written.skipped[0]
  assert "json#3: image: not a readable image" in written.skipped[1]
  found = array_record.ArrayRecord(tmp_path / "set")
  kept = [made.rows[i]["id"] for i in (0, 1, 4, 5, 6, 7)]
  assert [found.text(i)["id"] for i in range(6)] == kept
  told = json.loads((tmp_path / "set" / "dataset.json").read_text())
  assert told["left_out"] == list(written.skipped)
  assert (told["kind"], told["rows"], told["origin"]) == (
    "conversation",
    6,
    "here",
  )


def test_a_label_map_must_be_one(tmp_path):
  rng = np.random.default_rng(0)
  for name in ("images", "labels"):
    (tmp_path / "train" / name).mkdir(parents=True)
    picture = published_parts.picture(rng, "PNG")  # No label map: RGB.
    (tmp_path / "train" / name / "a.png").write_bytes(picture)
  source = folders.SegmentFolder(tmp_path, "train")
  with pytest.raises(
    InputError, match="train#0: labels: a label map must hold"
  ):
    _write(source, tmp_path / "set", kind="segment")


def _street(folder, labels):
  """Write a picture of 6x4 pixels and a label map as a folder's train."""
  pixels = {"images": np.zeros((4, 6, 3), np.uint8), "labels": labels}
  for name, array in pixels.items():
    (folder / "train" / name).mkdir(parents=True)
    data = published_parts.encode(array, "PNG")
    (folder / "train" / name / "a.png").write_bytes(data)
  return folders.SegmentFolder(folder, "train")


def test_a_label_map_must_be_as_large_as_its_image(tmp_path):
  source = _street(tmp_path, np.zeros((6, 4), np.uint8))
  said = "labels: the label map is 4x6 pixels, its image 6x4"
  with pytest.raises(InputError, match=f"train#0: {said}"):
    _write(source, tmp_path / "set", kind="segment")
  good = _street(tmp_path / "good", np.zeros((4, 6), np.uint8))
  _write(good, tmp_path / "other", kind="segment", shards=1)
  record = {"row": {"id": "a"}, "images": source.encoded(0)}
  _replace_rows(tmp_path / "other", msgpack.packb(record))
  # Also where both are made the same size.
  found = array_record.ArrayRecord(
    tmp_path / "other", image_spec=images.ImageSpec(4)
  )
  with pytest.raises(InputError, match=f"-of-00001.array_record:0: {said}"):
    found[0]


def _replace_rows(folder, record: bytes) -> None:
  """Make a record the only one of a folder of one shard."""
  name = "rows-00000-of-00001.array_record"
  writer = array_record_module.ArrayRecordWriter(
    str(folder / name), "group_size:1"
  )
  writer.write(record)
  writer.close()
  told = json.loads((folder / "dataset.json").read_text())
  told["shards"][0]["bytes"][name] = (folder / name).stat().st_size
  (folder / "dataset.json").write_text(json.dumps(told))


def test_a_record_without_its_label_map_is_named(tmp_path):
  source = _street(tmp_path, np.zeros((4, 6), np.uint8))
  _write(source, tmp_path / "set", kind="segment")
  record = {"row": {"id": "a"}, "images": source.encoded(0)[:1]}
  _replace_rows(tmp_path / "set", msgpack.packb(record))
  with pytest.raises(InputError, match=":0: image: 1 files, but 2 are needed"):
    array_record.ArrayRecord(tmp_path / "set")[0]


def test_a_name_that_is_no_utf8_is_a_bad_row(tmp_path):
  made = published.make_image_folder(tmp_path, rows=2)
  folder = made.path / "train" / "n01440764"
  name = os.fsdecode(b"n\xff.JPEG")
  (folder / "n01440764_0.JPEG").rename(folder / name)
  source = folders.ImageFolder(made.path, "train")
  with pytest.raises(InputError, match="train#1: id: .* no UTF-8; .* rename"):
    _write(source, tmp_path / "none", kind="classify")
  written = _write(source, tmp_path / "set", kind="classify", max_bad=0.2)
  assert written.rows == 5 and "train#1: id: " in written.skipped[0]


@pytest.mark.parametrize("value", [2**70, {1, 2}])
def test_a_value_that_cannot_be_written_is_a_bad_row(captions, tmp_path, value):
  class Extra:
    __len__ = captions[1].__len__
    name, encoded = captions[1].name, captions[1].encoded

    def text(self, index):
      return captions[1].text(index) | {"extra": value}

  with pytest.raises(InputError, match="json#0: extra: cannot be written: "):
    _write(Extra(), tmp_path / "set")


def test_what_cannot_be_written_is_refused(captions, tmp_path):
  source = captions[1]
  with pytest.raises(InputError, match="kind 'text' cannot be written; only"):
    _write(source, tmp_path / "set", kind="text")
  for shards in (0, 100_000):
    with pytest.raises(InputError, match=f"shards={shards}: give 1 to 99999"):
      _write(source, tmp_path / "set", shards=shards)
  with pytest.raises(InputError, match="max_bad=2: give a share of 0 to 1"):
    _write(source, tmp_path / "set", max_bad=2)
  with pytest.raises(InputError, match="is not an empty folder"):
    _write(source, tmp_path)
  (tmp_path / "empty.jsonl").write_bytes(b"")
  with pytest.raises(InputError, match="here: no rows to write"):
    _write(json_records.LlavaJson(tmp_path / "empty.jsonl"), tmp_path / "set")
  (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
  bad = json_records.LlavaJson(tmp_path / "bad.jsonl")
  with pytest.raises(
    InputError, match="all 1 rows are bad: .*bad.jsonl:1: conv"
  ):
    _write(bad, tmp_path / "set", max_bad=1.0)


def test_a_full_disk_is_named(captions, tmp_path, monkeypatch):
  class Full:
    def __init__(self, path, options):
      pass

    def write(self, record):
      raise RuntimeError("write() failed: No space left on device")

  monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
  with pytest.raises(InputError, match="set: cannot be written: .*No space"):
    _write(captions[1], tmp_path / "set")


def test_a_row_with_other_files_than_images_is_refused(captions, tmp_path):
  class Short:
    __len__ = captions[1].__len__
    text, name = captions[1].text, captions[1].name

    def encoded(self, index):
      return ()

  with pytest.raises(InputError, match="json#0: image: 0 files, but 1 are"):
    _write(Short(), tmp_path / "set")


def test_a_folder_without_its_description_was_written_in_part(folder, tmp_path):
  path = folder / "dataset.json"
  told = json.loads(path.read_text())
  path.rename(folder / "dataset.json.tmp")
  with pytest.raises(InputError, match="set: was written only in part, it has"):
    array_record.ArrayRecord(folder)
  path.write_text("{")
  with pytest.raises(InputError, match="dataset.json: .*JSON"):
    array_record.ArrayRecord(folder)
  path.write_text("[]")
  with pytest.raises(InputError, match="dataset.json: .*JSON"):
    array_record.ArrayRecord(folder)
  path.write_text("[" * 10**6)
  with pytest.raises(InputError, match="dataset.json: .*JSON"):
    array_record.ArrayRecord(folder)
  path.write_text(json.dumps(told | {"version": 2}))
  with pytest.raises(InputError, match="version 2, not .*, version 1; convert"):
    array_record.ArrayRecord(folder)
  with pytest.raises(InputError, match="none: no such folder"):
    array_record.ArrayRecord(tmp_path / "none")
  with pytest.raises(InputError, match="images: no dataset.json in it; make"):
    array_record.ArrayRecord(tmp_path / "LLaVA-Pretrain" / "images")


@pytest.mark.parametrize("change, message", [
  ({"kind": None}, "kind: must be one of conversation, .*, not None"),
  ({"kind": "chat"}, "kind: must be one of .*, not 'chat'"),
  ({"kind": []}, r"kind: must be one of .*, not \[\]"),
  ({"shards": None}, "shards: must be a list"),
  ({"shards": []}, "shards: must be a list"),
  ({"shards": [1]}, r"shards\[0\]: must say rows, and the bytes of rows-0000"),
  ({"shards": [{"rows": 8}]}, r"shards\[0\]: must say rows"),
  ({"shards": [{"rows": 8, "bytes": {"../x": 3}}]}, r"shards\[0\]: must say"),
])  # fmt: skip
def test_a_description_that_lacks_something_is_refused(folder, change, message):
  path = folder / "dataset.json"
  told = json.loads(path.read_text()) | change
  for key in [key for key, value in told.items() if value is None]:
    del told[key]
  path.write_text(json.dumps(told))
  with pytest.raises(InputError, match=f"dataset.json: {message}") as caught:
    array_record.ArrayRecord(folder)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key, value", [
  ("rows", "3"), ("rows", -1), ("rows", True), ("bytes", 5),
])  # fmt: skip
def test_a_shards_numbers_are_whole(folder, key, value):
  path = folder / "dataset.json"
  told = json.loads(path.read_text())
  told["shards"][1][key] = value
  path.write_text(json.dumps(told))
  with pytest.raises(InputError, match=r"json: shards\[1\]: must say rows"):
    array_record.ArrayRecord(folder)


def test_a_shard_that_is_missing_or_cut_is_named(folder):
  shard = folder / "rows-00001-of-00003.array_record"
  data = shard.read_bytes()
  shard.write_bytes(data[:-1])
  with pytest.raises(
    InputError, match=f"00003.array_record: {len(data) - 1} byt"
  ):
    array_record.ArrayRecord(folder)
  shard.unlink()
  with pytest.raises(InputError, match="00001-of-.*: the shard is missing"):
    array_record.ArrayRecord(folder)


def test_a_record_that_does_not_unpack_is_named(folder):
  shard = folder / "rows-00000-of-00003.array_record"
  data = bytearray(shard.read_bytes())
  at = data.index(b"\xff\xd8\xff")  # In the first record's image.
  data[at : at + 4] = bytes(4)
  shard.write_bytes(data)
  source = array_record.ArrayRecord(folder)
  for read in (source.__getitem__, source.encoded):
    with pytest.raises(
      InputError, match="rows-00000-of-.*:0: the record cannot be unpac.*hash"
    ) as caught:
      read(0)
    assert "\n" not in str(caught.value)
  assert source[1]["image"].ndim == 3


@pytest.mark.parametrize("part", ["rows", "texts"])
@pytest.mark.parametrize("record", [
  b"\xc1", b"", msgpack.packb({"row": {}})[:-1], msgpack.packb([1]),
  msgpack.packb({"row": {}}), msgpack.packb({"row": 3, "images": []}),
])  # fmt: skip
def test_a_record_of_other_content_is_named(folder, record, part):
  name = f"{part}-00002-of-00003.array_record"
  shard = folder / name
  writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
  for _ in range(2):
    writer.write(record)
  writer.close()
  told = json.loads((folder / "dataset.json").read_text())
  told["shards"][2]["bytes"][name] = shard.stat().st_size
  (folder / "dataset.json").write_text(json.dumps(told))
  source = array_record.ArrayRecord(folder)
  read = source.text if part == "texts" else source.encoded
  with pytest.raises(
    InputError, match=f"{part}-00002-of-.*:1: the record canno"
  ):
    read(7)


@pytest.mark.parametrize("rows", [10**12, 2, 4])
def test_a_shard_has_the_rows_that_the_description_says(folder, rows):
  path = folder / "dataset.json"
  told = json.loads(path.read_text())
  own = told["shards"][0]["rows"]
  told["shards"][0]["rows"] = rows if rows != own else own + 1
  path.write_text(json.dumps(told))
  with pytest.raises(InputError, match=f"rows-00000-of-.*has {own} rows, but"):
    array_record.ArrayRecord(folder)


def test_a_shard_of_zeros_is_named(folder):
  shard = folder / "texts-00000-of-00003.array_record"
  shard.write_bytes(bytes(shard.stat().st_size))
  with pytest.raises(InputError, match="texts-00000-of-00003"):
    array_record.ArrayRecord(folder)


TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize("row, images, message", [
  ({"conversations": TURNS}, 0, "'id'"),
  ({"id": 5, "conversations": TURNS}, 0, "id of type int"),
  ({"id": "1"}, 0, "'conversations'"),
  ({"id": "1", "conversations": "hi"}, 0, "conversations of type str"),
  ({"id": "1", "conversations": TURNS, "image": "/x"}, 0, "image among"),
  ({"id": "1", "conversations": TURNS}, 10**12, "no number of images"),
  ({"id": "1", "conversations": TURNS}, -1, "no number of images"),
  ({"id": "1", "conversations": TURNS}, [b""], "no number of images"),
])  # fmt: skip
def test_a_record_without_a_rows_fields_is_named(folder, row, images, message):
  name = "texts-00002-of-00003.array_record"
  writer = array_record_module.ArrayRecordWriter(
    str(folder / name), "group_size:1"
  )
  for _ in range(2):
    writer.write(msgpack.packb({"row": row, "images": images}))
  writer.close()
  told = json.loads((folder / "dataset.json").read_text())
  told["shards"][2]["bytes"][name] = (folder / name).stat().st_size
  (folder / "dataset.json").write_text(json.dumps(told))
  source = array_record.ArrayRecord(folder)
  with pytest.raises(InputError, match=f"{name}:1: .*{message}"):
    source.text(7)
