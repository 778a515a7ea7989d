import ast
import collections
import io
import json
import pathlib
import shutil
import struct
import zlib

import pytest
from PIL import Image

from pivot_jax.data import (
  checking,
  checking_report,
  checking_rows,
  checking_work,
  registry,
)
from pivot_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
PAIR = {
  "id": "p",
  "image": "a.png",
  "question": "<image>\nhow many",
  "chosen": "one",
  "rejected": "two",
}
TALK = [
  {"from": "human", "value": "<image>\nhow many"},
  {"from": "gpt", "value": "one"},
]
TWO = ["a.png", "b.jpg"]
TWO_ASKED = "<image><image> which"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  """Returns a folder of pictures, good and bad."""
  root = tmp_path / "images"
  (root / "inside").mkdir(parents=True)
  Image.new("RGB", (6, 4)).save(root / "a.png")
  picture = Image.effect_noise((50, 40), 60)
  picture.save(root / "b.jpg")
  cut = (root / "b.jpg").read_bytes()[:400]
  (root / "cut.jpg").write_bytes(cut)
  (root / "empty.png").write_bytes(b"")
  (root / "page.png").write_text("<html></html>")
  (root / "large.png").write_bytes(_png(10_000, 10_000, b"\0" * 10))
  (root / "header.png").write_bytes(_png(10_000, 10_000, None))
  Image.new("RGB", (6, 4)).save(tmp_path / "out.png")
  (root / "link.png").symlink_to(tmp_path / "out.png")
  return tmp_path


def _png(width: int, height: int, pixels: bytes | None) -> bytes:
  def chunk(name, data):
    crc = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + crc

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  found = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
  if pixels is None:
    return found
  return found + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def _lines(path: pathlib.Path, rows) -> pathlib.Path:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _check(folder: pathlib.Path, *paths, options=()) -> int:
  given = [f"--images={folder / 'images'}", "--tokenizer=package:toy"]
  names = [str(path) for path in paths]
  return checking.main([*names, *given, f"--out={folder / 'out'}", *options])


def _bad(folder: pathlib.Path) -> list[dict]:
  text = (folder / "out" / "bad.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def _report(folder: pathlib.Path) -> dict:
  return json.loads((folder / "out" / "check.json").read_text())


def _kinds(folder: pathlib.Path, rows, *, options=()) -> list[str | None]:
  """Returns the kind of fault of each row, None of a good one."""
  path = _lines(folder / "rows.jsonl", rows)
  _check(folder, path, options=options)
  kinds: list[str | None] = [None] * len(rows)
  for fault in _bad(folder):
    assert fault["file"] == str(path)
    assert fault["name"] == f"{path}:{fault['row'] + 1}"
    assert fault["remedy"] == checking_report.KINDS[fault["kind"]].remedy
    assert kinds[fault["row"]] is None
    kinds[fault["row"]] = fault["kind"]
  return kinds


PAIRS = (
  (None, {}),
  (None, {"image": None, "question": "how many"}),
  (None, {"question": "how many"}),
  (None, {"image": TWO, "question": TWO_ASKED}),
  (None, {"image": ["a.png"]}),
  (None, {"chosen": "two", "rejected": "Two"}),
  ("schema", {"chosen": 1}),
  ("schema", {"image": 1}),
  ("schema", {"image": ["a.png", None]}),
  ("schema", {"id": 1.5}),
  ("missing_image", {"image": "none.png"}),
  ("missing_image", {"image": "inside"}),
  ("missing_image", {"image": ""}),
  ("missing_image", {"image": ["a.png", "no.png"], "question": TWO_ASKED}),
  ("undecodable_image", {"image": "empty.png"}),
  ("undecodable_image", {"image": "page.png"}),
  ("undecodable_image", {"image": "cut.jpg"}),
  ("undecodable_image", {"image": ["a.png", "cut.jpg"], "question": TWO_ASKED}),
  ("too_many_pixels", {"image": "large.png"}),
  ("too_many_pixels", {"image": "header.png"}),
  ("outside_root", {"image": "../out.png"}),
  ("outside_root", {"image": "/a.png"}),
  ("outside_root", {"image": "https://host/a.png"}),
  ("outside_root", {"image": "link.png"}),
  ("placeholders", {"image": None}),
  ("placeholders", {"question": TWO_ASKED}),
  ("placeholders", {"image": TWO}),
  ("placeholders", {"image": TWO, "question": "which"}),
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
    PAIR | {"id": f"p{i}"} | change for i, (_, change) in enumerate(PAIRS)
  ]
  assert _kinds(folder, rows) == [kind for kind, _ in PAIRS]


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
  assert _kinds(folder, rows) == [kind for kind, _ in CONVERSATIONS]


def test_answers_of_an_evaluation_are_looked_at(folder):
  row = {"image": "a.png", "question": "how many", "answer": "one"}
  changes = ({}, {"answer": " "}, {"answer": "<|im_end|>"}, {"kind": 3})
  assert _kinds(folder, [row | change for change in changes]) == [
    None,
    "empty_answer",
    "special_token",
    "schema",
  ]


def test_a_later_use_of_an_id_is_noted_in_one_file_only(folder, capsys):
  one = _lines(folder / "one.jsonl", [PAIR, PAIR, PAIR | {"id": "q"}, PAIR])
  other = _lines(folder / "other.jsonl", [PAIR])
  assert _check(folder, one, other) == 0
  found = [(f["name"], f["id"], f["kind"], f["drop"]) for f in _bad(folder)]
  assert found == [
    (f"{one}:2", "p", "duplicate_id", False),
    (f"{one}:4", "p", "duplicate_id", False),
  ]
  report = _report(folder)
  assert (report["bad_rows"], report["bad"]) == (0, {})
  assert report["files"][0]["notes"] == {"duplicate_id": 2}
  assert "2 duplicate_id: none of them bad" in capsys.readouterr().out


def test_a_later_use_of_an_id_is_a_fault_of_an_evaluation(folder):
  row = {"id": "e", "image": "a.png", "question": "how many", "answer": "one"}
  path = _lines(folder / "rows.jsonl", [row, row])
  assert _check(folder, path) == 1
  assert [(f["kind"], f["drop"]) for f in _bad(folder)] == [
    ("duplicate_id", True)
  ]
  assert _report(folder)["bad"] == {"duplicate_id": 1}


def test_lines_that_are_no_records_are_found(folder):
  path = folder / "rows.jsonl"
  good = json.dumps(PAIR).encode()
  path.write_bytes(
    b"\n".join([good, b"{", b"[1]", b'{"a": "\xff"}', b"", b"{}{}", b""])
  )
  assert _check(folder, path) == 1
  assert [(f["row"], f["kind"], f["id"]) for f in _bad(folder)] == [
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
    (json.dumps([PAIR]).encode("utf-16"), "bad_utf8"),
  ],
)
def test_a_file_that_cannot_be_read_is_one_fault(folder, content, kind):
  path = folder / "rows.json"
  path.write_bytes(content)
  good = _lines(folder / "good.jsonl", [PAIR])
  assert _check(folder, path, good, options=["--max-bad=0.9"]) == 1
  [fault] = _bad(folder)
  assert (fault["file"], fault["row"], fault["kind"]) == (str(path), None, kind)
  assert _report(folder)["rows"] == 1


def test_rows_of_a_list_are_named_by_their_index(folder):
  path = folder / "rows.json"
  path.write_text("\ufeff" + json.dumps([PAIR, 1, PAIR | {"chosen": ""}]))
  assert _check(folder, path) == 1
  assert [(f["name"], f["row"], f["kind"]) for f in _bad(folder)] == [
    (f"{path}#1", 1, "schema"),
    (f"{path}#2", 2, "empty_answer"),
  ]


def test_a_file_whose_kind_shows_nowhere_has_a_fault_in_each_row(folder):
  path = folder / "rows.jsonl"
  path.write_text('{"text": "a"}\n{"text": \n')
  assert _check(folder, path) == 1
  kinds = [fault["kind"] for fault in _bad(folder)]
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
  good = _lines(folder / "good.jsonl", [PAIR])
  assert _check(folder, path, good) == 1
  [fault] = _bad(folder)
  assert (fault["file"], fault["row"], fault["drop"]) == (str(path), None, True)
  assert fault["kind"] == "unreadable"
  assert fault["why"].startswith(why)
  report = _report(folder)
  assert (report["rows"], report["bad_rows"]) == (1, 0)
  assert f"{path}: cannot be read" in capsys.readouterr().out


def test_a_folder_without_a_set_is_one_fault(folder):
  good = _lines(folder / "good.jsonl", [PAIR])
  assert _check(folder, folder / "images", good) == 1
  [fault] = _bad(folder)
  assert (fault["file"], fault["kind"]) == (
    str(folder / "images"),
    "unreadable",
  )


def test_workers_change_nothing(folder, monkeypatch):
  monkeypatch.setattr(checking_work, "_CHUNK", 7)
  rows = [PAIR | {"id": f"p{i}"} | c for i, (_, c) in enumerate(PAIRS)]
  paths = [
    _lines(folder / "one.jsonl", rows),
    _lines(folder / "two.jsonl", [row for _, row in CONVERSATIONS]),
  ]
  written = []
  for workers in (0, 1, 2):
    assert _check(folder, *paths, options=[f"--workers={workers}"]) == 1
    written.append([p.read_bytes() for p in sorted((folder / "out").iterdir())])
  assert len(written[0]) == 2
  assert written[1] == written[0]
  assert written[2] == written[0]


def test_real_data_is_clean(test_data, tmp_path):
  files = sorted((test_data / "nlvr").glob("*.json*"))
  assert len(files) == 4
  given = [*map(str, files), f"--images={test_data / 'nlvr' / 'images'}"]
  assert checking.main([*given, f"--out={tmp_path}"]) == 0
  assert (tmp_path / "bad.jsonl").read_text() == ""
  report = json.loads((tmp_path / "check.json").read_text())
  assert [file["rows"] for file in report["files"]] == [400, 400, 1000, 1000]
  assert report["files"][0]["image_sizes"] == [
    {"width": 400, "height": 100, "images": 400}
  ]


def test_a_source_leaves_out_the_rows_that_are_listed_as_bad(folder):
  rows = [PAIR | {"id": f"p{i}"} for i in (0, 1, 2, 3, 3)]
  rows[1]["image"], rows[2]["chosen"] = "none.png", ""
  path = _lines(folder / "rows.jsonl", rows)
  _check(folder, path)
  assert [f["row"] for f in _bad(folder)] == [1, 2, 4]
  source = registry.open_source(
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
  rows = [PAIR | {"id": f"p{i}"} for i in range(4)]
  rows[3]["chosen"] = ""
  path = _lines(folder / "rows.jsonl", rows)
  assert _check(folder, path, options=["--max-bad=0.25"]) == 0
  assert _check(folder, path, options=["--max-bad=0.24"]) == 1
  said = capsys.readouterr().out
  assert "1 empty_answer: write the answer, or leave the row out\n" in said
  assert f"as {path}:4: chosen: an answer is empty" in said


def test_images_are_in_place_without_decoding_them(folder):
  rows = [
    PAIR | {"id": name, "image": name}
    for name in ("a.png", "cut.jpg", "none.png", "link.png")
  ]
  assert _kinds(folder, rows, options=["--no-decode"]) == [
    None,
    None,
    "missing_image",
    "outside_root",
  ]


def test_lengths_count_images_and_the_longer_answer(folder):
  rows = [PAIR, PAIR | {"id": "q", "rejected": "two two"}]
  found = []
  for patches in (10, 11):
    path = _lines(folder / "rows.jsonl", rows)
    assert _check(folder, path, options=[f"--patches={patches}"]) == 0
    [file] = _report(folder)["files"]
    found.append(file["tokens"])
  assert [found[1][k] - found[0][k] for k in ("min", "max")] == [1, 1]
  assert found[0]["max"] > found[0]["min"]
  longest = found[0]["max"]
  options = ["--patches=10", f"--max-length={longest}"]
  assert _kinds(folder, rows, options=options) == [None, None]
  options[1] = f"--max-length={longest - 1}"
  assert _kinds(folder, rows, options=options) == [None, "too_long"]
  options[1] = "--max-length=0"
  assert _kinds(folder, rows, options=options) == [None, None]


def test_without_its_tokenizer_no_row_is_too_long(folder, capsys):
  path = _lines(folder / "rows.jsonl", [PAIR | {"chosen": "two " * 2100}])
  given = [str(path), f"--images={folder / 'images'}", f"--out={folder}/out"]
  assert checking.main(given) == 0
  assert _bad(folder) == []
  assert "no row is judged too_long: give --tokenizer" in (
    capsys.readouterr().out
  )
  report = _report(folder)
  assert report["files"][0]["tokens"]["max"] > checking.MAX_LENGTH
  assert not report["settings"]["too_long_is_judged"]
  with pytest.raises(InputError, match="--max-length=9: give --tokenizer"):
    checking.main([*given, "--max-length=9"])
  assert checking.main([*given, "--tokenizer=package:toy"]) == 1
  assert [fault["kind"] for fault in _bad(folder)] == ["too_long"]
  assert "too_long: give" not in capsys.readouterr().out


def test_files_are_read_by_the_template_that_is_given(folder):
  rows = [
    {"image": "a.png", "conversations": TALK},
    {"image": "a.png", "conversations": [*TALK, *TALK]},
    {"conversations": [{"from": "human", "value": "how many"}, TALK[1]]},
  ]
  rows[1]["conversations"][2] = {"from": "human", "value": "and now"}
  assert _kinds(folder, rows) == [None, None, None]
  options = ["--template=plain"]
  assert _kinds(folder, rows, options=options) == [None, "schema", "schema"]
  assert "template plain" in _bad(folder)[0]["why"]
  # Questions are asked in ChatML whatever the model was trained on.
  row = {"question": "how many", "answer": "one"}
  assert _kinds(folder, [row], options=options) == [None]


def test_the_report_counts_rows_images_and_sizes(folder):
  rows = [
    PAIR,
    PAIR | {"id": "q", "image": TWO, "question": TWO_ASKED},
    PAIR | {"id": "r", "image": "none.png"},
    PAIR | {"id": "s", "chosen": ""},
  ]
  _kinds(folder, rows)
  report = _report(folder)
  [file] = report["files"]
  assert (report["rows"], report["bad_rows"]) == (4, 2)
  assert (file["rows"], file["good"], file["images"]) == (4, 2, 3)
  assert file["bad"] == {"missing_image": 1, "empty_answer": 1}
  assert file["image_sizes"] == [
    {"width": 6, "height": 4, "images": 2},
    {"width": 50, "height": 40, "images": 1},
  ]


def test_quantiles_and_bars_are_those_counted_by_hand():
  counts = collections.Counter({10: 50, 20: 49, 1000: 1})
  found = checking_report.lengths(counts)
  assert found is not None
  assert (found["rows"], found["total"], found["mean"]) == (100, 2480, 24.8)
  assert found["quantiles"] == {
    "0.01": 10,
    "0.05": 10,
    "0.25": 10,
    "0.5": 10,
    "0.75": 20,
    "0.9": 20,
    "0.95": 20,
    "0.99": 20,
    "0.999": 1000,
  }
  bars = [bar for bar in found["histogram"] if bar["rows"]]
  assert bars == [
    {"from": 0, "to": 63, "rows": 99},
    {"from": 960, "to": 1023, "rows": 1},
  ]
  assert checking_report.lengths(collections.Counter()) is None


def test_the_last_bar_has_the_few_rows_that_are_much_longer():
  found = checking_report.lengths(collections.Counter({8: 9999, 900: 1}))
  assert found is not None
  assert found["histogram"] == [{"from": 8, "to": 900, "rows": 10000}]


def test_pictures_of_folders_are_looked_at(folder):
  for split in ("train", "val"):
    (folder / "classes" / split / "x").mkdir(parents=True)
    shutil.copy(folder / "images" / "b.jpg", folder / "classes" / split / "x")
  shutil.copy(folder / "images" / "cut.jpg", folder / "classes" / "val" / "x")
  train, val = folder / "classes" / "train", folder / "classes" / "val"
  assert checking.main([str(train), f"--out={folder / 'out'}"]) == 0
  assert checking.main([str(val), f"--out={folder / 'out'}"]) == 1
  [fault] = _bad(folder)
  assert (fault["file"], fault["row"]) == (str(val), 1)
  assert (fault["id"], fault["kind"]) == ("x/cut.jpg", "undecodable_image")


@pytest.mark.parametrize(
  "given, said",
  [
    (["absent.jsonl"], "absent.jsonl: no such file"),
    (["none-*"], "none-\\*: no file is called so"),
    (["notes.txt", "--other=1"], "--other=1: unknown"),
    (["notes.txt", "--config.seed=1"], "--config.seed=1: unknown"),
    (["notes.txt", "--images=absent"], "--images=absent: no such folder"),
    (["out/bad.jsonl"], "out/bad.jsonl: is what this command writes"),
    (["notes.txt", "--tokenizer=images"], "images: holds no tokenizer"),
    (["notes.txt", "--out=notes.txt/x"], "--out=notes.txt/x: Not a directory"),
  ],
)
def test_what_cannot_be_checked_is_said_in_a_line(
  folder, monkeypatch, given, said
):
  monkeypatch.chdir(folder)
  pathlib.Path("notes.txt").write_text("text")
  with pytest.raises(InputError, match=said) as error:
    checking.main([*given, "--out=out"] if "--out" not in given[-1] else given)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "option", ["--max-bad=2", "--max-bad=nan", "--workers=-2", "--patches=0"]
)
def test_numbers_out_of_range_are_refused(option, capsys):
  with pytest.raises(SystemExit) as stop:
    checking.main(["rows.jsonl", option])
  assert stop.value.code == 2
  assert "give" in capsys.readouterr().err


def test_what_was_written_before_stays_if_nothing_can_be_checked(folder):
  path = _lines(folder / "rows.jsonl", [PAIR | {"chosen": ""}])
  _check(folder, path)
  before = (folder / "out" / "bad.jsonl").read_bytes()
  with pytest.raises(InputError):
    _check(folder, path, folder / "absent.jsonl")
  assert (folder / "out" / "bad.jsonl").read_bytes() == before
  assert len(list((folder / "out").iterdir())) == 2


@pytest.mark.parametrize("suffix", ["PNG", "GIF", "WEBP"])
def test_a_header_says_the_size_of_a_picture(suffix):
  data = io.BytesIO()
  # WebP keeps the size in such a header for pictures with alpha.
  Image.new("RGBA", (300, 70), (1, 2, 3, 4)).save(data, suffix)
  assert checking_rows.claimed(data.getvalue()) == (300, 70)
  assert checking_rows.claimed(data.getvalue()[:8]) == (0, 0)


def test_every_kind_that_is_raised_is_in_the_vocabulary():
  raised = set()
  for path in (ROOT / "pivot_jax").glob("**/*.py"):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
      named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
      if not named or node.func.id != "InputError":
        continue
      raised |= {
        part.value
        for keyword in node.keywords
        for part in ast.walk(keyword.value)
        if isinstance(part, ast.Constant)
      }
  assert raised <= set(checking_report.KINDS)
  assert len(raised) >= 12
