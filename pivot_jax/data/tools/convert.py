"""`python -m pivot_jax.data convert SRC DST`: a data set to ArrayRecord.

SRC is a file or folder that `opener.open_path` opens: what of the published
formats has a path of its own, so neither scenes nor TensorFlow Datasets. Rows
are read by index afterwards, each at one read, which shuffled training needs
and parquet and lists of JSON do not give. Images are copied as they are; their
headers are looked at, and `check` is what decodes them.
"""

import argparse
import functools
import math
import os
import pathlib
import shutil
from collections.abc import Sequence

import tqdm

from pivot_jax import files, output
from pivot_jax.data import opener, rows
from pivot_jax.data.sources import array_record
from pivot_jax.errors import InputError

ROWS = 10_000  # A shard, unless the number of shards is given.


def main(argv: Sequence[str]) -> int:
  """Run the command; return its exit status."""
  if "--paper-files" in argv:
    raise InputError(
      "--paper-files: lists of MMPR are written by `python -m pivot_jax.data"
      " select-mmpr META --set=official --tokenizer=ADDRESS --to=DIR`"
    )
  given = vars(_parser().parse_args(argv))
  max_bad = given["max_bad"] or 0.0
  overwrite = given["overwrite"]
  check_target(given["folder"], overwrite=overwrite)
  place = pathlib.Path(given["source"])
  if given["root"] is not None and opener.format_of(place) != "mixture":
    raise InputError(f"{place}: --root is for mixtures, .yaml")
  source = opener.open_path(
    given["source"],
    image_root=given["images"],
    root=given["root"],
    flawed=max_bad > 0,
  )
  written = convert(
    source,
    given["folder"],
    kind=source.kind,
    origin=given["source"],
    shards=given["shards"],
    max_bad=max_bad,
    overwrite=overwrite,
  )
  for message in written.skipped:
    output.show([f"skipped: {message}"])
  output.show(
    [
      f"{given['folder']}: {written.rows} {source.kind} rows,"
      f" {written.size / 2**20:.1f} MiB; {len(written.skipped)} skipped"
    ]
  )
  return 0


def convert(
  source: rows.Source,
  folder: str | os.PathLike,
  *,
  kind: str,
  origin: str,
  shards: int | None = None,
  max_bad: float = 0.0,
  overwrite: bool = False,
) -> array_record.Written:
  """Write a source beside `folder` and move it into place when complete.

  Args: as of `array_record.write`, and
    overwrite: whether a folder that was converted before may be replaced.

  Raises:
    InputError: the folder exists, or as `array_record.write`.
  """
  folder = pathlib.Path(folder)
  check_target(folder, overwrite=overwrite)
  if shards is None:
    shards = max(1, math.ceil(len(source) / ROWS))
  bar = functools.partial(
    tqdm.tqdm,
    desc=output.label("converting to", folder.name),
    unit="rows",
    disable=None,
  )
  try:
    with files.writing_folder(folder) as aside:
      written = array_record.write(
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
  except OSError as error:
    raise InputError(f"{folder}: cannot be written: {error}") from None
  return written


def check_target(folder: str | os.PathLike, *, overwrite: bool) -> None:
  """Raise unless a folder may be written, before any work is done."""
  folder = files.local_path(folder, "DST")
  files.check_named(folder)
  if not folder.exists() and not folder.is_symlink():
    return
  if not overwrite:
    raise InputError(f"{folder}: exists; give another name or --overwrite")
  if not (folder / array_record.NAME).is_file():
    raise InputError(
      f"{folder}: exists and is not a folder that convert wrote, so it is not"
      " overwritten; remove it yourself"
    )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m pivot_jax.data convert",
    description="Writes a data set as ArrayRecord shards.",
  )
  add = parser.add_argument
  add("source", metavar="SRC", help="a file or folder of data")
  add("folder", metavar="DST", help="the folder to write")
  add("--images", metavar="DIR", help="the root of SRC's image paths")
  add("--root", metavar="DIR", help="the root of a mixture's json_path's")
  add("--shards", type=int, help=f"files to write; one for {ROWS} rows")
  add("--max-bad", type=float, help="share of rows to skip (0)")
  add(
    "--overwrite",
    action="store_true",
    help="replaces what convert wrote",
  )
  return parser
