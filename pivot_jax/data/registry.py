"""The kinds of source that a config's `data` section can name.

A source has a length, rows by index with stable ids, `text(index)` for a row
without decoding its image, and `name(index)` for messages.
"""

from collections.abc import Mapping
from typing import Any

from pivot_jax.data import scenes, sources
from pivot_jax.errors import InputError

Row = Mapping[str, Any]


def open_source(spec: Mapping[str, Any]) -> Any:
  """Returns the source that a config's `data` entry describes.

  `kind` names it; the other fields are its constructor's arguments.
  """
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
