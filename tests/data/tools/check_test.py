"""Each fault is found in its row, and nothing else."""

import json
import pathlib

import pytest

from pivot_jax.data import opener
from pivot_jax.data.tools import check, check_rows
from pivot_jax.errors import InputError
from tests.data.tools import checked

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  return checked.pictures(tmp_path)


PAIRS = (
  (None, {}),
  (None, {"image": None, "question": "how many"}),
  (None, {"question": "how many"}),
  (None, {"image": checked.TWO, "question": checked.TWO_ASKED}),
  (None, {"image": ["a.png"]}),
  (None, {"chosen": "two", "rejected": "Two"}),
  ("schema", {"chosen": 1}),
  ("schema", {"image": 1}),
  ("schema", {"image": ["a.png", None]}),
  ("schema", {"id": 1.5}),
  ("missing_image", {"image": "none.png"}),
  ("missing_image", {"image": "inside"}),
  ("missing_image", {"image": ""}),
  (
    "missing_image",
    {"image": ["a.png", "no.png"], "question": checked.TWO_ASKED},
  ),
  ("undecodable_image", {"image": "empty.png"}),
  ("undecodable_image", {"image": "page.png"}),
  ("undecodable_image", {"image": "cut.jpg"}),
  (
    "undecodable_image",
    {"image": ["a.png", "cut.jpg"], "question": checked.TWO_ASKED},
  ),
  ("too_many_pixels", {"image": "large.png"}),
  ("too_many_pixels", {"image": "header.png"}),
  ("outside_root", {"image": "../out.png"}),
  ("outside_root", {"image": "/a.png"}),
  ("outside_root", {"image": "https://host/a.png"}),
  ("outside_root", {"image": "link.png"}),
  ("placeholders", {"image": None}),
  ("placeholders", {"question": checked.TWO_ASKED}),
  ("placeholders", {"image": checked.TWO}),
  ("placeholders", {"image": checked.TWO, "question": "which"}),
  ("placeholders", {"chosen": "<image> one"}),
  ("empty_answer", {"chosen": ""}),
  ("empty_answer", {"rejected": " \n"}),
  ("equal_pair", {"chosen": "two"}),
  ("special_token", {"rejected": "two<|im_end|>"}),
  ("special_token", {"chosen": "<|endoftext|>"}),
  ("too_long", {"rejected": "two " * 2100}),
  ("lone_surrogate", {"question": "\ud83d"}),
)


def test_each_fault_of_a_pair_is_found_and_nothing_else(folder):
  # Ids first, for the fault may be in the id.
  rows = [
    checked.PAIR | {"id": f"p{i}"} | change
    for i, (_, change) in enumerate(PAIRS)
  ]
  assert checked.kinds(folder, rows) == [kind for kind, _ in PAIRS]


def _talk(*turns: tuple[str, str]) -> dict:
  said = [{"from": role, "value": value} for role, value in turns]
  return {"image": "a.png", "conversations": said}


CONVERSATIONS = (
  (None, _talk(("human", "<image>\nhow many"), ("gpt", "one"))),
  (None, _talk(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))),
  ("schema", _talk()),
  ("schema", _talk(("human", "a"))),
  ("schema", _talk(("gpt", "a"))),
  ("schema", _talk(("human", "a"), ("robot", "b"))),
  ("schema", {"conversations": "a"}),
  ("schema", {"conversations": [{"from": "human"}]}),
  ("schema", {"image": "a.png"}),
  ("empty_answer", _talk(("human", "a"), ("gpt", "b"), ("gpt", ""))),
  ("special_token", _talk(("human", "a"), ("gpt", "<|im_start|>"))),
  ("placeholders", _talk(("human", "<image>"), ("gpt", "<image>"))),
  (
    "placeholders",
    _talk(
      ("human", "<image>"), ("gpt", "b"), ("human", "<image>"), ("gpt", "d")
    ),
  ),
)


def test_each_fault_of_a_conversation_is_found_and_nothing_else(folder):
  rows = [row for _, row in CONVERSATIONS]
  assert checked.kinds(folder, rows) == [kind for kind, _ in CONVERSATIONS]


def test_answers_of_an_evaluation_are_looked_at(folder):
  row = {"image": "a.png", "question": "how many", "answer": "one"}
  changes = ({}, {"answer": " "}, {"answer": "<|im_end|>"}, {"kind": 3})
  assert checked.kinds(folder, [row | change for change in changes]) == [
    None,
    "empty_answer",
    "special_token",
    "schema",
  ]


def test_a_later_use_of_an_id_is_noted_in_one_file_only(folder, capsys):
  one = checked.lines(
    folder / "one.jsonl",
    [checked.PAIR, checked.PAIR, checked.PAIR | {"id": "q"}, checked.PAIR],
  )
  other = checked.lines(folder / "other.jsonl", [checked.PAIR])
  assert checked.check(folder, one, other) == 0
  found = [
    (f["name"], f["id"], f["kind"], f["drop"]) for f in checked.bad(folder)
  ]
  assert found == [
    (f"{one}:2", "p", "duplicate_id", False),
    (f"{one}:4", "p", "duplicate_id", False),
  ]
  report = checked.report(folder)
  assert (report["bad_rows"], report["bad"]) == (0, {})
  assert report["files"][0]["notes"] == {"duplicate_id": 2}
  assert "2 duplicate_id: none of them bad" in capsys.readouterr().out


def test_a_later_use_of_an_id_is_a_fault_of_an_evaluation(folder):
  row = {"id": "e", "image": "a.png", "question": "how many", "answer": "one"}
  path = checked.lines(folder / "rows.jsonl", [row, row])
  assert checked.check(folder, path) == 1
  assert [(f["kind"], f["drop"]) for f in checked.bad(folder)] == [
    ("duplicate_id", True)
  ]
  assert checked.report(folder)["bad"] == {"duplicate_id": 1}


def test_lines_that_are_no_records_are_found(folder):
  path = folder / "rows.jsonl"
  good = json.dumps(checked.PAIR).encode()
  path.write_bytes(
    b"\n".join([good, b"{", b"[1]", b'{"a": "\xff"}', b"", b"{}{}", b""])
  )
  assert checked.check(folder, path) == 1
  assert [(f["row"], f["kind"], f["id"]) for f in checked.bad(folder)] == [
    (1, "bad_json", None),
    (2, "schema", None),
    (3, "bad_utf8", None),
    (4, "bad_json", None),
    (5, "bad_json", None),
  ]


@pytest.mark.parametrize(
  "content, kind",
  [
    (b'[{"id": 1}', "bad_json"),
    (b"", "bad_json"),
    (b"[" * 10_000, "bad_json"),
    (b'{"a": 1}\n{"a": 2}\n', "bad_json"),
    (b'{"a": 1}', "schema"),
    (b'"text"', "schema"),
    (b"[]", "schema"),
    (b'[{"id": "\xe9"}]', "bad_utf8"),
    (json.dumps([checked.PAIR]).encode("utf-16"), "bad_utf8"),
  ],
)
def test_a_file_that_cannot_be_read_is_one_fault(folder, content, kind):
  path = folder / "rows.json"
  path.write_bytes(content)
  good = checked.lines(folder / "good.jsonl", [checked.PAIR])
  assert checked.check(folder, path, good, options=["--max-bad=0.9"]) == 1
  [fault] = checked.bad(folder)
  assert (fault["file"], fault["row"], fault["kind"]) == (str(path), None, kind)
  assert checked.report(folder)["rows"] == 1


def test_rows_of_a_list_are_named_by_their_index(folder):
  path = folder / "rows.json"
  path.write_text(
    "\ufeff" + json.dumps([checked.PAIR, 1, checked.PAIR | {"chosen": ""}])
  )
  assert checked.check(folder, path) == 1
  assert [(f["name"], f["row"], f["kind"]) for f in checked.bad(folder)] == [
    (f"{path}#1", 1, "schema"),
    (f"{path}#2", 2, "empty_answer"),
  ]


def test_a_file_whose_kind_shows_nowhere_has_a_fault_in_each_row(folder):
  path = folder / "rows.jsonl"
  path.write_text('{"text": "a"}\n{"text": \n')
  assert checked.check(folder, path) == 1
  kinds = [fault["kind"] for fault in checked.bad(folder)]
  assert kinds == ["schema", "bad_json"]


@pytest.mark.parametrize(
  "name, content, why",
  [
    ("notes.txt", b"text", "give .json"),
    ("rows.parquet", b"PAR1 and no more", "parquet that cannot be read"),
    ("list.yaml", b"datasets:\n- json_path: none.json\n", "1 of 1 files"),
    ("meta.json", b'{"a": {"annotation": "a.jsonl"}}', "a: root: the field"),
  ],
)
def test_a_file_of_no_known_kind_is_one_fault(
  folder, capsys, name, content, why
):
  path = folder / name
  path.write_bytes(content)
  good = checked.lines(folder / "good.jsonl", [checked.PAIR])
  assert checked.check(folder, path, good) == 1
  [fault] = checked.bad(folder)
  assert (fault["file"], fault["row"], fault["drop"]) == (str(path), None, True)
  assert fault["kind"] == "unreadable"
  assert fault["why"].startswith(why)
  report = checked.report(folder)
  assert (report["rows"], report["bad_rows"]) == (1, 0)
  assert f"{path}: cannot be read" in capsys.readouterr().out


def test_a_folder_without_a_set_is_one_fault(folder):
  good = checked.lines(folder / "good.jsonl", [checked.PAIR])
  assert checked.check(folder, folder / "images", good) == 1
  [fault] = checked.bad(folder)
  assert (fault["file"], fault["kind"]) == (
    str(folder / "images"),
    "unreadable",
  )


def test_workers_change_nothing(folder, monkeypatch):
  monkeypatch.setattr(check_rows, "_CHUNK", 7)
  rows = [checked.PAIR | {"id": f"p{i}"} | c for i, (_, c) in enumerate(PAIRS)]
  paths = [
    checked.lines(folder / "one.jsonl", rows),
    checked.lines(folder / "two.jsonl", [row for _, row in CONVERSATIONS]),
  ]
  written = []
  for workers in (0, 1, 2):
    assert checked.check(folder, *paths, options=[f"--workers={workers}"]) == 1
    written.append([p.read_bytes() for p in sorted((folder / "out").iterdir())])
  assert len(written[0]) == 2
  assert written[1] == written[0]
  assert written[2] == written[0]


def test_real_data_is_clean(test_data, tmp_path):
  files = sorted((test_data / "nlvr").glob("*.json*"))
  assert len(files) == 4
  given = [*map(str, files), f"--images={test_data / 'nlvr' / 'images'}"]
  assert check.main([*given, f"--out={tmp_path}"]) == 0
  assert (tmp_path / "bad.jsonl").read_text() == ""
  report = json.loads((tmp_path / "check.json").read_text())
  assert [file["rows"] for file in report["files"]] == [400, 400, 1000, 1000]
  assert report["files"][0]["image_sizes"] == [
    {"width": 400, "height": 100, "images": 400}
  ]


def test_a_source_leaves_out_the_rows_that_are_listed_as_bad(folder):
  rows = [checked.PAIR | {"id": f"p{i}"} for i in (0, 1, 2, 3, 3)]
  rows[1]["image"], rows[2]["chosen"] = "none.png", ""
  path = checked.lines(folder / "rows.jsonl", rows)
  checked.check(folder, path)
  assert [f["row"] for f in checked.bad(folder)] == [1, 2, 4]
  source = opener.open_source(
    dict(
      kind="preference",
      path=str(path),
      image_root=str(folder / "images"),
      bad=str(folder / "out" / "bad.jsonl"),
    )
  )
  ids = [source[i]["id"] for i in range(len(source))]
  assert ids == ["p0", "p3", "p3#2"]


def test_status_says_whether_more_rows_are_bad_than_allowed(folder, capsys):
  rows = [checked.PAIR | {"id": f"p{i}"} for i in range(4)]
  rows[3]["chosen"] = ""
  path = checked.lines(folder / "rows.jsonl", rows)
  assert checked.check(folder, path, options=["--max-bad=0.25"]) == 0
  assert checked.check(folder, path, options=["--max-bad=0.24"]) == 1
  said = capsys.readouterr().out
  assert "1 empty_answer: write the answer, or skip the row\n" in said
  assert f"as {path}:4: chosen: an answer is empty" in said


def test_images_are_in_place_without_decoding_them(folder):
  rows = [
    checked.PAIR | {"id": name, "image": name}
    for name in ("a.png", "cut.jpg", "none.png", "link.png")
  ]
  assert checked.kinds(folder, rows, options=["--no-decode"]) == [
    None,
    None,
    "missing_image",
    "outside_root",
  ]


def test_lengths_count_images_and_the_longer_answer(folder):
  rows = [checked.PAIR, checked.PAIR | {"id": "q", "rejected": "two two"}]
  found = []
  for patches in (10, 11):
    path = checked.lines(folder / "rows.jsonl", rows)
    assert checked.check(folder, path, options=[f"--patches={patches}"]) == 0
    [file] = checked.report(folder)["files"]
    found.append(file["tokens"])
  assert [found[1][k] - found[0][k] for k in ("min", "max")] == [1, 1]
  assert found[0]["max"] > found[0]["min"]
  longest = found[0]["max"]
  options = ["--patches=10", f"--max-length={longest}"]
  assert checked.kinds(folder, rows, options=options) == [None, None]
  options[1] = f"--max-length={longest - 1}"
  assert checked.kinds(folder, rows, options=options) == [None, "too_long"]
  options[1] = "--max-length=0"
  assert checked.kinds(folder, rows, options=options) == [None, None]


def test_without_its_tokenizer_no_row_is_too_long(folder, capsys):
  path = checked.lines(
    folder / "rows.jsonl", [checked.PAIR | {"chosen": "two " * 2100}]
  )
  given = [str(path), f"--images={folder / 'images'}", f"--out={folder}/out"]
  assert check.main(given) == 0
  assert checked.bad(folder) == []
  assert "no row is judged too_long: give --tokenizer" in (
    capsys.readouterr().out
  )
  report = checked.report(folder)
  assert report["files"][0]["tokens"]["max"] > check.MAX_LENGTH
  assert not report["settings"]["too_long_is_judged"]
  with pytest.raises(InputError, match="--max-length=9: give --tokenizer"):
    check.main([*given, "--max-length=9"])
  assert check.main([*given, "--tokenizer=package:toy"]) == 1
  assert [fault["kind"] for fault in checked.bad(folder)] == ["too_long"]
  assert "too_long: give" not in capsys.readouterr().out


def test_files_are_read_by_the_template_that_is_given(folder):
  rows = [
    {"image": "a.png", "conversations": checked.TALK},
    {"image": "a.png", "conversations": [*checked.TALK, *checked.TALK]},
    {
      "conversations": [{"from": "human", "value": "how many"}, checked.TALK[1]]
    },
  ]
  rows[1]["conversations"][2] = {"from": "human", "value": "and now"}
  assert checked.kinds(folder, rows) == [None, None, None]
  options = ["--template=plain"]
  assert checked.kinds(folder, rows, options=options) == [
    None,
    "schema",
    "schema",
  ]
  assert "template plain" in checked.bad(folder)[0]["why"]
  # Questions are asked in ChatML whatever the model was trained on.
  row = {"question": "how many", "answer": "one"}
  assert checked.kinds(folder, [row], options=options) == [None]
