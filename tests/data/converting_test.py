import json

import pytest

from pivot_jax.data import array_records, converting, parquet, sources
from pivot_jax.errors import InputError
from tests.data import published, published_parts


@pytest.fixture
def made(tmp_path):
  return published.make_llava_pretrain(tmp_path, rows=6)


def _run(made, folder, *options) -> int:
  return converting.main(
    [str(made.path), str(folder), f"--images={made.root}", *options]
  )


def _hidden(tmp_path) -> list:
  return [path for path in tmp_path.iterdir() if path.name[0] == "."]


def test_a_file_becomes_a_folder_of_the_same_rows(made, tmp_path, capsys):
  folder = tmp_path / "set"
  assert _run(made, folder, "--shards=2") == 0
  assert capsys.readouterr().out == (
    f"{folder}: 6 conversation rows, 0.5 MiB; 0 left out\n"
  )
  source = array_records.ArrayRecord(folder)
  assert source.kind == "conversation"
  published_parts.assert_reads(source, made)
  told = json.loads((folder / "dataset.json").read_text())
  assert told["origin"] == str(made.path)
  assert len(told["shards"]) == 2
  assert not _hidden(tmp_path)
  # Readable for whoever may read the rest.
  assert folder.stat().st_mode == made.root.stat().st_mode


@pytest.mark.parametrize("name", ["MMBench_EN", "SEED-Bench", "MMMU"])
def test_parquet_becomes_the_same_rows(tmp_path, name):
  made = published.make_evaluation(tmp_path, name=name)
  source = parquet.Parquet(made.path)
  written = converting.convert(
    source, tmp_path / "set", kind=source.kind, origin="here"
  )
  assert written.rows == len(source)
  found = array_records.ArrayRecord(tmp_path / "set")
  published_parts.assert_reads(found, made)
  assert found.text(0) == source.text(0)


def test_shards_have_ten_thousand_rows_at_most(made, tmp_path, monkeypatch):
  source = sources.LlavaJson(made.path, made.root)
  monkeypatch.setattr(converting, "ROWS", 4)
  converting.convert(source, tmp_path / "a", kind="conversation", origin="a")
  told = json.loads((tmp_path / "a" / "dataset.json").read_text())
  assert [shard["rows"] for shard in told["shards"]] == [3, 3]
  assert converting.ROWS == 4


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
  assert len(array_records.ArrayRecord(folder)) == 6
  with pytest.raises(InputError, match="1 of 6 rows are bad"):
    _run(made, tmp_path / "other")
  assert not (tmp_path / "other").exists()
  assert not _hidden(tmp_path)


def test_bad_rows_are_named_when_they_are_left_out(made, tmp_path, capsys):
  (made.root / "00000" / "000004051.jpg").unlink()
  assert _run(made, tmp_path / "set", "--max-bad=0.2") == 0
  out = capsys.readouterr().out.splitlines()
  assert out[0].startswith(f"left out: {made.path}#1: image: ")
  assert out[1].endswith("; 1 left out")
  assert len(array_records.ArrayRecord(tmp_path / "set")) == 5


def test_the_source_is_not_opened_for_a_folder_that_exists(tmp_path):
  with pytest.raises(InputError, match="exists; give another name"):
    converting.main([str(tmp_path / "none.json"), str(tmp_path)])
  with pytest.raises(InputError, match="none.json: no such file"):
    converting.main([str(tmp_path / "none.json"), str(tmp_path / "set")])


def test_a_place_that_cannot_be_written_is_named(made):
  with pytest.raises(
    InputError, match="json/set: cannot be written: .*Not a d"
  ):
    _run(made, made.path / "set")
