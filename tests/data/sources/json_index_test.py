"""Random access to JSON files: the same records as json itself reads."""

import json
import pickle
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivot_jax.data.sources import json_index
from pivot_jax.errors import InputError

VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text(max_size=9),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3)
  ),
  max_leaves=5,
)
RECORDS = st.lists(
  st.dictionaries(st.text(max_size=4).filter(lambda k: k != "id"), VALUES),
  max_size=6,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("PIVOT_JAX_CACHE", str(tmp_path / "cache"))


def read(path):
  found = json_index.File(path)
  return [found.record(i) for i in range(len(found))]


@given(
  rows=RECORDS,
  ascii_only=st.booleans(),
  indent=st.sampled_from([None, 0, 3]),
  bom=st.booleans(),
  block=st.sampled_from([1, 2, 7, 64, 2**24]),
)
@settings(deadline=None, max_examples=150)
def test_a_list_has_the_records_that_json_reads(
  tmp_path_factory, rows, ascii_only, indent, bom, block
):
  path = tmp_path_factory.mktemp("list") / "a.json"
  text = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
  # Hypothesis may draw half a surrogate pair, which no file can hold.
  data = text.encode("utf-8", "replace")
  path.write_bytes(b"\xef\xbb\xbf" * bom + data + b"\n ")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(json_index, "_BLOCK", block)
    assert read(path) == json.loads(data)


@given(rows=RECORDS, ends=st.sampled_from(["\n", "\r\n"]), last=st.booleans())
@settings(deadline=None)
def test_lines_have_the_records_that_json_reads(
  tmp_path_factory, rows, ends, last
):
  path = tmp_path_factory.mktemp("lines") / "a.jsonl"
  text = ends.join(json.dumps(row, ensure_ascii=False) for row in rows)
  data = (text + ends * last + "\n\n").encode("utf-8", "replace")
  path.write_bytes(data)
  assert read(path) == [json.loads(x) for x in data.split(b"\n") if x.strip()]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_ids_are_unique_and_the_first_keeps_its_own(tmp_path, suffix):
  given = ["a", "b", "a", None, "a", "a#2", 7, "7", "é", "é"]
  rows = [{} if one is None else {"id": one} for one in given]
  if suffix == "json":
    # An escape and the letter itself are the same id.
    text = json.dumps(rows, ensure_ascii=False).replace("é", "\\u00e9", 1)
  else:
    text = "\n".join(map(json.dumps, rows))
  path = tmp_path / f"r.{suffix}"
  path.write_text(text, "utf-8")
  found = json_index.File(path)
  ids = [found.id(found.record(i), i) for i in range(len(found))]
  assert ids == "a b a#3 r-3 a#4 a#2 7 7#2 é é#2".split()
  assert found.again().tolist() == [2, 4, 7, 9]


def test_a_large_file_is_indexed_once_and_again_when_it_changes(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(json_index, "CACHED", 10)
  path = tmp_path / "r.jsonl"
  path.write_text('{"id": "x"}\n[1]\n{"id": "x"}\n')
  assert json_index.File(path).flaws[0].index == 1

  def refuse(*_):
    raise AssertionError("the file was indexed again")

  with monkeypatch.context() as patch:
    patch.setattr(json_index, "_build", refuse)
    found = json_index.File(path)
    assert isinstance(found._table, np.memmap)
    assert found.flaws == (
      json_index.Flaw(1, "a record must be a JSON object, not list"),
    )
    assert found.id(found.record(2), 2) == "x#2"
  path.write_text('{"id": "y", "more": 1}\n')
  assert read(path) == [{"id": "y", "more": 1}]


def test_threads_and_other_processes_read_at_once(tmp_path):
  path = tmp_path / "r.jsonl"
  rows = [{"n": i, "text": "x" * (i % 50)} for i in range(400)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = pickle.loads(pickle.dumps(json_index.File(path)))
  wrong = []

  def look(start):
    for index in range(start, 400, 4):
      if found.record(index) != rows[index]:
        wrong.append(index)

  threads = [threading.Thread(target=look, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_another_process_maps_the_same_index(tmp_path, monkeypatch):
  monkeypatch.setattr(json_index, "CACHED", 10)
  path = tmp_path / "r.jsonl"
  path.write_text("".join(f'{{"n": {i}}}\n' for i in range(500)))
  sent = pickle.dumps(json_index.File(path))
  assert len(sent) < 1000
  found = pickle.loads(sent)
  assert isinstance(found._table, np.memmap)
  assert [found.record(i)["n"] for i in (0, 499)] == [0, 499]


@pytest.mark.parametrize("text, message", [
  ('[{"a": 1}, {"a": ]', r":1: invalid JSON at column 18"),
  ('[\n{"a": 1}\n{"a": 2}]', ":3: must be a JSON list; expected ','"),
  ('[{"a": 1}] x', ":1: has text after the end of its list"),
  ('{"a": 1}\n{"a": 2}', ":1: must be a JSON list; name a file of JSON lines"),
  ('[{"a": 1},\n', ":2: invalid JSON"),
  ("", ":1: must be a JSON list"),
])  # fmt: skip
def test_a_broken_list_is_named_with_its_line(tmp_path, text, message):
  path = tmp_path / "r.json"
  path.write_text(text)
  with pytest.raises(InputError, match=f"r.json{message}"):
    json_index.File(path)


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path):
  path = tmp_path / "r.jsonl"
  path.write_text('{"a": 1}\n{"a": 2}\n')
  found = json_index.File(path)
  path.write_text('{"a": 1}\n')
  with pytest.raises(InputError, match="was cut while it was being read"):
    found.record(1)
