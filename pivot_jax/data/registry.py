"""The kinds of source that a config's `data` section can name.

A source has a length, rows by index with stable ids, `text(index)` for a row
without decoding its image, and `name(index)` for messages.
"""

import functools
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pivot_jax.data import (
  examples,
  grouping,
  indexed,
  scenes,
  sources,
  streams,
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


def open_source(spec: Mapping[str, Any]) -> Any:
  """Returns the source that a config's `data` entry describes.

  `kind` names it, `max_bad` is the share of rows that may be left out because
  a field or the image cannot be read (0: none, and none is looked for), `bad` a
  file of `data check` that names rows to leave out, `group` joins the pairs that
  share image and question; the other fields are its constructor's arguments.

  Of `TEXTS`, `max_bad` leaves nothing out here: see `open_stream`.
  """
  given = dict(spec)
  max_bad = given.get("max_bad", 0.0)
  if not 0 <= max_bad < 1:
    raise InputError(f"max_bad={max_bad}: give a share, 0 or more and under 1")
  if given["kind"] in TEXTS:
    return _open(given)
  given.pop("max_bad", None)
  source = _open(given)
  if not max_bad:
    return source
  bad = _bad_rows(json.dumps(given, sort_keys=True), max_bad)
  return Readable(source, bad) if bad else source


def open_stream(
  specs: Sequence[tuple[Mapping[str, Any], float]],
  coder: examples.Coder,
  *,
  seed: int,
  reference: examples.Reference | None = None,
) -> streams.Stream:
  """Returns the stream of (entry, weight) pairs; see `streams.Stream`."""
  return streams.Stream(
    [(open_source(spec), weight) for spec, weight in specs],
    coder,
    seed=seed,
    reference=reference,
    max_bad=max(spec.get("max_bad", 0.0) for spec, _ in specs),
    keys=[_key(spec) for spec, _ in specs],
  )


def _key(spec: Mapping[str, Any]) -> str:
  """Returns what tells the content of a source in one large file, "" if none."""
  path = pathlib.Path(spec.get("path", ""))
  if not path.is_file() or path.stat().st_size < indexed.CACHED:
    return ""
  return json.dumps([dict(spec), indexed.stamp(path)], sort_keys=True)


@functools.cache
def _bad_rows(spec: str, max_bad: float) -> tuple[int, ...]:
  """Reads a source through, once a run, and says what is left out."""
  source = _open(json.loads(spec))
  found = sources.check(source, max_bad=max_bad)
  for _, message in found:
    LOG.warning("left out: %s", message)
  if found:
    LOG.warning("%d of %d rows left out", len(found), len(source))
  return tuple(index for index, _ in found)


def _open(spec: Mapping[str, Any]) -> Any:
  kinds = {
    "scenes": scenes.Scenes,
    "llava": sources.LlavaJson,
    "llava_text": WithoutImages,
    "preference": sources.JsonLines,
    "eval": sources.EvalJson,
    "classify": sources.ImageFolder,
    "segment": sources.SegmentFolder,
  }
  fields = dict(spec)
  kind = fields.pop("kind")
  fields.pop("given_by", None)
  max_bad = fields.pop("max_bad", 0.0)
  bad, group = fields.pop("bad", ""), fields.pop("group", False)
  if kind not in kinds:
    raise InputError(f"data kind {kind!r}: choose one of {sorted(kinds)}")
  if kind in ("classify", "segment"):
    fields["folder"] = fields.pop("path")
  if kind in ("llava", "llava_text", "preference") and max_bad:
    fields["flawed"] = True
  if fields.get("image_root") == "":
    fields["image_root"] = None
  source = kinds[kind](**fields)
  if len(source) == 0:
    raise InputError(f"{spec.get('path', kind)}: the data is empty")
  if bad:
    source = Readable(source, _listed(source, pathlib.Path(bad)))
  return grouping.Grouped(source) if group else source


def _listed(source: Any, path: pathlib.Path) -> tuple[int, ...]:
  """Returns the rows of a source that a file of `data check` names."""
  listed = indexed.File(path)
  names = {listed.record(i)["name"] for i in range(len(listed))}
  return tuple(i for i in range(len(source)) if source.name(i) in names)


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
    """Returns where a row stands in the file."""
    return self._source.name(self._kept[index])

  def text(self, index: int) -> Row:
    """Returns a row without decoding its image."""
    return self._source.text(self._kept[index])

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Returns the bytes of a row's image files."""
    return self._source.encoded(self._kept[index])


class WithoutImages:
  """The conversations of a LLaVA file as text alone, for a language model."""

  def __init__(
    self, path: str, image_root: str | None = None, *, flawed: bool = False
  ):
    self._source = sources.LlavaJson(path, image_root, flawed=flawed)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Row:
    return self.text(index)

  def name(self, index: int) -> str:
    """Returns where a row stands."""
    return self._source.name(index)

  def text(self, index: int) -> Row:
    """Returns a row without its image and image tags."""
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
