"""MMPR as a source: rows of many files, their names and images."""

import functools
import json
import logging

import pytest
from PIL import Image

from pivot_jax.data import images, opener
from pivot_jax.data.sources import mmpr
from pivot_jax.data.tools import check, convert
from pivot_jax.errors import InputError
from tests.data.sources import mmpr_files

row, numbered = mmpr_files.row, mmpr_files.numbered


@pytest.fixture
def write(tmp_path):
  """Write {name: rows} as MMPR is published; return its meta.json."""
  return functools.partial(mmpr_files.write, tmp_path)


def test_rows_follow_the_files_and_know_where_they_come_from(write):
  named = [row(id=7), row(id=7), row(image=["x.png", "y.jpg"])]
  meta = write({"a/b": numbered(2), "c": named, "d": [row(image=None)]})
  source = mmpr.Mmpr(meta)
  rows = [source.text(i) for i in range(len(source))]
  assert [r["id"] for r in rows[:4]] == ["a/b/0", "a/b/1", "c/7", "c/7#2"]
  assert len({r["id"] for r in rows}) == len(rows) == 6
  assert [r["image"] for r in rows[1:]] == [
    "images/0/x.png", "images/1/x.png", "images/1/x.png",
    ["images/1/x.png", "images/1/y.jpg"], None,
  ]  # fmt: skip
  assert [r["data_source"] for r in rows] == ["a/b"] * 2 + ["c"] * 3 + ["d"]
  assert source.name(3) == f"{meta.parent}/annotations/1.jsonl:2"
  assert source.place(5) == (2, 0)
  with pytest.raises(IndexError):
    source.text(6)


def test_images_are_decoded_or_given_as_they_are(write):
  several = row(image=["x.png", "y.jpg"])
  meta = write({"a": [row(), several, row(image=None)]})
  source = mmpr.Mmpr(meta)
  assert source[0]["image"].shape == (2, 3, 3)
  assert [image.shape for image in source[1]["image"]] == [(2, 3, 3)] * 2
  assert source[2]["image"] is None and source.encoded(2) == ()
  files = [meta.parent / "images/0" / name for name in ("x.png", "y.jpg")]
  assert source.encoded(1) == tuple(file.read_bytes() for file in files)
  assert mmpr.Mmpr(meta, image_spec=images.ImageSpec(8))[0]["image"].shape == (
    8,
    8,
    3,
  )


@pytest.mark.parametrize(
  "annotation",
  ["MMPR-v1.2/annotations/{}.jsonl", "/of/others/annotations/{}.jsonl"],
)
def test_annotations_are_found_by_the_paths_they_were_published_with(
  write, annotation
):
  assert len(mmpr.Mmpr(write({"a": [row()]}, annotation))) == 1


def test_roots_may_begin_with_the_name_of_the_folder(write):
  meta = write({"a": [row()]}, root="MMPR-v1.2/images/0")
  assert mmpr.Mmpr(meta)[0]["image"].shape == (2, 3, 3)


def test_all_missing_annotations_are_one_error(write):
  meta = write({"a": [row()], "b": [row()]}, "elsewhere/{}.json.jsonl")
  match = (
    r"2 of 2 annotations are not there.*elsewhere/0.*elsewhere/1.*put them"
  )
  with pytest.raises(InputError, match=match):
    mmpr.Mmpr(meta)


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("[]", "holds no JSON object"),
    ("{}", "lists no annotations"),
    ('{"a": {"annotation": "x.jsonl"}}', r"meta\.json: a: root: .*missing"),
    ('{"a": {"root": "", "annotation": "x.json"}}', r"a: annotation: .*jsonl"),
    ('{"a": 3}', "a: must have the keys root and annotation"),
  ],
)
def test_a_meta_that_is_none_is_refused(tmp_path, text, match):
  (tmp_path / "meta.json").write_text(text)
  with pytest.raises(InputError, match=match):
    mmpr.Mmpr(tmp_path / "meta.json")


def test_broken_lines_are_refused_by_name_or_left_for_later(write):
  meta = write({"a": [row(), "{broken", row(chosen=3)]})
  with pytest.raises(InputError, match=r"0\.jsonl:2: invalid JSON"):
    mmpr.Mmpr(meta)
  source = mmpr.Mmpr(meta, flawed=True)
  assert source.text(0)["id"] == "a/0"
  with pytest.raises(InputError, match=r"0\.jsonl:2: invalid JSON"):
    source.text(1)
  with pytest.raises(InputError, match=r"0\.jsonl:3: chosen: must be text"):
    source.text(2)


def test_another_length_than_metas_is_in_the_log(write, caplog):
  with caplog.at_level(logging.WARNING, "pivot_jax"):
    mmpr.Mmpr(write({"a": [row()]}, length=5))
  assert "0.jsonl: 1 rows, 5 in meta.json" in caplog.text


def test_a_gif_is_its_jpg_if_only_that_is_there(write):
  meta = write({"a": [row(image="y.gif"), row(image="x.gif")]})
  Image.new("L", (5, 5)).save(meta.parent / "images/0/x.gif")
  Image.new("L", (6, 6)).save(meta.parent / "images/0/x.jpg")
  paths = [mmpr.Mmpr(meta).text(i)["image"] for i in range(2)]
  assert paths == ["images/0/y.jpg", "images/0/x.gif"]
  renamed = mmpr.Mmpr(meta, as_released=True)
  assert renamed.text(1)["image"] == "images/0/x.jpg"
  assert renamed[1]["image"].shape == (6, 6, 3)


def test_images_outside_the_root_are_refused(write):
  meta = write({"a": [row(image="../../../secret.png")]})
  Image.new("L", (2, 2)).save(meta.parents[1] / "secret.png")
  with pytest.raises(InputError, match=r"0\.jsonl:1: image: .*escapes"):
    mmpr.Mmpr(meta)[0]


# --- repeat_time -------------------------------------------------------------


def _repeated(meta, *times):
  """Write `repeat_time` into the entries of a `meta.json`, in order."""
  entries = json.loads(meta.read_text())
  for entry, time in zip(entries.values(), times, strict=True):
    entry["repeat_time"] = time
  meta.write_text(json.dumps(entries))
  return meta


def test_rows_come_as_often_as_their_entry_says(write):
  named = [row(id=f"r{i}") for i in range(2)]
  meta = write({"a": numbered(7), "b": named, "c": numbered(2)})
  source = mmpr.Mmpr(_repeated(meta, 0.5, 3, 1))
  rows = [source.text(i) for i in range(len(source))]
  assert [one["id"] for one in rows] == [
    "a/0", "a/1", "a/2",
    "b/r0", "b/r1", "b#2/r0", "b#2/r1", "b#3/r0", "b#3/r1",
    "c/0", "c/1",
  ]  # fmt: skip
  assert [one["question"] for one in rows[:3]] == [
    f"what {i} ?" for i in range(3)
  ]
  assert {one["data_source"] for one in rows[3:9]} == {"b"}
  lines = [source.name(i).rpartition("/")[2] for i in range(3, 11)]
  assert lines[:6] == ["1.jsonl:1", "1.jsonl:2"] * 3
  assert lines[6:] == ["2.jsonl:1", "2.jsonl:2"]
  assert source.place(8) == (1, 1) and source.place(9) == (2, 0)
  assert source[8]["image"].shape == (2, 3, 3)
  assert source.encoded(8) == source.encoded(4)
  source.check_row(8)
  with pytest.raises(IndexError):
    source.text(11)


@pytest.mark.parametrize(
  ("time", "rows"),
  # The share is rounded down, and in floats: 100 * 0.29 is under 29.
  [(0.29, 28), (0.999, 99), (0.01, 1), (1, 100), (1.0, 100), (2.0, 200)],
)
def test_a_share_is_rounded_as_in_internvl(write, time, rows):
  meta = write({"a": numbered(100)}, repeat_time=time)
  assert len(mmpr.Mmpr(meta)) == rows


@pytest.mark.parametrize("time", [0, -1, 1.5, True, "2", None, [1], 10**9])
def test_a_repeat_time_that_is_none_is_named_with_its_entry(write, time):
  meta = _repeated(write({"a": [row()], "b": [row()]}), 1, time)
  with pytest.raises(InputError, match=r"meta\.json: b: repeat_time: "):
    mmpr.Mmpr(meta)


def test_a_share_of_no_row_is_an_error(write):
  meta = write({"a": numbered(9)}, repeat_time=0.1)
  with pytest.raises(InputError, match="a: repeat_time: 0.1 of 9 rows is none"):
    mmpr.Mmpr(meta)


def test_ids_of_a_later_time_are_not_those_of_another_entry(write):
  meta = _repeated(write({"a": [row()], "a#2": [row()]}), 2, 1)
  with pytest.raises(InputError, match="repeat_time: .*entry a#2"):
    mmpr.Mmpr(meta)
  assert len(mmpr.Mmpr(_repeated(meta, 1, 2))) == 3


def test_the_stamp_knows_how_often_rows_come(write):
  meta = write({"a": numbered(4), "b": numbered(4)})
  plain = mmpr.Mmpr(meta).stamp()
  assert mmpr.Mmpr(_repeated(meta, 1, 1)).stamp() == plain
  stamps = [
    mmpr.Mmpr(_repeated(meta, *times)).stamp()
    for times in ((0.5, 1), (1, 0.5), (2, 1), (1, 2), (0.75, 1))
  ]
  assert len({plain, *stamps}) == 6
  assert mmpr.Mmpr(meta, repeated=False).stamp() == plain


def test_check_and_training_read_repeated_rows(write, tmp_path):
  meta = _repeated(write({"a": numbered(4), "b": numbered(2)}), 0.5, 2)
  options = [str(meta), f"--out={tmp_path}", "--tokenizer=package:toy"]
  assert check.main(options) == 0
  assert json.loads((tmp_path / "check.json").read_text())["rows"] == 6
  for kind in ("mmpr", "preference"):
    source = opener.open_source({"kind": kind, "path": str(meta)})
    assert len(source) == 6 and source.text(5)["id"] == "b#2/1"
  convert.main([str(meta), str(tmp_path / "out")])
  spec = {"kind": "array_record", "path": str(tmp_path / "out")}
  assert opener.open_source(spec).text(5)["id"] == "b#2/1"
