"""Reads a process's share of updates, at one time with the others.

Rows of LLaVA's form become examples of 384 pixels; see `bench/data/runs.py`.
"""

import argparse
import itertools
import json
import pathlib
import time

from bench.data import runs
from pivot_jax import processes
from pivot_jax.data import feed, packing, streams

# Examples of an update.
BATCH = 16


def read(rows: pathlib.Path, updates: int, index: int, count: int) -> dict:
  """Return seconds, rows and tokens of a share of some updates."""
  coder = runs.make_coder("llava", "package:toy", pixels=True)
  spec = {"kind": "llava", "path": str(rows)}
  stream = streams.open_stream([(spec, 1.0)], coder, seed=0)
  found = feed.read(
    stream,
    batch=BATCH,
    start=0,
    share=feed.Share(index, count),
    threads=feed.threads(-1),
  )
  own, tokens = BATCH // count, 0
  # The threads that read ahead are at work when the clock starts.
  list(itertools.islice(found, own))
  processes.barrier("reading")
  began = time.perf_counter()
  for example in itertools.islice(found, own * updates):
    tokens += packing.size(example, coder.patches).tokens
  seconds = time.perf_counter() - began
  found.close()
  # Nobody ends while another one is timed.
  processes.barrier("read")
  return {"seconds": seconds, "tokens": tokens, "rows": own * updates}


def main() -> None:
  """Read, and write RESULT.INDEX."""
  parser = argparse.ArgumentParser()
  for name in ("rows", "result"):
    parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
  parser.add_argument("--updates", type=int, required=True)
  parser.add_argument("--processes", required=True)
  flags = parser.parse_args()
  index, count = processes.start(flags.processes)
  said = read(flags.rows, flags.updates, index, count)
  processes.finish()
  place = flags.result.with_name(f"{flags.result.name}.{index}")
  place.write_text(json.dumps(said))


if __name__ == "__main__":
  main()
