"""A process that measures rows of JSON holds little."""

import functools
import json
import pathlib
import re

import numpy as np
import pytest

from pivot_jax import addresses
from pivot_jax.data import coders, lengths, packing, pool
from pivot_jax.data.sources import json_records
from pivot_jax.data.tokenizer import load_tokenizer

# Of a process in /proc; KiB.
_MOST = 60 * 1024


def write_pairs(path: pathlib.Path, rows: int) -> json_records.JsonLines:
  """Return a source of preference pairs, written to a file."""
  lines = [
    dict(id=f"{i}", image=None, question="Q?" * i, chosen="a", rejected="b")
    for i in range(rows)
  ]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return json_records.JsonLines(path)


def test_a_process_that_measures_json_is_small_and_loads_no_jax(tmp_path):
  folder = addresses.tokenizer_folder("package:toy")
  coder = coders.Coder(
    tokenizer=load_tokenizer(folder),
    template="qwen_1_5",
    mask="paper",
    pairs=True,
    image_size=48,
  )
  source = write_pairs(tmp_path / "pairs.jsonl", 300)
  work = functools.partial(pool._call, lengths._part)
  with pool.executor((source, coder), 1) as workers:
    with pool._no_program():
      found = workers.submit(work, range(300)).result()
    status = pathlib.Path("/proc/self/status")
    held = workers.submit(pathlib.Path.read_text, status).result()
    modules = workers.submit(eval, "{*__import__('sys').modules}").result()
  expected = packing.size(coder.example(source.text(299), pixels=False), 1)
  np.testing.assert_array_equal(found.sizes[299], expected)
  assert int(re.search(r"VmHWM:\s+(\d+) kB", held)[1]) < _MOST
  assert "pivot_jax.data.lengths" in modules
  optional = {"jax", "grain", "pyarrow", "array_record", "yaml", "pytest"}
  assert not modules & optional


def cut(place):
  place.write_bytes(place.read_bytes()[:-30])


def flip(place):
  data = bytearray(place.read_bytes())
  data[200] ^= 1  # In the numbers.
  place.write_bytes(data)


def of_other_rows(place):
  with np.load(place) as found:
    np.savez(place, sizes=found["sizes"][:-1], said=found["said"])


def of_reasons_elsewhere(place):
  with np.load(place) as found:
    said = np.frombuffer(b'[[[100, "long"]], []]', "u1")
    np.savez(place, sizes=found["sizes"], said=said)


@pytest.mark.parametrize("change", [
  cut, flip, of_other_rows, of_reasons_elsewhere,
  lambda place: place.write_bytes(b""),
])  # fmt: skip
def test_kept_lengths_that_are_not_sound_are_made_again(
  tmp_path, monkeypatch, caplog, change
):
  monkeypatch.setenv("PIVOT_JAX_CACHE", str(tmp_path / "cache"))
  coder = coders.Coder(
    tokenizer=load_tokenizer(addresses.tokenizer_folder("package:toy")),
    template="qwen_1_5",
    mask="paper",
    pairs=True,
    image_size=48,
  )
  source = write_pairs(tmp_path / "pairs.jsonl", 30)
  made = lengths.measure(source, coder, key="k", processes=1)
  (place,) = (tmp_path / "cache" / "lengths").iterdir()
  change(place)
  for logged in (True, False):
    caplog.clear()
    again = lengths.measure(source, coder, key="k", processes=1)
    np.testing.assert_array_equal(again.sizes, made.sizes)
    assert again.long == again.bad == {}
    assert (str(place) in caplog.text) == logged
