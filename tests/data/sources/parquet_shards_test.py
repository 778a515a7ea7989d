"""Parquet files make a set, and their columns may differ so far."""

import pyarrow
import pytest
from pyarrow import parquet as arrow_parquet

from pivot_jax.data.sources import parquet
from pivot_jax.errors import InputError
from tests.data.sources.parquet_test import PAIR, _image, _png, _write


def test_shards_are_those_of_one_split_and_all_of_them(tmp_path):
  data = tmp_path / "data"
  for name in ("test-00000-of-00001-75b6649fb044d38b", "train-00000-of-00002"):
    _write(data / f"{name}.parquet", {"id": name, **PAIR})
  with pytest.raises(InputError, match=r"splits; name one of .*data/test-\*, "):
    parquet.Parquet(data)
  source = parquet.Parquet(data / "test-*")
  assert source.text(0)["id"] == "test-00000-of-00001-75b6649fb044d38b"
  with pytest.raises(InputError, match="1 of 2 shards are missing, the first"):
    parquet.Parquet(data / "train-*")
  # A file that is asked for by name is read alone.
  assert len(parquet.Parquet(data / "train-00000-of-00002.parquet")) == 1
  with pytest.raises(InputError, match="no .parquet file in it; name one of "):
    parquet.Parquet(tmp_path)
  with pytest.raises(InputError, match="none: no such file or folder"):
    parquet.Parquet(tmp_path / "none")
  with pytest.raises(InputError, match="val-.*: no file is called so"):
    parquet.Parquet(data / "val-*")
  _write(data / "train-00002-of-00003.parquet", PAIR)
  with pytest.raises(InputError, match="shards of 2 and of 3 lie together"):
    parquet.Parquet(data / "train-*")


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_shard_may_be_without_images_and_other_values(tmp_path, order):
  """Its columns are null where those of the other shards have a type."""
  full = {"id": "x", **PAIR, "image": {"bytes": _png(3), "path": "p"}}
  _write(tmp_path / f"{order[0]}.parquet", full)
  _write(tmp_path / f"{order[1]}.parquet", full | {"image": None, "id": None})
  source = parquet.Parquet(tmp_path)
  at, other = "ab".index(order[0]), "ab".index(order[1])
  assert source.text(at)["image"] is True and source.text(at)["id"] == "x"
  assert source[at]["image"].max() == 3
  assert source[other] == {"id": f"{order[1]}-0", "image": None, **PAIR}
  assert source.encoded(other) == ()


def test_shards_may_store_the_same_values_in_ways_of_their_own(tmp_path):
  large = pyarrow.schema({
    "answers": pyarrow.large_list(pyarrow.large_string()),
    "id": pyarrow.int64(),
    "images": pyarrow.list_(
      pyarrow.struct({"path": pyarrow.null(), "bytes": pyarrow.large_binary()})
    ),
    "question": pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
  })  # fmt: skip
  small = pyarrow.schema({
    "answers": pyarrow.list_(pyarrow.string()),
    "id": pyarrow.int8(),
    "images": pyarrow.list_(
      pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    ),
    "question": pyarrow.string(),
  })  # fmt: skip
  row = {"answers": ["y"], "id": 5, "images": [_image(1)] * 2, "question": "q"}
  table = pyarrow.Table.from_pylist([row], large)
  # The other name that parts of lists have, list.item.
  arrow_parquet.write_table(
    table, tmp_path / "a.parquet", use_compliant_nested_type=False
  )
  _write(tmp_path / "b.parquet", row, schema=small)
  source = parquet.Parquet(tmp_path)
  for index, name in enumerate(("5", "5#2")):
    text = source.text(index)
    assert (text["id"], text["image"]) == (name, [True, True])
    assert (text["question"], text["answer"]) == ("q", "y")
    assert source.encoded(index) == (_png(1), _png(1))


@pytest.mark.parametrize("change, message", [
  ({"image": "a.png"}, "image: is of type string, but struct<.*> in a.parque"),
  ({"image": [_image()]}, "image: is of type list"),
  ({"image": {"bytes": b""}}, "image: is of type struct<bytes: binary>, but"),
  ({"image": {"bytes": "", "path": ""}}, "image: is of type struct"),
  ({"id": 3}, "id: is of type int64, but string in a.parquet"),
  ({"id": True}, "id: is of type bool"),
  ({"n": 1.0}, "n: is of type double, but int64 in a.parquet"),
  ({"ns": [1.0]}, "ns: is of type list<.*double>, but list<.*int64>"),
])  # fmt: skip
def test_shards_of_other_types_are_refused(tmp_path, change, message):
  row = {"id": "x", **PAIR, "image": {"bytes": _png(), "path": "p"}}
  row |= {"n": 1, "ns": [1]}
  _write(tmp_path / "a.parquet", row)
  _write(tmp_path / "b.parquet", row | change)
  with pytest.raises(InputError, match=f"b.parquet: {message}"):
    parquet.Parquet(tmp_path)


def test_shards_with_other_columns_are_refused(tmp_path):
  _write(tmp_path / "a.parquet", PAIR)
  _write(tmp_path / "b.parquet", {**PAIR, "id": "x"})
  with pytest.raises(
    InputError, match="b.parquet: has the columns .*, id, but"
  ):
    parquet.Parquet(tmp_path)
