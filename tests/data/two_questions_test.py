"""A question in `question` and in `prompt`: one rule for every reader."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from pivot_jax.data import opener
from pivot_jax.data.sources import mmpr
from pivot_jax.data.sources import parquet as parquet_source
from pivot_jax.errors import InputError
from tests.data.sources import mmpr_files
from tests.data.tools import checked

PAIR = {"chosen": "red", "rejected": "blue"}
EXAM = {"answer": "red"}


def _lines(folder, row):
  kind = "eval" if "answer" in row else "preference"
  path = checked.lines(folder / "rows.jsonl", [row])
  return opener.open_source({"kind": kind, "path": str(path)})


def _list(folder, row):
  kind = "eval" if "answer" in row else "preference"
  (folder / "rows.json").write_text(json.dumps([row]))
  path = str(folder / "rows.json")
  return opener.open_source({"kind": kind, "path": path})


def _table(folder, row):
  table = pyarrow.Table.from_pylist([row])
  parquet.write_table(table, folder / "a.parquet")
  return parquet_source.Parquet(folder / "a.parquet")


def _mmpr(folder, row):
  return mmpr.Mmpr(mmpr_files.write(folder, {"a": [row]}))


EVERY = [
  *((open_rows, PAIR) for open_rows in (_lines, _list, _table, _mmpr)),
  *((open_rows, EXAM) for open_rows in (_lines, _list, _table)),
]


@pytest.mark.parametrize(("open_rows", "row"), EVERY)
@pytest.mark.parametrize(
  "asked",
  [
    {"question": "Which colour?"},
    {"prompt": "Which colour?"},
    {"prompt": "Which colour?", "question": "Which colour?"},
    {"prompt": None, "question": "Which colour?"},
    {"prompt": "Which colour?", "question": None},
  ],
)
def test_a_question_is_read_from_either_field(tmp_path, open_rows, row, asked):
  found = open_rows(tmp_path, asked | row).text(0)
  assert found["question"] == "Which colour?"


@pytest.mark.parametrize(("open_rows", "row"), EVERY)
@pytest.mark.parametrize("other", ["Which shape?", ""])
def test_two_different_questions_are_a_fault(tmp_path, open_rows, row, other):
  asked = {"prompt": other, "question": "Which colour?"}
  source = open_rows(tmp_path, asked | row)
  with pytest.raises(InputError, match="question and prompt: ") as caught:
    source.text(0)
  assert str(caught.value).startswith(source.name(0))


@pytest.mark.parametrize("open_rows", [_lines, _list, _mmpr])
def test_no_question_is_a_fault_of_its_field(tmp_path, open_rows):
  for row, match in (
    (PAIR, "question: the field is missing"),
    (PAIR | {"prompt": None}, "prompt: must be text"),
    (PAIR | {"prompt": 3}, "prompt: must be text"),
    (PAIR | {"prompt": None, "question": None}, "question: must be text"),
  ):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    with pytest.raises(InputError, match=match):
      open_rows(folder, row).text(0)
