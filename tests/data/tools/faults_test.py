"""The checker counts, draws and says faults, and refuses wrong options."""

import ast
import collections
import io
import pathlib
import shutil

import pytest
from PIL import Image

from pivot_jax.data.tools import check, check_rows, faults
from pivot_jax.errors import InputError
from tests.data.tools import checked

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  return checked.pictures(tmp_path)


def test_the_report_counts_rows_images_and_sizes(folder):
  rows = [
    checked.PAIR,
    checked.PAIR
    | {"id": "q", "image": checked.TWO, "question": checked.TWO_ASKED},
    checked.PAIR | {"id": "r", "image": "none.png"},
    checked.PAIR | {"id": "s", "chosen": ""},
  ]
  checked.kinds(folder, rows)
  report = checked.report(folder)
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
  found = faults.lengths(counts)
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
  assert faults.lengths(collections.Counter()) is None


def test_the_last_bar_has_the_few_rows_that_are_much_longer():
  found = faults.lengths(collections.Counter({8: 9999, 900: 1}))
  assert found is not None
  assert found["histogram"] == [{"from": 8, "to": 900, "rows": 10000}]


def test_pictures_of_folders_are_looked_at(folder):
  for split in ("train", "val"):
    for name in "xy":
      (folder / "classes" / split / name).mkdir(parents=True)
      shutil.copy(
        folder / "images" / "b.jpg", folder / "classes" / split / name
      )
  shutil.copy(folder / "images" / "cut.jpg", folder / "classes" / "val" / "x")
  train, val = folder / "classes" / "train", folder / "classes" / "val"
  assert check.main([str(train), f"--out={folder / 'out'}"]) == 0
  assert check.main([str(val), f"--out={folder / 'out'}"]) == 1
  [fault] = checked.bad(folder)
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
    check.main([*given, "--out=out"] if "--out" not in given[-1] else given)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "option", ["--max-bad=2", "--max-bad=nan", "--workers=-2", "--patches=0"]
)
def test_numbers_out_of_range_are_refused(option, capsys):
  with pytest.raises(SystemExit) as stop:
    check.main(["rows.jsonl", option])
  assert stop.value.code == 2
  assert "give" in capsys.readouterr().err


def test_what_was_written_before_stays_if_nothing_can_be_checked(folder):
  path = checked.lines(folder / "rows.jsonl", [checked.PAIR | {"chosen": ""}])
  checked.check(folder, path)
  before = (folder / "out" / "bad.jsonl").read_bytes()
  with pytest.raises(InputError):
    checked.check(folder, path, folder / "absent.jsonl")
  assert (folder / "out" / "bad.jsonl").read_bytes() == before
  assert len(list((folder / "out").iterdir())) == 2


@pytest.mark.parametrize("suffix", ["PNG", "GIF", "WEBP"])
def test_a_header_says_the_size_of_a_picture(suffix):
  data = io.BytesIO()
  # WebP keeps the size in such a header for pictures with alpha.
  Image.new("RGBA", (300, 70), (1, 2, 3, 4)).save(data, suffix)
  assert check_rows.claimed(data.getvalue()) == (300, 70)
  assert check_rows.claimed(data.getvalue()[:8]) == (0, 0)


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
  assert raised <= set(faults.KINDS)
  assert len(raised) >= 12
