"""model.json of an artifact that may be foreign: every field of its own type."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from pivot_jax import files
from pivot_jax.data import framing
from pivot_jax.errors import InputError
from pivot_jax.models import bounds, qwen2, vit

_Check = Callable[[Any], bool]


def read(path: pathlib.Path) -> dict[str, Any]:
  """Return the content of a model.json.

  Raises:
    InputError: naming the file, and the field that is missing or is not as it
      is written here.
  """
  meta = files.read_object(path)
  missing = [name for name in _NEEDED if name not in meta]
  if missing:
    raise InputError(f"{path}: has no {missing[0]}")
  for name, (check, words) in _FIELDS.items():
    value = meta.get(name)
    if value is None and name != "not_carried":
      continue
    if not check(value):
      raise InputError(
        f"{path}: {name} is {bounds.told(value)}; it must be {words}"
      )
  try:
    configs(meta)
    resample = (meta.get("preprocessing") or {}).get("resample")
    if resample is not None:
      framing.parse_resample(resample)
  except InputError as error:
    raise InputError(f"{path}: {error}") from error
  return meta


def configs(
  meta: Mapping[str, Any],
) -> tuple[vit.VisionConfig | None, qwen2.LLMConfig | None]:
  """Return the configurations that model.json holds.

  Raises:
    InputError: a field that is unknown, missing or out of its range.
  """
  return (
    _config(vit.VisionConfig, "vision", meta["vision"]),
    _config(qwen2.LLMConfig, "llm", meta["llm"]),
  )


def _config(kind: Callable[..., Any], name: str, found: Any) -> Any:
  if found is None:
    return None
  # JSON has lists for tuples.
  fields = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
  try:
    return kind(**fields)
  except InputError as error:
    raise InputError(f"{name}: {error}") from error
  except TypeError as error:
    # A name of a field is missing or is none.
    raise InputError(f"{name}: {error}") from error


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and len(value) < 10_000


def _is_texts(value: Any) -> bool:
  return isinstance(value, list) and all(map(_is_text, value))


def _is_pairs(value: Any) -> bool:
  return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_sources(value: Any) -> bool:
  return isinstance(value, dict) and all(
    _is_text(x) or _is_texts(x) for x in value.values()
  )


def _is_not_carried(value: Any) -> bool:
  return isinstance(value, list) and all(
    _is_pairs(x) and x.keys() == {"name", "reason"} for x in value
  )


def _is_unread(value: Any) -> bool:
  if not isinstance(value, dict):
    return False
  said = all(_is_text(value.get(k)) for k in ("address", "fingerprint"))
  listed = all(_is_texts(value.get(k)) for k in ("modules", "absent"))
  return said and listed and _is_text(value.get("copy", ""))


_NEEDED = ("vision", "llm", "not_carried")
_OBJECT: tuple[_Check, str] = (
  lambda value: isinstance(value, dict),
  "an object or null",
)
_TEXT: tuple[_Check, str] = (_is_text, "a text")
# Of the fields that are not listed none is read.
_FIELDS: Mapping[str, tuple[_Check, str]] = {
  "vision": _OBJECT,
  "llm": _OBJECT,
  "not_carried": (_is_not_carried, "a list of names and reasons"),
  "sources": (_is_sources, "texts, or lists of them, by part"),
  "versions": (_is_pairs, "texts by package"),
  "preprocessing": (_is_pairs, "texts: resize and resample"),
  "unread": (
    _is_unread,
    "the texts address and fingerprint and the lists modules and absent",
  ),
  "parts": (_is_texts, "a list of texts"),
  **dict.fromkeys(
    ("tokenizer", "template", "mask", "stage", "detached_from"), _TEXT
  ),
}
