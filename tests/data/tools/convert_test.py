import json
import os

import pytest

from pivot_jax.data.sources import (
  array_record,
  json_records,
  parquet,
)
from pivot_jax.data.tools import convert
from pivot_jax.errors import InputError
from tests.fixtures import published, published_parts


@pytest.fixture
def made(tmp_path):
  return published.make_llava_pretrain(tmp_path, rows=6)


def _run(made, folder, *options) -> int:
  return convert.main(
    [str(made.path), str(folder), f"--images={made.root}", *options]
  )


def _aside(tmp_path) -> list:
  return [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_a_file_becomes_a_folder_of_the_same_rows(made, tmp_path, capsys):
  folder = tmp_path / "set"
  assert _run(made, folder, "--shards=2") == 0
  assert capsys.readouterr().out == (
    f"{folder}: 6 conversation rows, 0.5 MiB; 0 skipped\n"
  )
  source = array_record.ArrayRecord(folder)
  assert source.kind == "conversation"
  published_parts.assert_reads(source, made)
  told = json.loads((folder / "dataset.json").read_text())
  assert told["origin"] == str(made.path)
  assert len(told["shards"]) == 2
  assert not _aside(tmp_path)
  # Readable for whoever may read the rest.
  assert folder.stat().st_mode == made.root.stat().st_mode


@pytest.mark.parametrize("name", ["MMBench_EN", "SEED-Bench", "MMMU"])
def test_parquet_becomes_the_same_rows(tmp_path, name):
  made = published.make_evaluation(tmp_path, name=name)
  source = parquet.Parquet(made.path)
  written = convert.convert(
    source, tmp_path / "set", kind=source.kind, origin="here"
  )
  assert written.rows == len(source)
  found = array_record.ArrayRecord(tmp_path / "set")
  published_parts.assert_reads(found, made)
  assert found.text(0) == source.text(0)


def test_shards_have_ten_thousand_rows_at_most(made, tmp_path, monkeypatch):
  source = json_records.LlavaJson(made.path, made.root)
  monkeypatch.setattr(convert, "ROWS", 4)
  convert.convert(source, tmp_path / "a", kind="conversation", origin="a")
  told = json.loads((tmp_path / "a" / "dataset.json").read_text())
  assert [shard["rows"] for shard in told["shards"]] == [3, 3]
  assert convert.ROWS == 4


def test_a_folder_that_exists_is_kept_unless_it_was_converted(made, tmp_path):
  folder = tmp_path / "set"
  assert _run(made, folder) == 0
  before = sorted(path.name for path in folder.iterdir())
  with pytest.raises(InputError, match="set: exists; give .* or --overwrite"):
    _run(made, folder)
  assert _run(made, folder, "--shards=3", "--overwrite") == 0
  after = sorted(path.name for path in folder.iterdir())
  assert before != after and len(after) == 7
  with pytest.raises(InputError, match="not a folder that convert wrote"):
    _run(made, made.root, "--overwrite")
  assert made.root.is_dir()


def test_a_failure_leaves_nothing_and_takes_nothing_away(made, tmp_path):
  folder = tmp_path / "set"
  assert _run(made, folder) == 0
  (made.root / "00000" / "000004051.jpg").write_bytes(b"cut")
  with pytest.raises(InputError, match="1 of 6 rows are bad.*json#1: image"):
    _run(made, folder, "--overwrite")
  assert len(array_record.ArrayRecord(folder)) == 6
  with pytest.raises(InputError, match="1 of 6 rows are bad"):
    _run(made, tmp_path / "other")
  assert not (tmp_path / "other").exists()
  assert not _aside(tmp_path)


def test_bad_rows_are_named_when_they_are_left_out(made, tmp_path, capsys):
  (made.root / "00000" / "000004051.jpg").unlink()
  assert _run(made, tmp_path / "set", "--max-bad=0.2") == 0
  out = capsys.readouterr().out.splitlines()
  assert out[0].startswith(f"skipped: {made.path}#1: image: ")
  assert out[1].endswith("; 1 skipped")
  assert len(array_record.ArrayRecord(tmp_path / "set")) == 5


def test_bad_lines_are_left_out_as_bad_rows_are(made, tmp_path, capsys):
  records = json.loads(made.path.read_text())
  lines = [json.dumps(record) for record in records]
  lines[2], lines[4] = "{broken", "[]"
  path = tmp_path / "captions.jsonl"
  path.write_text("".join(line + "\n" for line in lines))
  argv = [str(path), str(tmp_path / "set"), f"--images={made.root}"]
  with pytest.raises(InputError, match="captions.jsonl:3: invalid JSON"):
    convert.main(argv)
  with pytest.raises(InputError, match="2 of 6 rows are bad.*jsonl:3: invalid"):
    convert.main([*argv, "--max-bad=0.3"])
  assert convert.main([*argv, "--max-bad=0.4"]) == 0
  out = capsys.readouterr().out.splitlines()
  assert out[0].startswith(f"skipped: {path}:3: invalid JSON")
  assert out[1].startswith(f"skipped: {path}:5: a record must be a JSON obj")
  source = array_record.ArrayRecord(tmp_path / "set")
  kept = [made.rows[i]["id"] for i in (0, 1, 3, 5)]
  assert [source.text(i)["id"] for i in range(len(source))] == kept


def test_a_name_that_no_terminal_can_show_is_escaped(made, tmp_path, capsys):
  record = json.loads(made.path.read_text())[0]
  path = tmp_path / os.fsdecode(b"c\xff.jsonl")
  path.write_text(f"{json.dumps(record)}\n{{broken\n")
  argv = [str(path), str(tmp_path / "set"), f"--images={made.root}"]
  assert convert.main([*argv, "--max-bad=0.5"]) == 0
  assert "/c\\udcff.jsonl:2: invalid JSON" in capsys.readouterr().out
  argv[1] = str(tmp_path / os.fsdecode(b"s\xff"))
  with pytest.raises(InputError, match="the name is not UTF-8; give another"):
    convert.main([*argv, "--max-bad=0.5"])


def test_a_mixtures_files_are_where_it_is_said(tmp_path):
  made = published.make_llava_pretrain(tmp_path / "files", rows=3)
  mixture = tmp_path / "mixture.yaml"
  mixture.write_text(f"datasets: [{{json_path: {made.path.name}}}]\n")
  argv = [str(mixture), str(tmp_path / "set"), f"--images={made.root}"]
  with pytest.raises(InputError, match="1 of 1 files are not in"):
    convert.main(argv)
  assert convert.main([*argv, f"--root={made.path.parent}"]) == 0
  source = array_record.ArrayRecord(tmp_path / "set")
  assert [source.encoded(i) for i in range(3)] == [*map(tuple, made.files)]
  argv = [str(made.path), str(tmp_path / "b"), f"--root={made.path.parent}"]
  with pytest.raises(InputError, match=r"json: --root is for mixtures, \.yaml"):
    convert.main(argv)


@pytest.mark.parametrize("name", [".", "..", "/", "set/.."])
def test_a_folder_without_a_name_is_refused(made, tmp_path, monkeypatch, name):
  (tmp_path / "set").mkdir()
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match="has no name; give the one of a new fo"):
    _run(made, name, "--overwrite")
  source = json_records.LlavaJson(made.path, made.root)
  with pytest.raises(InputError, match="has no name"):
    convert.convert(
      source, name, kind="conversation", origin="a", overwrite=True
    )


def test_the_lists_of_mmpr_are_another_command(tmp_path):
  argv = ["meta.json", str(tmp_path / "out"), "--paper-files", "--size=3"]
  with pytest.raises(InputError, match="--paper-files: .* select-mmpr"):
    convert.main(argv)


def test_the_source_is_not_opened_for_a_folder_that_exists(tmp_path):
  with pytest.raises(InputError, match="exists; give another name"):
    convert.main([str(tmp_path / "none.json"), str(tmp_path)])
  with pytest.raises(InputError, match="none.json: no such file"):
    convert.main([str(tmp_path / "none.json"), str(tmp_path / "set")])


def test_a_place_that_cannot_be_written_is_named(made):
  with pytest.raises(InputError, match="json/set: cannot be written"):
    _run(made, made.path / "set")
