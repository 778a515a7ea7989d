import pytest

from pivot_jax.data import checking_rows, checking_work
from pivot_jax.data.sources import parquet


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
  target = checking_rows.Target(".", source, (), (), 0)
  tasks = checking_work.tasks([None, target])
  assert {task.number for task in tasks} == {1}
  # Groups of 150, 150, 150, 150, 50 and 120 rows.
  ends = [0, 300, 600, 770]
  assert [task.rows for task in tasks] == [
    range(begin, end) for begin, end in zip(ends, ends[1:])
  ]


def test_a_long_row_group_is_shared_out(tmp_path, monkeypatch):
  arrow = pytest.importorskip("pyarrow")
  import pyarrow.parquet

  monkeypatch.setattr(checking_work, "_LONGEST", 400)
  texts = [f"row {i}" for i in range(1000)]
  table = arrow.table({"question": texts, "answer": texts})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  target = checking_rows.Target(".", parquet.Parquet(tmp_path), (), (), 0)
  sizes = [len(task.rows) for task in checking_work.tasks([target])]
  assert sizes == [400, 400, 200]
