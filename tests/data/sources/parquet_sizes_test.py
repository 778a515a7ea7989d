"""A row group is bounded by what it decodes to, and good ones are read."""

import os

import pytest

from pivot_jax.data.sources import parquet, parquet_files, parquet_sizes
from pivot_jax.errors import InputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LONG = "x" * 1000


def write(path, columns, **how):
  pq.write_table(pa.table(columns), path, store_schema=False, **how)
  return parquet_files.Files(path)


def read(found, *names):
  return found.read_group(0, [parquet_files.Column(*name) for name in names])


@pytest.mark.parametrize("column, name", [
  ([LONG] * 900, ("a",)),
  ([[LONG] * 300] * 3, ("a",)),
  ([[{"answer": LONG}]] * 900, ("a", "answer")),
  ([{"bytes": LONG.encode(), "path": "x"}] * 900, ("a",)),
  ([[{"bytes": LONG.encode(), "path": "x"}] * 9] * 100, ("a",)),
])  # fmt: skip
def test_a_dictionary_is_counted_by_its_values(
  tmp_path, monkeypatch, column, name
):
  found = write(tmp_path / "r.parquet", {"a": column})
  whole = read(found, name)
  monkeypatch.setattr(parquet_sizes, "LARGEST", 800_000)
  found = parquet_files.Files(tmp_path / "r.parquet")
  with pytest.raises(InputError, match="a.*: row group 0 takes 9..... bytes"):
    read(found, name)
  # As many values are counted and found to be few bytes.
  monkeypatch.setattr(parquet_sizes, "LARGEST", 1_000_000)
  assert read(found, name).equals(whole)


def test_a_fair_share_of_the_disk_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(parquet_sizes, "LARGEST", 1000)
  pictures = [{"bytes": os.urandom(5000), "path": None} for _ in range(20)]
  found = write(tmp_path / "r.parquet", {"image": pictures})
  assert read(found, ("image",)).num_rows == 20


@pytest.mark.parametrize("columns, how", [
  # Each value begins with all of the one before.
  ({"a": [LONG * 100] * 9000}, {
    "use_dictionary": False, "column_encoding": {"a": "DELTA_BYTE_ARRAY"},
  }),
  # Nothing but the number of the values.
  ({"a": pa.array([0] * 10**5), "b": [1] * 10**5}, {}),
])  # fmt: skip
def test_other_encodings_are_bounded(tmp_path, monkeypatch, columns, how):
  monkeypatch.setattr(parquet_sizes, "LARGEST", 500_000)
  found = write(tmp_path / "r.parquet", columns, **how)
  with pytest.raises(InputError, match="a: row group 0 takes"):
    read(found, ("a",))


def test_a_file_has_no_more_rows_than_its_size_can(tmp_path, monkeypatch):
  monkeypatch.setattr(parquet_sizes, "_ROWS", 0)
  pq.write_table(pa.table({"a": [1] * 10**6}), tmp_path / "r.parquet")
  with pytest.raises(InputError, match="r.parquet: says that it has 1000000"):
    parquet_files.Files(tmp_path / "r.parquet")


def test_too_little_memory_is_no_fault_of_a_row(tmp_path, monkeypatch):
  columns = {"question": ["a"] * 3, "answer": ["b"] * 3}
  pq.write_table(pa.table(columns), tmp_path / "r.parquet")
  source = parquet.Parquet(tmp_path / "r.parquet")

  def fail(*_, **__):
    raise pa.lib.ArrowMemoryError("malloc of size 60000000000 failed")

  monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
  with pytest.raises(MemoryError, match="malloc"):
    source.text(0)
