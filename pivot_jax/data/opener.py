"""The kinds of source that a config's `data` section can name.

A source has a length, rows by index with stable ids, `text(index)` for a row
without decoding its image, and `name(index)` for messages.
"""

import functools
import json
import logging
import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pivot_jax import texts
from pivot_jax.data import coders, grouping, streams
from pivot_jax.data.scenes import scenes
from pivot_jax.data.sources import (
  array_record,
  json_index,
  json_records,
  mixtures,
  mmpr_sets,
  parquet,
  places,
  tfds,
)
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

Row = Mapping[str, Any]


# Sources of texts, which streams read; the rest is read as a whole.
TEXTS = (
  "llava",
  "llava_text",
  "preference",
  "mixture",
  "mmpr",
  "parquet",
  "array_record",
)


def open_source(spec: Mapping[str, Any], *, logged: bool = False) -> Any:
  """Return the source that a config's `data` entry describes.

  `kind` names it, `max_bad` is the share of rows that may be left out because
  a field or the image cannot be read (0: none, and none is looked for), `bad` a
  file of `data check` that names rows to leave out, `group` joins the pairs that
  share image and question; the other fields are its constructor's arguments.

  Of `TEXTS`, `max_bad` leaves nothing out here: see `open_stream`.

  Args:
    spec: the entry.
    logged: whether the rows that a mixture takes of each file go to the log.
  """
  given = dict(spec)
  max_bad = given.get("max_bad", 0.0)
  if not 0 <= max_bad < 1:
    raise InputError(f"max_bad={max_bad}: give a share, 0 or more and under 1")
  if given["kind"] in TEXTS:
    return _open(given, logged=logged)
  given.pop("max_bad", None)
  source = _open(given)
  if not max_bad:
    return source
  bad = _bad_rows(json.dumps(given, sort_keys=True), max_bad)
  return Readable(source, bad) if bad else source


def open_stream(
  specs: Sequence[tuple[Mapping[str, Any], float]],
  coder: coders.Coder,
  *,
  seed: int,
  reference: coders.Reference | None = None,
) -> streams.Stream:
  """Return the stream of (entry, weight) pairs; see `streams.Stream`.

  The rows that a mixture takes of each file go to the log.

  Images of files are brought to the coder's size where they are decoded, which
  is where several are padded and a decoder may decode smaller.
  """
  how = dict(image_size=coder.image_size, resample=coder.resample)
  framed = [spec["kind"] in TEXTS for spec, _ in specs]
  opened = [
    open_source(dict(spec) | how if inside else spec, logged=True)
    for (spec, _), inside in zip(specs, framed, strict=True)
  ]
  return streams.Stream(
    [(one, weight) for one, (_, weight) in zip(opened, specs, strict=True)],
    coder,
    seed=seed,
    reference=reference,
    max_bad=[spec.get("max_bad", 0.0) for spec, _ in specs],
    framed=framed,
  )


def long_rows(asked: str, specs: Sequence[Mapping[str, Any]]) -> str:
  """Return what becomes of rows over the limit, "auto" being resolved.

  Of a published mixture nobody can shorten a row; one's own files one can.
  """
  if asked != "auto":
    return asked
  kinds = {
    (spec["kind"] in ROWS and format_of(pathlib.Path(spec["path"])))
    or spec["kind"]
    for spec in specs
  }
  return "drop" if kinds & {"mixture", "mmpr"} else "error"


@functools.cache
def _bad_rows(spec: str, max_bad: float) -> tuple[int, ...]:
  """Read a source through, once a run, and says what is left out."""
  source = _open(json.loads(spec))
  found = json_records.check(source, max_bad=max_bad)
  for _, message in found:
    LOG.warning("left out: %s", message)
  if found:
    LOG.warning("%d of %d rows left out", len(found), len(source))
  return tuple(index for index, _ in found)


KINDS = {
  "scenes": scenes.Scenes,
  "llava": json_records.LlavaJson,
  "preference": json_records.JsonLines,
  "eval": json_records.EvalJson,
  "classify": json_records.ImageFolder,
  "segment": json_records.SegmentFolder,
  "mixture": mixtures.Mixture,
  "mmpr": mmpr_sets.open_set,
  "parquet": parquet.Parquet,
  "array_record": array_record.ArrayRecord,
  "tfds": tfds.Tfds,
}

# What the rows of an entry's kind are, where files of several formats hold them.
ROWS = {
  "llava": "conversation",
  "llava_text": "conversation",
  "preference": "preference",
  "eval": "eval",
  "classify": "classify",
  "segment": "segment",
}


def format_of(place: pathlib.Path) -> str:
  """Return the kind of a file or folder that is of one format, else ""."""
  if place.suffix in (".yaml", ".yml"):
    return "mixture"
  shards = "*" in place.name or any(place.glob("*.parquet"))
  if place.suffix == ".parquet" or shards:
    return "parquet"
  if (place / "dataset.json").is_file():
    return "array_record"
  return "mmpr" if place.suffix == ".json" and _is_meta(place) else ""


def _is_meta(place: pathlib.Path) -> bool:
  """Return whether a file is an MMPR meta.json: an object of objects."""
  if not place.is_file():
    return False
  with place.open("rb") as file:
    if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
      return False
  try:
    found = json.loads(place.read_bytes())
  except (ValueError, RecursionError):
    return False
  return isinstance(found, dict) and all(
    isinstance(one, dict) and "annotation" in one for one in found.values()
  )


def _open(spec: Mapping[str, Any], *, logged: bool = False) -> Any:
  fields = dict(spec)
  asked = kind = fields.pop("kind")
  fields.pop("given_by", None)
  max_bad = fields.pop("max_bad", 0.0)
  bad, group = fields.pop("bad", ""), fields.pop("group", False)
  if kind not in (*KINDS, "llava_text"):
    raise InputError(
      f"data kind {kind!r}: choose one of {sorted((*KINDS, 'llava_text'))}"
    )
  if kind in ROWS and fields.get("path"):
    split = pathlib.Path(fields["path"]) / fields.get("split", "")
    kind = format_of(split) or kind
    if kind in ("mixture", "mmpr") and asked in ("eval", "classify", "segment"):
      raise InputError(f"{split}: a {kind} is no {asked} data")
    if kind in ("parquet", "array_record"):
      fields["path"] = str(split)
  kind = "llava" if kind == "llava_text" else kind
  if kind in ("classify", "segment", "array_record"):
    fields["folder"] = fields.pop("path")
  if kind in ("llava", "preference", "mixture", "mmpr") and (max_bad or bad):
    # What is no record is left out by its place, or counted when it is read.
    fields["flawed"] = True
  if kind in ("parquet", "array_record"):
    # Their images are inside, and a split is a folder.
    fields.pop("image_root", None)
    fields.pop("split", None)
  for name in ("root", "image_root"):
    if fields.get(name) == "":
      fields[name] = None
  source = KINDS[kind](**fields)
  if logged and kind == "mixture":
    mixtures.log(source)
  if len(source) == 0:
    raise InputError(f"{spec.get('path', kind)}: the data is empty")
  if asked in ROWS and kind not in ("classify", "segment"):
    _check_rows(source, spec["path"], ROWS[asked])
  if asked == "llava_text":
    source = WithoutImages(source)
  if bad and kind in ("scenes", "tfds"):
    raise InputError(f"bad={bad}: rows of {kind} are in no file that it names")
  if bad:
    source = Readable(source, _listed(source, pathlib.Path(bad)))
  return grouping.Grouped(source) if group else source


def _check_rows(source: json_records.Source, path: str, needed: str) -> None:
  """Raise if the rows of a source are of another kind than is needed."""
  if source.kind != needed:
    raise InputError(
      f"{path}: holds {source.kind} rows; {needed} rows are needed here"
    )


def _listed(source: Any, path: pathlib.Path) -> tuple[int, ...]:
  """Return the rows of a source that a file of `data check` names."""
  listed = json_index.File(path)
  faults = [listed.record(i) for i in range(len(listed))]
  for number, one in enumerate(faults, 1):
    if not {"file", "row"} <= set(one):
      raise InputError(f"{path}:{number}: is no fault that `data check` wrote")
  named = {
    (_real(one["file"]), one["row"])
    for one in faults
    if one.get("drop", True) and one["row"] is not None
  }
  real = functools.cache(_real)
  found = []
  for index in range(len(source)):
    place = places.place(source.name(index))
    if (real(place.file), place.row) in named:
      found.append(index)
  LOG.info(
    "%d of %d rows left out: %s names them", len(found), len(source), path
  )
  return tuple(found)


def _real(path: str) -> str:
  """Return what a file is told by, however its name is composed."""
  return texts.canonical(os.path.realpath(path))


class Readable:
  """A source without the rows that cannot be read; names stay the file's."""

  def __init__(self, source: Any, bad: tuple[int, ...]):
    left_out = set(bad)
    self._source = source
    self._kept = [i for i in range(len(source)) if i not in left_out]

  def __len__(self) -> int:
    return len(self._kept)

  def __getitem__(self, index: int) -> Row:
    return self._source[self._kept[index]]

  def name(self, index: int) -> str:
    """Return where a row stands in the file."""
    return self._source.name(self._kept[index])

  def text(self, index: int) -> Row:
    """Return a row without decoding its image."""
    return self._source.text(self._kept[index])

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the bytes of a row's image files."""
    return self._source.encoded(self._kept[index])

  @property
  def kind(self) -> str:
    return self._source.kind

  def check_row(self, index: int) -> None:
    """Raise for a wrong field, or an image that is not in place."""
    self._source.check_row(self._kept[index])

  def stamp(self) -> str:
    """Return what tells the source and which rows are kept."""
    inner, kept = self._source.stamp(), np.asarray(self._kept, np.int64)
    return inner and f"{inner} {zlib.crc32(kept.tobytes()):08x}"


class WithoutImages:
  """Conversations as text alone, for a language model."""

  kind = "conversation"

  def __init__(self, source: Any):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Row:
    return self.text(index)

  def name(self, index: int) -> str:
    """Return where a row stands."""
    return self._source.name(index)

  def check_row(self, index: int) -> None:
    """Raise for a wrong field."""
    self.text(index)

  def stamp(self) -> str:
    """Return what tells the texts, which are not those with images."""
    inner = self._source.stamp()
    return inner and f"text {inner}"

  def text(self, index: int) -> Row:
    """Return a row without its image and image tags."""
    row = self._source.text(index)
    turns = [
      turn
      | {
        key: turn[key].replace("<image>", "").strip()
        for key in ("value", "content")
        if key in turn
      }
      for turn in row["conversations"]
    ]
    return dict(row) | {"image": None, "conversations": turns}
