"""A process that measures rows of JSON holds little."""

import functools
import json
import pathlib
import re

import numpy as np

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
