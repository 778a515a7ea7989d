import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from pivot_jax.data import images, rows
from pivot_jax.data.sources import json_records
from pivot_jax.errors import InputError

PAIR = {"question": "<image>\nWhat?", "chosen": "yes", "rejected": "no"}
TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ok"}]


@pytest.fixture
def folder(tmp_path):
  for index in range(3):
    _image(tmp_path / f"{index}.png", level=10 * index)
  return tmp_path


def _image(path, *, level: int = 0, size=(6, 4)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", size, (level,) * 3).save(path)


def _lines(path, *records) -> str:
  path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
  return path


def _list(path, *records) -> str:
  path.write_text(json.dumps(records), "utf-8")
  return path


def test_conversation_rows_carry_their_image_at_its_own_size(folder):
  path = _list(
    folder / "a.json",
    {"id": "x", "image": "1.png", "conversations": TURNS},
    {"id": 7, "conversations": TURNS},
    {"image": None, "conversations": TURNS},
    {"id": "y", "image": ["2.png"], "conversations": TURNS, "other": 1},
  )
  source = json_records.LlavaJson(path, folder)
  assert [source[i]["id"] for i in range(4)] == ["x", "7", "a-2", "y"]
  first = source[0]
  assert first["conversations"] == TURNS
  assert first["image"].shape == (4, 6, 3) and first["image"].max() == 10
  assert source[1]["image"] is None and source[2]["image"] is None
  assert source[3]["image"].max() == 20
  assert source.name(1) == f"{path}#1"
  with pytest.raises(IndexError):
    source[4]


def test_a_row_without_pixels_is_the_same_row(folder):
  record = {"id": "x", "image": "1.png", **PAIR}
  source = json_records.JsonLines(_lines(folder / "a.jsonl", record))
  assert source.text(0) == record
  row = source[0]
  assert row.pop("image").shape == (4, 6, 3)
  assert row == {"id": "x", **PAIR}


def test_preference_rows_are_read_by_line(folder):
  path = _lines(folder / "a.jsonl", {"image": "1.png", **PAIR}, PAIR)
  source = json_records.JsonLines(path, folder, images.ImageSpec(2))
  assert len(source) == 2
  assert source[0]["image"].shape == (2, 2, 3)
  assert source[1] == {"id": "a-1", "image": None, **PAIR}
  assert source.name(1) == f"{path}:2"
  prompt = {"prompt": "q", "chosen": "a", "rejected": "b"}
  source = json_records.JsonLines(_list(folder / "dpo.json", prompt))
  assert source[0]["question"] == "q"


def test_evaluation_rows_come_in_both_forms(folder):
  path = _lines(
    folder / "suite.jsonl",
    {"id": "a", "question": "q", "answer": "yes", "kind": "yesno"},
    {"id": "b", "image": "0.png", "conversations": TURNS, "category": "c"},
  )
  source = json_records.EvalJson(path)
  named = {"category": "suite", "kind": "yesno"}
  assert source[0] == {
    "id": "a", "image": None, "question": "q", "answer": "yes", **named
  }  # fmt: skip
  assert (source[1]["question"], source[1]["answer"]) == ("Hi", "Ok")
  assert (source[1]["category"], source[1]["kind"]) == ("c", "suite")
  path = _lines(path, {"id": "a", "conversations": TURNS * 2})
  with pytest.raises(InputError, match="suite.jsonl:1: .* one turn from human"):
    json_records.EvalJson(path)[0]


def test_repeated_ids_are_numbered_and_refused_in_an_evaluation(folder):
  ids = ["a", "b", "a", "a#2", "a"]
  path = _lines(folder / "a.jsonl", *({"id": i, **PAIR} for i in ids))
  source = json_records.JsonLines(path)
  found = [source[i]["id"] for i in range(5)]
  assert found == ["a", "b", "a#3", "a#2", "a#4"]
  path = _lines(path, *({"id": i, "question": "q", "answer": "a"} for i in ids))
  with pytest.raises(InputError, match="a.jsonl:3: id: 'a' is also .*jsonl:1;"):
    json_records.EvalJson(path)


@hypothesis.given(st.lists(st.sampled_from(["a", "b", "a#2", "a#3", None])))
def test_every_row_ends_with_an_id_of_its_own(tmp_path_factory, ids):
  path = tmp_path_factory.getbasetemp() / "ids.jsonl"
  source = json_records.JsonLines(
    _lines(path, *({"id": i, **PAIR} for i in ids))
  )
  found = [source[i]["id"] for i in range(len(source))]
  assert len(set(found)) == len(ids)
  for index, (given, used) in enumerate(zip(ids, found)):
    assert used.startswith(given or f"ids-{index}")


@hypothesis.given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_lines_and_lists_give_back_any_text(tmp_path_factory, texts):
  folder = tmp_path_factory.getbasetemp()
  records = [{**PAIR, "question": text} for text in texts]
  for path in (_list(folder / "t.json", *records), folder / "t.jsonl"):
    lines = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    (folder / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\n\n")
    source = json_records.JsonLines(path)
    assert [source[i]["question"] for i in range(len(source))] == texts


def test_a_byte_order_mark_and_a_last_empty_line_are_accepted(folder):
  line = json.dumps(PAIR).encode()
  (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n")
  assert len(json_records.JsonLines(folder / "a.jsonl")) == 1
  (folder / "a.json").write_bytes(b"\xef\xbb\xbf[" + line + b"]\n\n")
  assert len(json_records.JsonLines(folder / "a.json")) == 1


def test_damaged_files_are_named_with_line_and_byte(folder):
  good = json.dumps(PAIR).encode() + b"\n"
  cases = {
    "utf.jsonl": (good + b'{"id": "\xff"}\n', ":2: invalid UTF-8 at byte 9"),
    "cut.jsonl": (good + good[:-9], ":2: invalid JSON at column"),
    "gap.jsonl": (good + b"\n" + good, ":2: the line is blank; remove it"),
    "row.jsonl": (good + b"[1]\n", ":2: a record must be a JSON object"),
    "deep.jsonl": (b"[" * 99_999, ":1: JSON that cannot be read"),
    "huge.jsonl": (b'{"id": ' + b"1" * 9999 + b"}", ":1: JSON that cannot"),
    "utf.json": (b'[{\n"id": "\xff"}]', ":2: invalid UTF-8 at byte 8"),
    "cut.json": (b"[\n{}\n", ":3: must be a JSON list; expected ',' or"),
    "one.json": (b"{}", ":1: must be a JSON list"),
    "row.json": (b"[{}, 3]", "#1: a record must be a JSON object, not int"),
  }
  for name, (data, message) in cases.items():
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name}{message}") as caught:
      json_records.JsonLines(folder / name)
    assert "\n" not in str(caught.value)
  with pytest.raises(InputError, match="none.json: no such file"):
    json_records.LlavaJson(folder / "none.json")


@pytest.mark.parametrize("change, message", [
  ({"chosen": ...}, "chosen: the field is missing"),
  ({"question": ...}, "question: the field is missing"),
  ({"rejected": 3}, "rejected: must be text, not 3"),
  ({"question": "\ud800"}, "question: has half a surrogate pair"),
  ({"image": 3}, "image: must be text, not 3"),
  ({"image": ["0.png", 1]}, r"image\[1\]: must be text, not 1"),
  ({"image": ""}, "image: '' is not a path"),
  ({"image": "none.png"}, "image: .*none.png: no such file"),
  ({"image": "../../etc/passwd"}, "escapes the image root"),
  ({"image": "bad.png"}, "bad.png: not a readable image"),
])  # fmt: skip
def test_a_bad_field_is_named_with_its_row(folder, change, message):
  (folder / "bad.png").write_bytes(b"no image")
  record = {k: v for k, v in (PAIR | change).items() if v is not ...}
  source = json_records.JsonLines(_lines(folder / "a.jsonl", PAIR, record))
  assert source[0]["chosen"] == "yes"
  with pytest.raises(InputError, match=f"a.jsonl:2: .*{message}") as caught:
    source[1]
  assert str(caught.value).count("a.jsonl") == 1


@pytest.mark.parametrize("turns, message", [
  (..., "conversations: the field is missing"),
  ("Hi", "conversations: must be a list"),
  ([], "conversations: must be a list of turns, and not empty"),
  (["Hi"], r"conversations\[0\]: must have the keys"),
  ([TURNS[0], {"from": "gpt"}], r"conversations\[1\].value: the field is"),
  ([{"value": "Hi"}], r"conversations\[0\].from: the field is missing"),
  ([{"from": "human", "value": 1}], r"conversations\[0\].value: must be text"),
])  # fmt: skip
def test_bad_turns_are_named_with_their_row(folder, turns, message):
  record = {} if turns is ... else {"conversations": turns}
  source = json_records.LlavaJson(_list(folder / "a.json", record))
  with pytest.raises(InputError, match=f"a.json#0: {message}"):
    source[0]


def test_an_id_that_is_no_text_is_refused(folder):
  path = _lines(folder / "a.jsonl", {"id": [1], **PAIR})
  with pytest.raises(InputError, match="a.jsonl:1: id: must be text or a num"):
    json_records.JsonLines(path)


def test_a_check_reads_all_rows_and_lists_the_bad_ones(folder):
  names = ["0.png", "gone.png", "1.png", "cut.png"]
  (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:40])
  path = _lines(folder / "a.jsonl", *({"image": n, **PAIR} for n in names))
  source = json_records.JsonLines(path)
  with pytest.raises(InputError, match="2 of 4 rows are bad") as caught:
    rows.unreadable(source)
  for part in ("a.jsonl:2: image: ", "gone.png", "a.jsonl:4: ", "cut.png"):
    assert part in str(caught.value)
  with pytest.raises(InputError, match="a share of 0.49"):
    rows.unreadable(source, max_bad=0.49)
  bad = rows.unreadable(source, max_bad=0.5)
  assert [index for index, _ in bad] == [1, 3]
  assert "gone.png" in bad[0][1]


def test_a_check_refuses_an_empty_source(folder):
  for path in (_lines(folder / "a.jsonl"), _list(folder / "a.json")):
    source = json_records.JsonLines(path)
    assert len(source) == 0
    with pytest.raises(InputError, match="has no rows"):
      rows.unreadable(source)


def test_a_check_shortens_a_long_list(folder):
  path = _lines(folder / "a.jsonl", *[{"question": "q"}] * 8)
  with pytest.raises(InputError, match="8 of 8 .*:5: .*; and 3 more$"):
    rows.unreadable(json_records.JsonLines(path))


def test_a_misspelt_resample_is_refused_when_the_source_is_made(folder):
  path = _lines(folder / "a.jsonl", PAIR)
  with pytest.raises(InputError, match="'cubic' is none of bicubic"):
    json_records.JsonLines(path, None, images.ImageSpec(resample="cubic"))


def test_the_real_statements_are_read_in_both_forms(test_data):
  root = test_data / "nlvr"
  pairs = json_records.JsonLines(root / "train_mmpr.jsonl", root / "images")
  talks = json_records.LlavaJson(root / "train_llava.json", root / "images")
  assert len(pairs) == len(talks) > 0
  for index in (0, 1, len(pairs) - 1):
    pair, talk = pairs[index], talks[index]
    assert pair["id"] == talk["id"]
    assert pair["chosen"] == talk["conversations"][1]["value"]
    assert pair["image"].dtype == np.uint8
    np.testing.assert_array_equal(pair["image"], talk["image"])
  suite = json_records.EvalJson(root / "test_llava.json", root / "images")
  assert suite[0]["answer"] in ("True.", "False.")
  assert suite[0]["category"] == "test_llava"
