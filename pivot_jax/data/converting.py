"""`python -m pivot_jax.data convert SRC DST`: any data to ArrayRecord.

Rows are read by index afterwards, each at one read, which shuffled training
needs and parquet and lists of JSON do not give. Images are copied as they are;
their headers are looked at, and `check` is what decodes them.
"""

import argparse
import functools
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence

import tqdm

from pivot_jax.data import array_records, opening
from pivot_jax.errors import InputError

ROWS = 10_000  # A shard, unless the number of shards is given.


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m pivot_jax.data convert",
    description="Writes a data set as ArrayRecord shards.",
  )
  parser.add_argument("source", metavar="SRC", help="what there is")
  parser.add_argument("folder", metavar="DST", help="the folder to write")
  parser.add_argument("--images", metavar="DIR", help="the root of SRC's paths")
  parser.add_argument(
    "--shards", type=int, help=f"files to write; one for {ROWS} rows"
  )
  parser.add_argument(
    "--max-bad", type=float, default=0.0, help="share of rows to leave out"
  )
  parser.add_argument(
    "--overwrite", action="store_true", help="replaces what convert wrote"
  )
  given = parser.parse_args(argv)
  check_target(given.folder, overwrite=given.overwrite)
  kind, source = opening.open_path(given.source, images=given.images)
  written = convert(
    source,
    given.folder,
    kind=kind,
    origin=given.source,
    shards=given.shards,
    max_bad=given.max_bad,
    overwrite=given.overwrite,
  )
  for message in written.left_out:
    sys.stdout.write(f"left out: {message}\n")
  sys.stdout.write(
    f"{given.folder}: {written.rows} {kind} rows,"
    f" {written.size / 2**20:.1f} MiB; {len(written.left_out)} left out\n"
  )
  return 0


def convert(
  source: array_records.Source,
  folder: str | os.PathLike,
  *,
  kind: str,
  origin: str,
  shards: int | None = None,
  max_bad: float = 0.0,
  overwrite: bool = False,
) -> array_records.Written:
  """Writes a source beside `folder` and renames it into place when complete.

  Args: as of `array_records.write`, and
    overwrite: whether a folder that was converted before may be replaced.

  Raises:
    InputError: the folder exists, or as `array_records.write`.
  """
  folder = pathlib.Path(folder)
  check_target(folder, overwrite=overwrite)
  if shards is None:
    shards = max(1, math.ceil(len(source) / ROWS))
  aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
  bar = functools.partial(
    tqdm.tqdm, desc=f"converting to {folder.name}", unit="rows", disable=None
  )
  try:
    written = array_records.write(
      source,
      aside,
      kind=kind,
      shards=shards,
      origin=origin,
      max_bad=max_bad,
      progress=bar,
    )
    if folder.exists():
      shutil.rmtree(folder)
    aside.rename(folder)
  except OSError as error:
    raise InputError(f"{folder}: cannot be written: {error}") from None
  finally:
    if aside.exists():
      shutil.rmtree(aside)
  return written


def check_target(folder: str | os.PathLike, *, overwrite: bool) -> None:
  """Raises unless a folder may be written, before any work is done."""
  folder = pathlib.Path(folder)
  if not folder.exists() and not folder.is_symlink():
    return
  if not overwrite:
    raise InputError(f"{folder}: exists; give another name or --overwrite")
  if not (folder / array_records.NAME).is_file():
    raise InputError(
      f"{folder}: exists and is not a folder that convert wrote, so it is not"
      " overwritten; remove it yourself"
    )
