"""Parts of the copies of published sets: words, images, parquet shards."""

import io
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from pivot_jax.data import images
from pivot_jax.data.sources import records

WORDS = (
  "a the red blue small round left of two three dogs cat sign reads street"
  " table cup, holding near under. Yes No which how many colour is it there"
).split()


class Made(NamedTuple):
  """A set: where it is, its rows as the reader's `text` gives them, and images.

  path: what a reader opens; root: what image paths are relative to.
  rows: the rows, without `image`.
  files: the image files of each row.
  """

  path: pathlib.Path
  root: pathlib.Path
  rows: list[dict[str, Any]]
  files: list[list[bytes]]


def words(rng: np.random.Generator, low: int, high: int) -> str:
  """Returns a random text of `low` to `high` words."""
  return " ".join(rng.choice(WORDS, rng.integers(low, high + 1)).tolist())


def picture(rng: np.random.Generator, kind: str = "JPEG") -> bytes:
  """Returns the file of an image of random size and noise."""
  height, width = rng.integers(8, 41, 2)
  pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
  return encode(pixels, kind)


def encode(pixels: np.ndarray, kind: str) -> bytes:
  """Returns the file of an array of pixels."""
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind)
  return file.getvalue()


def turns(rng: np.random.Generator, image: bool, pairs: int = 2) -> list[dict]:
  """Returns a LLaVA conversation."""
  found = []
  for place in range(pairs):
    tag = "<image>\n" if image and place == 0 else ""
    found.append({"from": "human", "value": tag + words(rng, 3, 12)})
    found.append({"from": "gpt", "value": words(rng, 1, 30)})
  return found


def put(path: pathlib.Path, data: bytes) -> bytes:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)
  return data


def struct(files: list[bytes], path: str | None):
  return {"bytes": files[0], "path": path} if files else None


# Columns as the `huggingface` metadata tells them.
IMAGE = {"_type": "Image"}
TEXT, TEXTS = {"dtype": "string", "_type": "Value"}, "texts"
INT = {"dtype": "int64", "_type": "Value"}
INT8 = {"dtype": "int8", "_type": "Value"}
TURNS = [{"from": TEXT, "value": TEXT}]
CHAT_TYPES = {
  "id": TEXT, "image": IMAGE, "conversations": TURNS, "data_source": TEXT,
}  # fmt: skip


def write_shards(path, split, records, shards, types) -> None:
  path.mkdir(parents=True, exist_ok=True)
  fields = [(name, _arrow(kind)) for name, kind in types.items()]
  told = {"info": {"features": {n: _feature(k) for n, k in types.items()}}}
  schema = pyarrow.schema(fields, metadata={"huggingface": json.dumps(told)})
  for number in range(shards):
    begin, end = (len(records) * (number + k) // shards for k in (0, 1))
    table = pyarrow.Table.from_pylist(records[begin:end], schema)
    file = path / f"{split}-{number:05d}-of-{shards:05d}.parquet"
    # Several row groups a shard, as the published ones have of 100 rows.
    parquet.write_table(table, file, row_group_size=3)


def _arrow(kind):
  if kind == TEXTS:
    return pyarrow.list_(pyarrow.string())
  if isinstance(kind, list):
    return pyarrow.list_(_arrow(kind[0]))
  if "_type" not in kind:
    return pyarrow.struct([(n, _arrow(k)) for n, k in kind.items()])
  if kind == IMAGE:
    return pyarrow.struct(
      [("bytes", pyarrow.binary()), ("path", pyarrow.string())]
    )
  return pyarrow.type_for_alias(kind["dtype"])


def _feature(kind):
  if kind == TEXTS:
    return {"feature": TEXT, "_type": "Sequence"}
  if kind == [IMAGE]:
    return {"feature": IMAGE, "_type": "Sequence"}
  return kind


def assert_reads(source, made: Made) -> None:
  """Checks all that a source says of a set, pixels bit for bit."""
  assert len(source) == len(made.rows)
  for index, (row, files) in enumerate(zip(made.rows, made.files)):
    text, full = source.text(index), source[index]
    assert source.encoded(index) == tuple(files)
    assert len(records.listed(text.pop("image"))) == len(files)
    assert text == row
    pixels = records.listed(full.pop("image"))
    assert full == row
    assert len(pixels) == len(files)
    for one, data in zip(pixels, files):
      assert one.dtype == np.uint8
      np.testing.assert_array_equal(one, images.decode(data, name="image"))
