"""Opens data by its path alone: what kind it is shows in the file.

A config says its kind (`registry.py`); this is for the command line.
"""

import os
import pathlib
import urllib.parse
from typing import Any

from pivot_jax.data import opener
from pivot_jax.data.sources import json_index
from pivot_jax.errors import InputError

# What the rows of the other formats are.
_ROWS = opener.ROWS | {"mixture": "conversation", "mmpr": "preference"}


FLAWED = ("llava", "preference", "eval", "mixture", "mmpr")


def open_path(
  path: str | os.PathLike,
  *,
  images: str | None = None,
  root: str | None = None,
  flawed: bool = False,
) -> tuple[str, Any]:
  """Return (kind of row, source) of a file or a folder.

  Args:
    path: .json or .jsonl of records; MMPR's meta.json; a mixture's .yaml; a
      .parquet file or a folder of them; a folder that `data convert` wrote; a
      folder of {train,val}/CLASS or {train,val}/{images,labels}, or one of
      these splits; or scenes:TASK?size=100&split=train for embedded ones.
    images: the folder that image paths are relative to.
    root: the folder that the files of a mixture are relative to.
    flawed: whether lines that are no records are left for later.

  Raises:
    InputError: nothing there, or nothing that is known.
  """
  if str(path).startswith("scenes:"):
    source = opener.open_source(_scenes(str(path)))
    return source.kind, source
  place = pathlib.Path(path)
  # A pattern names the shards of a split.
  if "*" not in place.name and not place.exists():
    raise InputError(f"{place}: no such file or folder")
  spec = _spec(place, images)
  if spec["kind"] == "mixture" and root is not None:
    spec["root"] = root
  if flawed and spec["kind"] in FLAWED:
    spec["flawed"] = True
  source = opener.open_source(spec)
  if spec["kind"] in ("parquet", "array_record"):
    return source.kind, source
  return _ROWS[spec["kind"]], source


def _spec(place: pathlib.Path, images: str | None) -> dict[str, Any]:
  """Return the config entry for a path."""
  rooted = {} if images is None else {"image_root": images}
  known = opener.format_of(place)
  if known:
    rooted = rooted if known in ("mixture", "mmpr") else {}
    return dict(kind=known, path=str(place), **rooted)
  if place.is_dir():
    return _folder(place)
  if place.suffix not in (".json", ".jsonl"):
    raise InputError(
      f"{place}: give .json, .jsonl, .yaml or .parquet, or a folder"
    )
  return dict(kind=_kind(place), path=str(place), **rooted)


def _scenes(text: str) -> dict[str, Any]:
  """Return the config entry of `scenes:TASK?FIELD=VALUE&...`."""
  task, _, query = text.removeprefix("scenes:").partition("?")
  kinds = {"size": int, "seed": int, "turns": int, "new_fraction": float}
  fields: dict[str, Any] = {}
  for name, value in urllib.parse.parse_qsl(query):
    try:
      fields[name] = kinds.get(name, str)(value)
    except ValueError:
      raise InputError(f"{text}: {name} must be a number") from None
  unknown = set(fields) - {*kinds, "split"}
  if unknown:
    raise InputError(f"{text}: scenes have no field {sorted(unknown)[0]}")
  return dict(kind="scenes", task=task, **fields)


def _folder(place: pathlib.Path) -> dict[str, Any]:
  splits = ("train", "val")
  whole = any((place / split).is_dir() for split in splits)
  if not whole and place.name not in splits:
    raise InputError(
      f"{place}: no data set; a folder holds .parquet files, what `data "
      "convert` wrote, or train and val"
    )
  if whole:
    found = [split for split in splits if (place / split).is_dir()]
    if len(found) > 1:
      raise InputError(
        f"{place}: holds {' and '.join(found)}; name one of them"
      )
    place /= found[0]
    if opener.format_of(place):
      return _spec(place, None)
  folder, split = place.parent, place.name
  inside = {path.name for path in (folder / split).iterdir()}
  kind = "segment" if {"images", "labels"} <= inside else "classify"
  return dict(kind=kind, path=str(folder), split=split)


def _kind(place: pathlib.Path) -> str:
  """Tell the kind of a file by its first record that is one."""
  found, record = json_index.File(place), {}
  for index in range(len(found)):
    try:
      record = found.record(index)
    except InputError:
      continue
    if "conversations" in record:
      return "llava"
    if "chosen" in record or "rejected" in record:
      return "preference"
    if "answer" in record:
      return "eval"
  names = ", ".join(sorted(record)) or "none of them"
  raise InputError(
    f"{place}: no known kind of row; a record has conversations, or question, "
    f"chosen and rejected, or question and answer, not {names}"
  )
