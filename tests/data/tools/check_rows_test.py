import pytest

from pivot_jax.data.sources import parquet
from pivot_jax.data.tools import check_rows


def test_one_process_takes_whole_row_groups_of_parquet(tmp_path):
  arrow = pytest.importorskip("pyarrow")
  import pyarrow.parquet

  for name, count in (("a-00000-of-00002", 650), ("a-00001-of-00002", 120)):
    texts = [f"row {i}" for i in range(count)]
    table = arrow.table({"question": texts, "answer": texts})
    pyarrow.parquet.write_table(
      table, tmp_path / f"{name}.parquet", row_group_size=150
    )
  source = parquet.Parquet(tmp_path)
  target = check_rows.Target(".", source, (), (), 0)
  tasks = check_rows.tasks([None, target])
  assert {task.number for task in tasks} == {1}
  # Groups of 150, 150, 150, 150, 50 and 120 rows.
  ends = [0, 300, 600, 770]
  assert [task.rows for task in tasks] == [
    range(begin, end) for begin, end in zip(ends, ends[1:])
  ]


def test_a_long_row_group_is_shared_out(tmp_path, monkeypatch):
  arrow = pytest.importorskip("pyarrow")
  import pyarrow.parquet

  monkeypatch.setattr(check_rows, "_LONGEST_CHUNK", 400)
  texts = [f"row {i}" for i in range(1000)]
  table = arrow.table({"question": texts, "answer": texts})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  target = check_rows.Target(".", parquet.Parquet(tmp_path), (), (), 0)
  sizes = [len(task.rows) for task in check_rows.tasks([target])]
  assert sizes == [400, 400, 200]
