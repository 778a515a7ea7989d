"""The kinds of source that a config's `data` section can name.

A source has a length, rows by index with stable ids, `text(index)` for a row
without decoding its image, and `name(index)` for messages.
"""

import functools
import json
import logging
from collections.abc import Mapping
from typing import Any

from pivot_jax.data import scenes, sources
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

Row = Mapping[str, Any]


def open_source(spec: Mapping[str, Any]) -> Any:
  """Returns the source that a config's `data` entry describes.

  `kind` names it, `max_bad` is the share of rows that may be left out because
  a field or the image cannot be read (0: none, and none is looked for); the
  other fields are its constructor's arguments.
  """
  given = dict(spec)
  max_bad = given.pop("max_bad", 0.0)
  if not 0 <= max_bad < 1:
    raise InputError(f"max_bad={max_bad}: give a share, 0 or more and under 1")
  source = _open(given)
  if not max_bad:
    return source
  bad = _bad_rows(json.dumps(given, sort_keys=True), max_bad)
  return Readable(source, bad) if bad else source


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
  if kind in ("classify", "segment"):
    fields["folder"] = fields.pop("path")
  if fields.get("image_root") == "":
    fields["image_root"] = None
  if kind not in kinds:
    raise InputError(f"data kind {kind!r}: choose one of {sorted(kinds)}")
  source = kinds[kind](**fields)
  if len(source) == 0:
    raise InputError(f"{spec.get('path', kind)}: the data is empty")
  return source


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


class WithoutImages:
  """The conversations of a LLaVA file as text alone, for a language model."""

  def __init__(self, path: str, image_root: str | None = None):
    self._source = sources.LlavaJson(path, image_root)

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
