"""An index in the cache proves itself, or is made again."""

import json
import os

import numpy as np
import pytest

from pivot_jax.data.sources import json_index
from pivot_jax.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("PIVOT_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(json_index, "CACHED", 10)


def made(tmp_path, suffix):
  """Return a file of 50 rows that was indexed, and its table."""
  path = tmp_path / f"r.{suffix}"
  rows = [{"id": f"row{i}"} for i in range(50)]
  if suffix == "json":
    path.write_text(json.dumps(rows) + "\n")
  else:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + " \n")
  json_index.File(path)
  (table,) = (tmp_path / "cache" / "index").glob("*.npy")
  return path, table


def ids(path):
  found = json_index.File(path)
  return [found.record(i)["id"] for i in range(len(found))]


def certify(table):
  """Give a table a CRC that is its own, as somebody who forges would."""
  beside = table.with_suffix(".json")
  crc = json_index._crc(np.load(table), ())
  beside.write_text(json.dumps({"crc": crc, "flaws": []}))


def short(table):
  np.save(table, np.load(table)[:, :5])


def swapped(table):
  found = np.load(table)
  found[:2, 10] = found[:2, 40]
  np.save(table, found)


def beyond(table):
  found = np.load(table)
  found[1, -1] = 10**12
  np.save(table, found)


def missing_first(table):
  np.save(table, np.load(table)[:, 1:])


def emptied(table):
  np.save(table, np.load(table)[:, :0])


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("change", [
  short, swapped, beyond, missing_first, emptied,
])  # fmt: skip
def test_places_that_are_no_order_of_the_file_are_made_again(
  tmp_path, caplog, suffix, change
):
  path, table = made(tmp_path, suffix)
  change(table)
  certify(table)
  assert ids(path) == [f"row{i}" for i in range(50)]
  assert str(table) in caplog.text
  caplog.clear()
  assert len(json_index.File(path)) == 50
  assert not caplog.text


def flip(table):
  # The use of an id alone, which no place shows.
  found = np.load(table)
  found[2, 7] = 3
  np.save(table, found)


def old(table):
  # As it was before tables had a CRC.
  table.with_suffix(".json").write_text("[]")


def of_floats(table):
  np.save(table, np.load(table).astype(float))


def fifo(table):
  table.unlink()
  os.mkfifo(table)


@pytest.mark.parametrize("change", [
  flip, old, of_floats, fifo,
  lambda table: table.write_bytes(b""),
  lambda table: table.write_bytes(table.read_bytes()[:-9]),
  lambda table: table.write_bytes(b"PK\3\4" + bytes(99)),
  lambda table: np.save(table, np.array([{}], object), allow_pickle=True),
  lambda table: table.with_suffix(".json").unlink(),
  lambda table: table.with_suffix(".json").write_text('{"crc": 1'),
  lambda table: table.with_suffix(".json").write_text('{"flaws": [[]]}'),
])  # fmt: skip
def test_a_table_that_is_no_whole_one_is_made_again(tmp_path, caplog, change):
  path, table = made(tmp_path, "jsonl")
  change(table)
  found = json_index.File(path)
  assert [found.id(found.record(i), i) for i in (0, 7)] == ["row0", "row7"]
  assert str(table) in caplog.text
  caplog.clear()
  json_index.File(path)
  assert not caplog.text


def test_a_list_of_no_records_is_kept(tmp_path, caplog):
  path = tmp_path / "r.json"
  path.write_text(f"\ufeff[{' ' * 50}]\n")
  assert len(json_index.File(path)) == len(json_index.File(path)) == 0
  assert not caplog.text


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("PIVOT_JAX_CACHE", str(tmp_path / "file"))
  path = tmp_path / "r.jsonl"
  path.write_text('{"id": "1"}\n')
  with pytest.raises(InputError, match="PIVOT_JAX_CACHE"):
    json_index.File(path)


def test_a_line_over_the_limit_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(json_index, "LONGEST", 30)
  path = tmp_path / "r.jsonl"
  path.write_text('{"id": "1"}\n{"id": "' + "x" * 40 + '"}\n')
  with pytest.raises(InputError, match=r"r.jsonl:2: .*more than 30 bytes"):
    json_index.File(path)
  path = tmp_path / "r.json"
  path.write_text('[{"id": "1"},\n{"id": "' + "x" * 40 + '"}]\n')
  with pytest.raises(InputError, match=r"r.json:2: .*more than 30 bytes"):
    json_index.File(path)


def test_a_file_of_flaws_alone_is_broken(tmp_path, monkeypatch):
  monkeypatch.setattr(json_index, "FLAWS", 20)
  path = tmp_path / "r.jsonl"
  path.write_text("{}\n" + "\n" * 30)
  assert len(json_index.File(path)) == 1  # Blank lines at the end.
  path.write_text("{}\n" + "\n" * 30 + "{}\n")
  with pytest.raises(InputError, match="more than 20 .*the first is 2"):
    json_index.File(path)
