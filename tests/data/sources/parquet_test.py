import concurrent.futures
import os
import pickle
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet as arrow_parquet

from pivot_jax.data import images
from pivot_jax.data.sources import parquet, parquet_files
from pivot_jax.errors import InputError
from tests.fixtures import published, published_evaluations, published_parts

PAIR = {"question": "<image>\nWhat?", "chosen": "yes", "rejected": "no"}
ASKED = {"question": "What?", "answer": "yes"}


def _png(level: int = 0) -> bytes:
  return published_parts.encode(np.full((4, 6, 3), level, np.uint8), "PNG")


def _image(level: int = 0) -> dict:
  return {"bytes": _png(level), "path": None}


def _write(path, *records, schema=None, row_group_size=2):
  path.parent.mkdir(parents=True, exist_ok=True)
  table = pyarrow.Table.from_pylist(list(records), schema)
  arrow_parquet.write_table(table, path, row_group_size=row_group_size)
  return path


def _zeros(path, column: str) -> None:
  """Overwrite the data of a column's leaf in every row group."""
  footer = arrow_parquet.read_metadata(path)
  data = bytearray(path.read_bytes())
  for group in range(footer.num_row_groups):
    for number in range(footer.num_columns):
      chunk = footer.row_group(group).column(number)
      if chunk.path_in_schema == column:
        begin = chunk.dictionary_page_offset or chunk.data_page_offset
        size = chunk.total_compressed_size
        data[begin : begin + size] = bytes(size)
  path.write_bytes(data)


def test_onevision_and_next_are_read_as_published(tmp_path):
  for made in (
    published.make_onevision(tmp_path), published.make_llava_next(tmp_path)
  ):  # fmt: skip
    source = parquet.Parquet(made.path)
    assert source.kind == "conversation"
    published_parts.assert_reads(source, made)


@pytest.mark.parametrize("name", published_evaluations.EVALUATIONS)
def test_evaluation_sets_are_read_as_published(tmp_path, name):
  made = published.make_evaluation(tmp_path, name=name)
  source = parquet.Parquet(made.path)
  assert source.kind == "eval"
  published_parts.assert_reads(source, made)


def test_preference_rows_are_read_with_their_images(tmp_path):
  path = _write(
    tmp_path / "pairs.parquet",
    {"id": "a", **PAIR, "image": _image(1)},
    {"id": None, **PAIR, "image": None},
  )
  source = parquet.Parquet(path, image_spec=images.ImageSpec(2))
  assert source.kind == "preference"
  assert source[0]["image"].shape == (2, 2, 3) and source[0]["image"].max() == 1
  assert source.text(0) == {"id": "a", "image": True, **PAIR}
  assert source[1] == {"id": "pairs-1", "image": None, **PAIR}
  assert source.encoded(1) == ()
  prompt = {"prompt": "q", "chosen": "a", "rejected": "b"}
  source = parquet.Parquet(_write(tmp_path / "prompt.parquet", prompt))
  expected = {"question": "q", "chosen": "a", "rejected": "b"}
  assert source[0] == {"id": "prompt-0", "image": None, **expected}


def test_classified_images_are_read_with_their_labels(tmp_path):
  path = _write(
    tmp_path / "train-00000-of-00001.parquet",
    {"image": _image(7), "label": 3},
    {"image": _image(8), "label": -1},
  )
  source = parquet.Parquet(path)
  assert source.kind == "classify"
  assert source[0]["label"] == 3 and source[0]["image"].max() == 7
  with pytest.raises(InputError, match="parquet:1: label: .* not -1"):
    source[1]


def test_several_images_come_as_a_list_and_one_alone(tmp_path):
  path = _write(
    tmp_path / "a.parquet",
    {**PAIR, "images": [_image(1), _image(2)]},
    {**PAIR, "images": [_image(3)]},
    {**PAIR, "images": []},
    {**PAIR, "images": [_image(4), None]},
  )
  source = parquet.Parquet(path, image_spec=images.ImageSpec(3))
  assert [source.text(i)["image"] for i in range(3)] == [
    [True, True], True, None
  ]  # fmt: skip
  for one, level in zip(source[0]["image"], (1, 2), strict=True):
    square = images.decode(_png(level), name="image", size=3, pad=True)
    np.testing.assert_array_equal(one, square)
    assert one[0].max() > level  # The grey of a border.
  assert source[1]["image"].max() == 3 and source[2]["image"] is None
  with pytest.raises(InputError, match=r"a.parquet:3: images\[1\]: is null"):
    source[3]


def test_opening_reads_footers_and_text_reads_no_image(tmp_path):
  made = published.make_onevision(tmp_path, shards=1)
  (file,) = made.path.glob("*.parquet")
  _zeros(file, "image.bytes")
  source = parquet.Parquet(made.path)
  texts = [source.text(i) for i in range(len(source))]
  assert [text.pop("image") is None for text in texts] == [
    not files for files in made.files
  ]
  assert texts == made.rows
  with pytest.raises(InputError, match="-of-00001.parquet:3: parquet that can"):
    source[3]
  _zeros(file, "conversations.list.element.value")
  source = parquet.Parquet(made.path)
  assert len(source) == len(made.rows)
  with pytest.raises(InputError, match="parquet:2: parquet that cannot"):
    source.text(2)


def test_threads_read_any_rows_and_few_groups_are_kept(tmp_path, monkeypatch):
  monkeypatch.setattr(parquet_files, "CACHED", 0)
  made = published.make_onevision(tmp_path, rows=40)
  source = parquet.Parquet(made.path)
  order = np.random.default_rng(0).permutation(np.arange(40).repeat(4)).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(source.encoded, order))
    texts = list(pool.map(source.text, order))
  assert found == [tuple(made.files[i]) for i in order]
  assert [text["id"] for text in texts] == [made.rows[i]["id"] for i in order]
  # Groups not yet read when another was asked for may remain.
  assert len(source._files._cache) <= 8
  for index in range(40):
    source.text(index)
  assert len(source._files._cache) == 1


def test_a_group_is_read_once_while_there_is_room(tmp_path, monkeypatch):
  made = published.make_llava_next(tmp_path, rows=3, shards=1)
  reads = []
  read = arrow_parquet.ParquetFile.read_row_group
  monkeypatch.setattr(
    arrow_parquet.ParquetFile,
    "read_row_group",
    lambda *given, **named: reads.append(given[1]) or read(*given, **named),
  )
  source = parquet.Parquet(made.path)
  assert reads == []
  for _ in range(2):
    for index in range(3):
      source[index]
  assert reads == [0] * 3  # Ids, texts and images of the one group.


def test_a_source_travels_to_other_processes(tmp_path):
  made = published.make_onevision(tmp_path)
  source = parquet.Parquet(made.path, image_spec=images.ImageSpec(5))
  source.text(0)
  copy = pickle.loads(pickle.dumps(source))
  assert copy.text(1) == source.text(1)
  np.testing.assert_array_equal(copy[1]["image"], source[1]["image"])


@pytest.mark.parametrize("answer, expected", [
  ("yes", "yes"), (3, "3"), (["b", "a", "a"], "a"), (["b", "a"], "b"),
])  # fmt: skip
def test_an_answer_is_text_a_number_or_the_commonest(
  tmp_path, answer, expected
):
  for field in ("answer", "answers"):
    path = _write(tmp_path / "q.parquet", {"question": "q", field: answer})
    row = parquet.Parquet(path)[0]
    assert row["answer"] == expected
    assert row["columns"] == {"question": "q", field: answer}
    assert (row["category"], row["kind"]) == ("q", "q")


@pytest.mark.parametrize("answer, message", [
  (None, "is empty; this split has no answers"),
  ([], "is empty; this split has no answers"),
  (1.5, "must be text, not 1.5"),
  ([1], "must be text, not 1"),
  (True, "must be text, not True"),
])  # fmt: skip
def test_a_split_without_answers_is_refused(tmp_path, answer, message):
  path = _write(tmp_path / "q.parquet", {"question": "q", "answer": answer})
  with pytest.raises(InputError, match=f"q.parquet:0: answer: {message}"):
    parquet.Parquet(path)[0]


@pytest.mark.parametrize("change, message", [
  ({"chosen": None}, "chosen: must be text, not None"),
  ({"image": {"bytes": b"no", "path": None}}, "image: not a readable image"),
  ({"image": {"bytes": None, "path": "a.jpg"}}, "image: no bytes, only the pa"),
])  # fmt: skip
def test_a_bad_value_is_named_with_its_row(tmp_path, change, message):
  good = {"image": _image(), **PAIR}
  path = _write(tmp_path / "a.parquet", good, good | change)
  source = parquet.Parquet(path)
  assert source[0]["chosen"] == "yes"
  with pytest.raises(InputError, match=f"a.parquet:1: {message}"):
    source[1]


def test_a_bad_turn_is_named_with_its_row(tmp_path):
  turns = [{"from": "human", "value": None}]
  path = _write(tmp_path / "a.parquet", {"conversations": turns})
  with pytest.raises(
    InputError, match=r"a.parquet:0: conversations\[0\].value: .* missing"
  ):
    parquet.Parquet(path).text(0)
  path = _write(tmp_path / "a.parquet", {"conversations": "Hi"})
  with pytest.raises(InputError, match="a.parquet:0: conversations: must be"):
    parquet.Parquet(path).text(0)


def test_an_image_too_large_is_refused(tmp_path):
  path = _write(tmp_path / "a.parquet", {"image": _image(), **PAIR})
  with pytest.raises(InputError, match="a.parquet:0: image: 6x4 pixels"):
    parquet.Parquet(path, images.ImageSpec(max_pixels=23))[0]


@pytest.mark.parametrize("record, message", [
  ({"text": "a"}, "the columns text make no rows: needed are conversations"),
  ({**PAIR, "image": "a.jpg"}, "image: must be struct.* not string"),
  ({**PAIR, "image": {"path": "a"}}, "image: must be struct.*, not struct"),
  ({**PAIR, "image": _image(), "images": [_image()]}, "images in image and in"),
  ({**ASKED, "imageId": "7"}, "imageId names pictures that are in other files"),
])  # fmt: skip
def test_columns_that_make_no_rows_are_refused(tmp_path, record, message):
  path = _write(tmp_path / "a.parquet", record)
  with pytest.raises(InputError, match=f"a.parquet: {message}"):
    parquet.Parquet(path)


@pytest.mark.parametrize("answers", [[{"answer": "a"}, None], [None]])
def test_an_answer_that_is_null_in_its_list_is_refused(tmp_path, answers):
  schema = pyarrow.schema({
    "question": pyarrow.string(),
    "answers": pyarrow.list_(pyarrow.struct({"answer": pyarrow.string()})),
  })  # fmt: skip
  record = {"question": "q", "answers": answers}
  path = _write(tmp_path / "a.parquet", record, schema=schema)
  with pytest.raises(InputError, match="a.parquet:0: answers: must be text"):
    parquet.Parquet(path).text(0)


def test_the_answers_are_those_that_can_be_read(tmp_path):
  one = {"question": "q", "answer": {"text": "a"}, "answers": ["b", "c", "c"]}
  row = parquet.Parquet(_write(tmp_path / "a.parquet", one)).text(0)
  assert row["answer"] == "c" and "answer" not in row["columns"]


@pytest.mark.parametrize("record, message", [
  ({**ASKED, "answer": {"text": ["a"]}}, "answer: must be text, a whole numbe"),
  ({"question": "q", "answers": [{"text": "a"}]}, "answers: must be text, a w"),
  ({"question": "q", "answer": b"a"}, "answer: must be text, .*, not binary"),
  ({**ASKED, "question": {"en": "q"}}, "question: must be text, not struct"),
])  # fmt: skip
def test_questions_and_answers_of_other_types_are_refused(
  tmp_path, record, message
):
  path = _write(tmp_path / "a.parquet", record)
  with pytest.raises(InputError, match=f"a.parquet: {message}"):
    parquet.Parquet(path)


def test_text_that_is_no_utf8_is_named_with_its_row_and_column(tmp_path):
  def texts(*values):
    buffers = pyarrow.array(values, pyarrow.binary()).buffers()
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), buffers)

  good = [b"a", b"b", b"c"]
  columns = {"id": texts(b"x", b"y", b"\xfe"), "question": texts(*good)}
  columns |= {"chosen": texts(b"yes", b"n\xffo", b"yes")}
  columns |= {"rejected": texts(*good)}
  path = tmp_path / "a.parquet"
  arrow_parquet.write_table(pyarrow.table(columns), path)
  source = parquet.Parquet(path)
  assert source.text(0)["chosen"] == "yes"
  for row, name, byte in ((1, "chosen", 2), (2, "id", 1)):
    with pytest.raises(
      InputError,
      match=f"a.parquet:{row}: {name}: invalid UTF-8 at byte {byte} of a text",
    ) as caught:
      source.text(row)
    assert caught.value.kind == "bad_utf8"


def test_dictionaries_are_the_values_that_they_stand_for(tmp_path):
  words = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
  schema = pyarrow.schema({
    "id": words, "question": words, "answer": words,
    "hints": pyarrow.list_(words), "category": words,
  })  # fmt: skip
  row = {"question": "q", "answer": "a", "hints": ["h", "h"], "category": "c"}
  path = _write(
    tmp_path / "a.parquet", *({"id": "x", **row},) * 2, schema=schema
  )
  source = parquet.Parquet(path)
  assert [source.text(i)["id"] for i in range(2)] == ["x", "x#2"]
  found = source[0]
  assert (found["question"], found["answer"]) == ("q", "a")
  assert found["columns"] == {"id": "x", **row}
  assert found["category"] == "c"


def test_a_label_is_no_truth_value(tmp_path):
  path = _write(tmp_path / "a.parquet", {"image": _image(), "label": True})
  with pytest.raises(InputError, match="a.parquet:0: label: .* not True"):
    parquet.Parquet(path).text(0)


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
  path = _write(tmp_path / "a.parquet", PAIR)
  renamed = path.rename(tmp_path / os.fsdecode(b"\xff.parquet"))
  with pytest.raises(InputError, match="parquet that cannot be read: .*utf-8"):
    parquet.Parquet(renamed)
  renamed.rename(path)
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(InputError, match="a.parquet: parquet that cannot be"):
    parquet.Parquet(path)


def test_rows_outside_are_no_rows(tmp_path):
  source = parquet.Parquet(_write(tmp_path / "a.parquet", PAIR))
  for index in (-1, 1):
    for read in (source.__getitem__, source.text, source.encoded, source.name):
      with pytest.raises(IndexError):
        read(index)
  empty = _write(
    tmp_path / "b.parquet",
    schema=pyarrow.schema([(name, pyarrow.string()) for name in PAIR]),
  )
  assert len(parquet.Parquet(empty)) == 0


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
  path = tmp_path / "a.parquet"
  path.write_bytes(b"")
  with pytest.raises(InputError, match=r'pip install "pivot_jax\[parquet\]"'):
    parquet.Parquet(path)


def test_settings_are_those_of_other_sources(tmp_path):
  path = _write(tmp_path / "a.parquet", PAIR)
  with pytest.raises(InputError, match="'cubic' is none of bicubic"):
    parquet.Parquet(path, images.ImageSpec(resample="cubic"))
  assert images.MAX_PIXELS == parquet.Parquet(path)._pictures.spec.max_pixels


def test_answers_of_annotators_are_one_however_they_are_composed(tmp_path):
  said = ["th\u00e9", "the", "the\u0301", "the"]
  record = {"question": "q", "answers": ["the", *said[::2]]}
  row = parquet.Parquet(_write(tmp_path / "a.parquet", record)).text(0)
  assert row["answer"] == "th\u00e9"
