"""Damaged files of every kind end in an InputError or are read whole."""

import re
import signal
import subprocess
import sys

import pytest

from pivot_jax.errors import InputError
from tests import documents, fuzz
from tests.fixtures import fuzz_cases, programs


def damage(case, count, seed=0):
  """Run a case; Arrow may abort on one in 500 damaged footers.

  pyarrow lets an exception of its C++ through, which ends the process: nothing
  in Python can catch it.
  """
  first, aborts = 0, 0
  while True:
    ran = subprocess.run(
      [
        *(sys.executable, "-m", "tests.fuzz", case, f"--first={first}"),
        *(f"--count={count}", f"--seed={seed}"),
      ],
      cwd=documents.ROOT,
      env=programs.one_device(),
      capture_output=True,
      text=True,
    )
    ended = ran.returncode == -signal.SIGABRT
    if not ended or "parquet::ParquetException" not in ran.stderr:
      break
    first = int(re.findall(r"^(\d+)$", ran.stderr, re.MULTILINE)[-1]) + 1
    aborts += 1
  assert aborts <= count / 500
  said = re.sub(r"^\d+\n", "", ran.stderr, flags=re.MULTILINE)
  assert ran.returncode == 0, (ran.stdout + said)[-10_000:]
  assert ran.stdout.endswith(" mutations, 0 ended badly\n")


@pytest.mark.nightly
@pytest.mark.parametrize("case", fuzz_cases.CASES)
def test_thousands_of_damaged_files_end_well(case):
  damage(case, 2000)


@pytest.mark.parametrize("case", ["lines", "begun"])
def test_some_damaged_files_end_well(case):
  damage(case, 50, seed=1)


def test_what_ends_badly_is_found(tmp_path):
  path, outside = tmp_path / "set" / "file", tmp_path.parent / "elsewhere"
  path.parent.mkdir()
  path.write_text('{"a": [1, 2, 3], "b": "text"}')
  good = path.read_bytes()

  def fails():
    if path.read_bytes() != good:
      raise KeyError("a")

  def writes():
    if path.read_bytes() != good:
      outside.write_text("mine")

  def refuses():
    if path.read_bytes() != good:
      raise InputError("damaged")

  for read, said in ((fails, "KeyError"), (writes, "wrote"), (refuses, "")):
    case = fuzz_cases.Case([path], [read])
    found = fuzz.run(case, path.parent, count=20, seed=0)
    assert len(found) == (20 if said else 0)
    assert all(said in line for line in found)
  assert path.read_bytes() == good
