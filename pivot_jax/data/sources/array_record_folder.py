"""A folder of ArrayRecord shards: its files, and `dataset.json`, their list.

The rows in them are `array_records.py`'s.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from pivot_jax.errors import InputError

NAME = "dataset.json"
FORMAT, VERSION = "pivot_jax rows in ArrayRecord", 1
KINDS = ("conversation", "preference", "eval", "classify", "segment")
PARTS = ("rows", "texts")


class Shard(NamedTuple):
  """How many rows a shard has, and the bytes of its files by their names."""

  rows: int
  sizes: Mapping[str, int]


class Described(NamedTuple):
  """What `dataset.json` says that is used: one of `KINDS`, and the shards."""

  kind: str
  shards: tuple[Shard, ...]


def file_name(part: str, number: int, count: int) -> str:
  """Return what the file of one of `PARTS` of a shard is called."""
  return f"{part}-{number:05d}-of-{count:05d}.array_record"


def check_name(folder: pathlib.Path) -> None:
  """Raise for a name that is not UTF-8, which the library cannot open."""
  try:
    str(folder).encode("utf-8")
  except UnicodeEncodeError:
    raise InputError(f"{folder}: the name is not UTF-8; give another") from None


def write(
  folder: pathlib.Path, described: Described, more: Mapping[str, Any]
) -> None:
  """Write `dataset.json`, last of all: a folder without it is incomplete."""
  said = {
    "format": FORMAT,
    "version": VERSION,
    "kind": described.kind,
    "rows": sum(shard.rows for shard in described.shards),
    **more,
    "shards": [
      {"rows": shard.rows, "bytes": dict(shard.sizes)}
      for shard in described.shards
    ],
  }
  aside = folder / (NAME + ".tmp")
  aside.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
  aside.rename(folder / NAME)


def read(folder: pathlib.Path) -> Described:
  """Read and checks `dataset.json`; looks at the sizes of the files.

  Raises:
    InputError: no such folder, one that was written in part or by a later
      version, a shard that is missing or cut, or as `check_name`.
  """
  check_name(folder)
  path = folder / NAME
  said = _read(path)
  if said.get("kind") not in KINDS:
    raise InputError(
      f"{path}: kind: must be one of {', '.join(KINDS)}, not"
      f" {said.get('kind')!r}; convert the data again"
    )
  found = said.get("shards")
  if not isinstance(found, list) or not found:
    raise InputError(
      f"{path}: shards: must be a list of them; convert the data again"
    )
  shards = tuple(
    _shard(one, f"{path}: shards[{number}]", number, len(found))
    for number, one in enumerate(found)
  )
  for shard in shards:
    for name, size in shard.sizes.items():
      _check_file(folder / name, size)
  return Described(said["kind"], shards)


def _read(path: pathlib.Path) -> Mapping[str, Any]:
  folder = path.parent
  if not path.is_file():
    if not folder.is_dir():
      raise InputError(f"{folder}: no such folder")
    if any(folder.glob("rows-*")):
      raise InputError(
        f"{folder}: was written only in part, it has no {NAME}; remove it and"
        " convert again"
      )
    raise InputError(f"{folder}: no {NAME} in it; make it by converting")
  try:
    said = json.loads(path.read_text(encoding="utf-8"))
    found = said["format"], said["version"]
  except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
    raise InputError(f"{path}: cannot be read: {error!r}") from None
  if found != (FORMAT, VERSION):
    raise InputError(
      f"{path}: is {found[0]}, version {found[1]}, not {FORMAT}, version"
      f" {VERSION}; convert the data again"
    )
  return said


def _shard(found: Any, where: str, number: int, count: int) -> Shard:
  names = [file_name(part, number, count) for part in PARTS]
  said = found if isinstance(found, dict) else {}
  rows, sizes = said.get("rows"), said.get("bytes")
  if not isinstance(rows, int):
    rows = -1
  if isinstance(sizes, dict) and sorted(sizes) == sorted(names):
    if all(map(_is_count, (rows, *sizes.values()))):
      return Shard(rows, sizes)
  raise InputError(
    f"{where}: must say rows, and the bytes of {' and '.join(names)}; convert"
    " the data again"
  )


def _is_count(found: Any) -> bool:
  return isinstance(found, int) and not isinstance(found, bool) and found >= 0


def _check_file(path: pathlib.Path, size: int) -> None:
  if not path.is_file():
    raise InputError(f"{path}: the shard is missing; convert the data again")
  found = path.stat().st_size
  if found != size:
    raise InputError(
      f"{path}: {found} bytes instead of {size}; copy or convert it again"
    )
