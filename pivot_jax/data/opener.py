"""Opens data as sources: by an entry of a config, or by its path alone.

This is the only file that knows the kinds of data: which there are, how a file
shows its own, and which constructor reads it. `open_source` takes an entry of a
config's `sources`; `open_path` takes a path of the command line and makes the
entry for it. Both return a `rows.Source`.
"""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pivot_jax import files, names, texts
from pivot_jax.data import grouping, images, rows
from pivot_jax.data.scenes import scenes
from pivot_jax.data.sources import (
  array_record,
  folders,
  json_index,
  json_records,
  mixtures,
  mmpr,
  parquet,
  tfds,
)
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

KINDS: dict[str, Callable[..., rows.Source]] = {
  "scenes": scenes.Scenes,
  "llava": json_records.LlavaJson,
  "preference": json_records.JsonLines,
  "eval": json_records.EvalJson,
  "classify": folders.ImageFolder,
  "segment": folders.SegmentFolder,
  "mixture": mixtures.Mixture,
  "mmpr": mmpr.Mmpr,
  "parquet": parquet.Parquet,
  "array_record": array_record.ArrayRecord,
  "tfds": tfds.Tfds,
}
# Kinds of texts, which streams read; the rest is read as a whole.
TEXTS = (
  "llava",
  "llava_text",
  "preference",
  "mixture",
  "mmpr",
  "parquet",
  "array_record",
)
# The rows that an entry asks for, where files of several formats may hold them.
ROWS = {
  "llava": "conversation",
  "llava_text": "conversation",
  "preference": "preference",
  "eval": "eval",
  "classify": "classify",
  "segment": "segment",
}
# Kinds whose files may have lines that are no records.
FLAWED = ("llava", "preference", "eval", "mixture", "mmpr")
# The keys of an entry that say how its rows are used.
_USE = ("kind", "given_by", "max_bad", "bad", "group")
_IMAGES = tuple(field.name for field in dataclasses.fields(images.ImageSpec))


def open_source(
  spec: Mapping[str, Any], *, flawed: bool = False, logged: bool = False
) -> rows.Source:
  """Return the source that a config's `data` entry describes.

  `kind` names it, one of `KINDS` or of your own (`pivot_jax.names`): a function
  of the entry's other fields that returns a source.

  `max_bad` is the share of rows that may be skipped because a field or the
  image cannot be read (0: none, and none is looked for), `bad` a file of `data
  check` that names rows to skip, `group` joins the pairs that share image and
  question; the other fields are its constructor's arguments.

  Of `TEXTS`, `max_bad` skips nothing here: see `streams.open_stream`.

  Args:
    spec: the entry.
    flawed: whether a line that is no record is an error only when it is read.
    logged: whether the rows that a mixture takes of each file go to the log.
  """
  max_bad = spec.get("max_bad", 0.0)
  if not 0 <= max_bad < 1:
    raise InputError(f"max_bad={max_bad}: give a share, 0 or more and under 1")
  if spec["kind"] in TEXTS:
    return _open(spec, flawed=flawed, logged=logged)
  fields = {name: spec[name] for name in spec if name != "max_bad"}
  source = _open(fields, flawed=flawed)
  if not max_bad:
    return source
  bad = _bad_rows(json.dumps(fields, sort_keys=True), max_bad)
  return _without(source, bad) if bad else source


def open_path(
  path: str | os.PathLike,
  *,
  image_root: str | None = None,
  root: str | None = None,
  flawed: bool = False,
) -> rows.Source:
  """Return the source of a file or a folder.

  Args:
    path: .json or .jsonl of records; MMPR's meta.json; a mixture's .yaml; a
      .parquet file or a folder of them; a folder that `data convert` wrote; a
      folder of {train,val}/CLASS or {train,val}/{images,labels}, or one of
      these splits; or scenes:TASK?size=100&split=train for embedded ones.
    image_root: the folder that image paths are relative to.
    root: the folder that the files of a mixture are relative to.
    flawed: see `open_source`.

  Raises:
    InputError: nothing there, or nothing that is known.
  """
  if str(path).startswith("scenes:"):
    return open_source(_scenes(str(path)))
  place = pathlib.Path(path)
  # A pattern names the shards of a split.
  if "*" not in place.name and not files.input_path(place).exists():
    raise InputError(f"{place}: no such file or folder")
  spec = _entry(place, image_root)
  if spec["kind"] == "mixture" and root is not None:
    spec["root"] = root
  return open_source(spec, flawed=flawed)


def files_of(spec: Mapping[str, Any]) -> list[pathlib.Path]:
  """Return the files that hold the rows of an entry whose path names others.

  Those of a mixture, of MMPR's meta.json and of a pattern; raises as
  `open_source`.
  """
  use = ("max_bad", "bad", "group")
  kept = {name: spec[name] for name in spec if name not in use}
  # Rows that cannot be read are in files all the same.
  source = _open(kept, flawed=True)
  while isinstance(source, rows.View):
    source = source.source
  lists = (mixtures.Mixture, mmpr.Mmpr, parquet.Parquet)
  return source.paths if isinstance(source, lists) else []


def kind_of(spec: Mapping[str, Any]) -> str:
  """Return the kind of an entry's files: one of `KINDS`, or a user's own."""
  kind = spec["kind"]
  if kind in ROWS and spec.get("path"):
    kind = format_of(_place(spec)) or kind
  return "llava" if kind == "llava_text" else kind


def format_of(place: pathlib.Path) -> str:
  """Return the kind of a file or folder that is of one format, else ""."""
  if place.suffix in (".yaml", ".yml"):
    return "mixture"
  shards = "*" in place.name or any(place.glob("*.parquet"))
  if place.suffix == ".parquet" or shards:
    return "parquet"
  if (place / array_record.NAME).is_file():
    return "array_record"
  return "mmpr" if place.suffix == ".json" and _is_meta(place) else ""


def holds_records(place: pathlib.Path) -> bool:
  """Return whether a path is a file of JSON records, `llava` and its like."""
  return _is_json(place) and place.is_file() and not format_of(place)


def long_rows(asked: str, specs: Sequence[Mapping[str, Any]]) -> str:
  """Resolve `long="auto"` to a policy for over-long rows.

  Nobody can shorten a row of a published mixture, but anybody one of their own.
  """
  if asked != "auto":
    return asked
  published = {kind_of(spec) for spec in specs} & {"mixture", "mmpr"}
  return "drop" if published else "error"


class TextOnly(rows.View):
  """Conversations without their images, for a language model."""

  def __init__(self, source: rows.Source):
    super().__init__(source, range(len(source)))

  def __getitem__(self, index: int) -> rows.Row:
    return self.text(index)

  def text(self, index: int) -> rows.Row:
    """Return a row without its image and image tags."""
    row = super().text(index)
    turns = [
      turn
      | {
        key: turn[key].replace("<image>", "").strip()
        for key in ("value", "content")
        if key in turn
      }
      for turn in row["conversations"]
    ]
    return row | {"image": None, "conversations": turns}

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return no bytes: the rows have no images."""
    return ()

  def check_row(self, index: int) -> None:
    """Raise for a wrong field."""
    self.text(index)

  def stamp(self) -> str:
    """Return the source's stamp, marked as that of texts alone."""
    inner = self.source.stamp()
    return inner and f"text {inner}"


def _open(
  spec: Mapping[str, Any], *, flawed: bool = False, logged: bool = False
) -> rows.Source:
  """Return the source of an entry, all of whose rows can be read."""
  asked, kind = spec["kind"], kind_of(spec)
  table = KINDS | {"llava_text": json_records.LlavaJson}
  build = names.named(kind, table, "the kind of a source")
  if kind in ("mixture", "mmpr") and asked in ("eval", "classify", "segment"):
    raise InputError(f"{_place(spec)}: a {kind} is no {asked} data")
  if kind == "mmpr":
    mmpr.check_entry(str(_place(spec)), spec)
  fields, who = _arguments(spec, kind, flawed=flawed), f"kind={kind!r}"
  names.check_call(f"{who} of a source", build, (), fields)
  source = build(**fields)
  if not isinstance(source, rows.Source):
    raise InputError(
      f"{who} of a source: returned {type(source).__name__}, not a rows.Source "
      "(rows.Made is one)"
    )
  if logged and isinstance(source, mixtures.Mixture):
    mixtures.log(source)
  if len(source) == 0:
    raise InputError(f"{spec.get('path', kind)}: the data is empty")
  if asked in ROWS and source.kind != ROWS[asked]:
    raise InputError(
      f"{spec['path']}: holds {source.kind} rows; {ROWS[asked]} rows are needed"
      " here"
    )
  if asked == "llava_text":
    source = TextOnly(source)
  bad = spec.get("bad", "")
  if bad and (kind in ("scenes", "tfds") or names.is_own(kind)):
    raise InputError(f"bad={bad}: rows of {kind} are in no file that it names")
  if bad:
    source = _without(source, _listed(source, pathlib.Path(bad)))
  return grouping.Grouped(source) if spec.get("group", False) else source


def _arguments(
  spec: Mapping[str, Any], kind: str, *, flawed: bool
) -> dict[str, Any]:
  """Return the arguments of the constructor of an entry's kind."""
  fields = {name: spec[name] for name in spec if name not in _USE}
  if names.is_own(kind):
    return fields
  may_skip = spec.get("max_bad", 0.0) or spec.get("bad", "")
  if kind in FLAWED and (flawed or (may_skip and kind != "eval")):
    # A line that is no record is skipped by its place, or counted when read.
    fields["flawed"] = True
  if kind in ("parquet", "array_record"):
    # Their images are inside, and a split is a folder.
    if spec["kind"] in ROWS:
      fields["path"] = str(_place(spec))
    fields.pop("image_root", None)
    fields.pop("split", None)
  for name in ("root", "image_root"):
    if fields.get(name) == "":
      fields[name] = None
  if kind != "scenes":
    how = {name: fields.pop(name) for name in _IMAGES if name in fields}
    fields["image_spec"] = images.ImageSpec(**how)
  return fields


def _place(spec: Mapping[str, Any]) -> pathlib.Path:
  return pathlib.Path(spec["path"]) / spec.get("split", "")


def _without(source: rows.Source, bad: Sequence[int]) -> rows.View:
  """Return a view of all rows but some."""
  return rows.View(source, np.setdiff1d(np.arange(len(source)), bad))


@functools.cache
def _bad_rows(spec: str, max_bad: float) -> tuple[int, ...]:
  """Read a source through, once a run; return the rows to skip."""
  source = _open(json.loads(spec))
  found = rows.unreadable(source, max_bad=max_bad)
  for _, message in found:
    LOG.warning("skipped: %s", message)
  if found:
    LOG.warning("%d of %d rows skipped", len(found), len(source))
  return tuple(index for index, _ in found)


def _listed(source: rows.Source, path: pathlib.Path) -> list[int]:
  """Return the rows of a source that a file of `data check` names."""
  listed = json_index.File(path)
  faults = [listed.record(i) for i in range(len(listed))]
  for number, one in enumerate(faults, 1):
    file, row = one.get("file"), one.get("row", "")
    if not isinstance(file, str) or not isinstance(row, int | None):
      raise InputError(f"{path}:{number}: is no fault that `data check` wrote")
  named = {
    (_real(one["file"]), one["row"])
    for one in faults
    if one.get("drop", True) and one["row"] is not None
  }
  real = functools.cache(_real)
  found = []
  for index in range(len(source)):
    name = rows.parse_name(source.name(index))
    if (real(name.file), name.row) in named:
      found.append(index)
  LOG.info(
    "%d of %d rows skipped: %s names them", len(found), len(source), path
  )
  return found


def _real(path: str) -> str:
  """Return the one name of a file, however its letters are composed."""
  return texts.canonical(os.path.realpath(path))


def _is_meta(place: pathlib.Path) -> bool:
  """Return whether a file is an MMPR meta.json: an object of objects."""
  if not place.is_file():
    return False
  with place.open("rb") as file:
    if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
      return False
  try:
    # Opening says what is wrong with its numbers.
    found = json.loads(files.read_bytes(place, largest=mmpr.LARGEST))
  except (ValueError, RecursionError):
    return False
  return isinstance(found, dict) and all(
    isinstance(one, dict) and "annotation" in one for one in found.values()
  )


def _is_json(place: pathlib.Path) -> bool:
  return place.suffix in (".json", ".jsonl")


def _entry(place: pathlib.Path, image_root: str | None) -> dict[str, Any]:
  """Return the config entry for a path."""
  rooted = {} if image_root is None else {"image_root": image_root}
  known = format_of(place)
  if known:
    rooted = rooted if known in ("mixture", "mmpr") else {}
    return dict(kind=known, path=str(place), **rooted)
  if place.is_dir():
    return _folder(place)
  if not _is_json(place):
    raise InputError(
      f"{place}: give .json, .jsonl, .yaml or .parquet, or a folder"
    )
  return dict(kind=_kind_of_records(place), path=str(place), **rooted)


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
  """Return the config entry of a folder of splits, or of one split."""
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
    if format_of(place):
      return _entry(place, None)
  folder, split = place.parent, place.name
  inside = {path.name for path in (folder / split).iterdir()}
  kind = "segment" if {"images", "labels"} <= inside else "classify"
  return dict(kind=kind, path=str(folder), split=split)


def _kind_of_records(place: pathlib.Path) -> str:
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
