"""Ids of parquet rows: numbered where they occur again, and little is held."""

import collections
import pickle

import numpy as np
import pyarrow
import pytest
import tqdm
from pyarrow import parquet as arrow_parquet

from pivot_jax.data.sources import parquet, parquet_files
from pivot_jax.errors import InputError

PAIR = {"question": "<image>\nWhat?", "chosen": "yes", "rejected": "no"}


def _write(path, *records, row_group_size=2):
  table = pyarrow.Table.from_pylist(list(records))
  arrow_parquet.write_table(table, path, row_group_size=row_group_size)
  return path


def test_repeated_ids_are_numbered(tmp_path):
  ids = ["a", "b", None, "a", "a#2", "a", None, "b"]
  for number in range(2):
    part = ids[4 * number : 4 * number + 4]
    _write(
      tmp_path / f"train-{number:05d}-of-00002.parquet",
      *({"id": i, **PAIR} for i in part),
    )
  source = parquet.Parquet(tmp_path)
  assert [source.text(i)["id"] for i in range(8)] == [
    "a", "b", "train-00000-of-00002-2", "a#3",
    "a#2", "a#4", "train-00001-of-00002-2", "b#2",
  ]  # fmt: skip
  assert source.name(5) == f"{tmp_path}/train-00001-of-00002.parquet:1"


def test_ids_are_counted_as_one_by_one_would(tmp_path, monkeypatch):
  """Of many ids, some missing, some like those that are made."""
  monkeypatch.setattr(parquet_files, "_SLICE", 7)
  rng = np.random.default_rng(0)
  some = [*"abc", None, "a#2", "a#2#2", "b#3", "c#02", "t-1", "t-3#2"]
  ids = [some[k] for k in rng.integers(0, len(some), 200)]
  path = _write(
    tmp_path / "t.parquet",
    *({"id": i, **PAIR} for i in ids),
    row_group_size=30,
  )
  given = [f"t-{row}" if one is None else one for row, one in enumerate(ids)]
  expected, uses = [], collections.Counter()
  for one in given:
    uses[one] += 1
    name = one
    while name in given and uses[one] > 1:
      name = f"{one}#{uses[one]}"
      uses[one] += name in given
    expected.append(name)
  source = parquet.Parquet(path)
  assert [source.text(i)["id"] for i in range(200)] == expected
  assert len(set(expected)) == 200


def test_one_number_a_row_is_held_and_goes_to_other_processes(
  tmp_path, monkeypatch
):
  path = _write(
    tmp_path / "a.parquet", *({"id": f"{i % 50}", **PAIR} for i in range(100))
  )
  source = parquet.Parquet(path)
  sent = pickle.dumps(source)
  assert source._uses.dtype == np.int32 and source._uses.shape == (100,)
  monkeypatch.setattr(parquet_files, "uses", None)  # Nothing counts again.
  copy = pickle.loads(sent)
  assert copy.text(1)["id"] == "1" and copy.text(51)["id"] == "1#2"
  nameless = pickle.loads(
    pickle.dumps(parquet.Parquet(_write(tmp_path / "b.parquet", PAIR)))
  )
  assert nameless.text(0)["id"] == "b-0"


def test_a_bar_shows_that_many_ids_are_read(tmp_path, monkeypatch):
  shown, real = [], tqdm.tqdm

  def bar(**given):
    shown.append((given["total"], given["disable"]))
    return real(disable=True)

  monkeypatch.setattr(parquet_files.tqdm, "tqdm", bar)
  monkeypatch.setattr(parquet_files, "LARGE", 3)
  for count in (2, 3):
    rows = [{"id": str(i), **PAIR} for i in range(count)]
    parquet.Parquet(_write(tmp_path / "a.parquet", *rows)).text(0)
  # None: unless the output is no terminal.
  assert shown == [(2, True), (3, None)]


def test_rows_whose_ids_cannot_be_read_are_named_when_they_are(tmp_path):
  rows = [{"id": "a", **PAIR} for _ in range(4)]
  path = _write(tmp_path / "a.parquet", *rows)
  chunk = arrow_parquet.read_metadata(path).row_group(0).column(0)
  data = bytearray(path.read_bytes())
  begin = chunk.dictionary_page_offset or chunk.data_page_offset
  data[begin : begin + chunk.total_compressed_size] = bytes(
    chunk.total_compressed_size
  )
  path.write_bytes(data)
  source = parquet.Parquet(path)
  assert [source.text(i)["id"] for i in (2, 3)] == ["a", "a#2"]
  with pytest.raises(InputError, match="a.parquet:1: parquet that cannot be"):
    source.text(1)


def test_numbers_are_ids_and_other_values_are_refused(tmp_path):
  path = _write(tmp_path / "a.parquet", {"id": 7, **PAIR}, {"id": 7, **PAIR})
  source = parquet.Parquet(path)
  assert [source.text(i)["id"] for i in range(2)] == ["7", "7#2"]
  path = _write(tmp_path / "a.parquet", {"id": 7.5, **PAIR})
  with pytest.raises(InputError, match="a.parquet:0: id: must be text"):
    parquet.Parquet(path).text(0)
  path = _write(tmp_path / "a.parquet", {"id": [7], **PAIR})
  with pytest.raises(InputError, match=r"a.parquet:0: id: must be .*\[7\]"):
    parquet.Parquet(path).text(0)
