"""Small files that ask for all memory are one line, soon and in 2 GiB."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pivot_jax.data import images, opener, rows
from pivot_jax.data.sources import json_records
from pivot_jax.errors import InputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

MEMORY, SECONDS = 2 << 30, 60
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
READ = f"""
import resource
import sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
from pivot_jax.data import opener
from pivot_jax.errors import InputError
for path in sys.argv[1:]:
  try:
    source = opener.open_path(path)
    source.text(0), source.encoded(0)
    print(path, "is read")
  except InputError as error:
    print("REFUSED", error)
"""


def _parquet(path, columns):
  """Write one row group, without the types of Arrow."""
  table = pa.table(columns)
  pq.write_table(table, path, row_group_size=len(table), store_schema=False)


def _hole(path, begin):
  path.write_bytes(begin)
  os.truncate(path, 20 << 30)


def test_small_files_that_ask_for_all_memory_are_refused(tmp_path):
  large = "x" * 1_000_000
  # A text that all rows share, and pictures of which a list has many.
  zeros = pa.array([0] * 60_000, pa.int32())
  shared = pa.DictionaryArray.from_arrays(zeros, pa.array([large]))
  columns = {"question": shared, "answer": ["a"] * 60_000}
  _parquet(tmp_path / "text.parquet", columns)
  shared = pa.DictionaryArray.from_arrays(zeros, pa.array([large.encode()]))
  pictures = pa.StructArray.from_arrays([shared], ["bytes"])
  ends = pa.array(range(0, 60_001, 200), pa.int32())
  asked = ["q"] * 300
  columns = {"question": asked, "answer": asked}
  columns["images"] = pa.ListArray.from_arrays(ends, pictures)
  _parquet(tmp_path / "image.parquet", columns)
  _hole(tmp_path / "hole.jsonl", b'{"id": "1", "conversations": []}\n')
  _hole(tmp_path / "hole.json", b"{")
  _hole(tmp_path / "list.json", b"[")
  _hole(tmp_path / "hole.yaml", b"")
  _hole(tmp_path / "hole.parquet", b"PAR1")
  laughs = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n"
    for a, b in zip("abcdefgh", "bcdefghi")
  )
  (tmp_path / "laughs.yaml").write_text(
    laughs + "datasets:\n- json_path: *i\n  epochs: *i\n"
  )
  names = sorted(path.name for path in tmp_path.iterdir())
  found = subprocess.run(
    [sys.executable, "-c", READ, *names],
    cwd=tmp_path,
    env=os.environ | {"PIVOT_JAX_CACHE": str(tmp_path / "cache")},
    timeout=SECONDS,
    capture_output=True,
    text=True,
  )
  lines = found.stdout.splitlines()
  assert found.returncode == 0, found.stderr[-2000:]
  assert len(lines) == len(names) == 8
  for name, line in zip(names, lines):
    assert line.startswith("REFUSED") and name in line and len(line) < 2000


def test_the_images_of_a_row_are_bounded_together(tmp_path, monkeypatch):
  Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(tmp_path / "a.png")
  path = tmp_path / "r.jsonl"
  row = {"id": "1", "conversations": TURNS, "image": ["a.png"] * 5}
  path.write_text(json.dumps(row) + "\n")
  spec = images.ImageSpec(max_pixels=100)
  source = json_records.LlavaJson(path, image_spec=spec)
  with pytest.raises(InputError, match="r.jsonl:1: .*more than 400 pixels"):
    source[0]
  # Brought to a size they are small.
  spec = images.ImageSpec(max_pixels=100, image_size=4)
  assert len(json_records.LlavaJson(path, image_spec=spec)[0]["image"]) == 5
  monkeypatch.setattr(rows, "BYTES", 300)
  with pytest.raises(InputError, match="r.jsonl:1: .*more than 300 bytes"):
    source.encoded(0)


@pytest.mark.parametrize("fault", [
  {"file": 3, "row": 1}, {"file": "a", "row": [1]}, {"file": "a"},
  {"file": None, "row": 1}, {"file": "a", "row": "1"},
])  # fmt: skip
def test_faults_of_other_types_are_none(tmp_path, fault):
  path = tmp_path / "r.jsonl"
  path.write_text(json.dumps({"id": "1", "conversations": TURNS}) + "\n")
  bad = tmp_path / "bad.jsonl"
  bad.write_text(json.dumps(fault) + "\n")
  with pytest.raises(InputError, match="bad.jsonl:1: is no fault"):
    opener.open_source({"kind": "llava", "path": str(path), "bad": str(bad)})
