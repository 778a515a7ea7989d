"""Damages files of data, weights and run folders, and reads them as users do.

  python -m tests.fuzz CASE [--count=2000] [--seed=0] [--first=0]

Each of `count` mutations, for a run and an artifact of each name of a file in them,
changes one file of a good set: bits flipped, bytes cut
out, repeated, exchanged or overwritten, the file cut short; in JSON, fields
swapped, left out, or given huge, negative, endless, nested and hostile values.
What is read must end well or in an InputError: not in another exception, in over
20 seconds, in more than 4 GB of memory, in a file outside, nor in a number of
rows that the file does not hold. Prints a line a finding; exits with 1 if there
is one. A mutation is known by its number: `first` begins with another one. Where the
process is ended, by a loop in C or an abort of Arrow's, stderr has the number.
"""

import argparse
import faulthandler
import logging
import os
import pathlib
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable

import numpy as np

from pivot_jax.errors import InputError
from tests.fixtures import fuzz_cases, mutations

SECONDS, BYTES = 20, 4 * 2**30


def main(argv: list[str]) -> int:
  """Run the mutations of a case; return 1 if one ended badly."""
  parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
  parser.add_argument("case", choices=sorted(fuzz_cases.CASES))
  parser.add_argument("--count", type=int, default=2000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--first", type=int, default=0)
  asked = parser.parse_args(argv)
  # What is damaged is logged, thousands of times.
  logging.disable(logging.CRITICAL)
  with tempfile.TemporaryDirectory() as scratch:
    os.environ["PIVOT_JAX_CACHE"] = f"{scratch}/cache"
    folder = pathlib.Path(scratch, "set")
    folder.mkdir()
    case = fuzz_cases.CASES[asked.case](folder)
    found = run(
      case, folder, count=asked.count, seed=asked.seed, first=asked.first
    )
  sys.stdout.write("".join(f"{line}\n" for line in found))
  names = len({path.name for path in case.files}) if case.each else 1
  sys.stdout.write(
    f"{asked.count * names} mutations, {len(found)} ended badly\n"
  )
  return 1 if found else 0


def run(
  case: fuzz_cases.Case,
  folder: pathlib.Path,
  *,
  count: int,
  seed: int,
  first: int = 0,
) -> list[str]:
  """Return a line for each mutation that ended badly, by its number."""
  outside = _Outside(folder)
  for read in case.reads:
    read()
  found = []
  names = sorted({path.name for path in case.files}) if case.each else [""]
  asked = [name for name in names for _ in range(count)]
  for number, name in list(enumerate(asked))[first:]:
    rng = np.random.default_rng((seed, number))
    sys.stderr.write(f"{number}\n")
    among = [path for path in case.files if not name or path.name == name]
    path = among[int(rng.integers(len(among)))]
    good = path.read_bytes()
    change, bad = mutations.mutated(good, rng)
    _write(path, bad, 2 * number)
    for read in case.reads:
      said = _ended(read, outside)
      if said:
        found.append(f"{number} {path.relative_to(folder)} ({change}): {said}")
    _write(path, good, 2 * number + 1)
  return found


def _write(path: pathlib.Path, data: bytes, second: int) -> None:
  """Write a file whose time is another one each time, as caches look at it."""
  path.write_bytes(data)
  os.utime(path, (second, second))


def _ended(read: Callable[[], object], outside: "_Outside") -> str:
  """Return how reading ended badly, "" if it did not."""
  outside.written.clear()
  # A loop in C cannot be interrupted: the process ends, and tells where it was.
  faulthandler.dump_traceback_later(SECONDS, exit=True)
  try:
    read()
  except InputError as error:
    if len(str(error)) > 100_000:
      return f"a message of {len(str(error))} characters"
  except BaseException as error:  # noqa: BLE001 (a panic of Rust is none other)
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{pathlib.Path(last.filename).name}:{last.lineno}"
    return f"{type(error).__name__} at {place}: {str(error)[:200]}"
  finally:
    faulthandler.cancel_dump_traceback_later()
  if outside.written:
    return f"wrote {outside.written[0]}"
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  if peak > BYTES:
    return f"took {peak / 1e9:.1f} GB"
  return ""


class _Outside:
  """Notes the files that are opened for writing outside the scratch folder."""

  def __init__(self, folder: pathlib.Path):
    self.written: list[str] = []
    own = (str(folder.parent), "/dev/", "/proc/")
    ways = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def note(event: str, given: tuple) -> None:
      if event != "open" or not isinstance(given[0], str):
        return
      path, _, flags = given
      written = isinstance(flags, int) and flags & ways
      if written and not os.path.realpath(path).startswith(own):
        self.written.append(path)

    sys.addaudithook(note)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
