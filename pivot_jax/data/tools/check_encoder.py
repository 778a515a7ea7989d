"""What a config says of its encoder: the size of an image, and its tokens.

Small files that describe weights are read, weights are not, and nothing is
fetched.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from pivot_jax import addresses


class Encoder(NamedTuple):
  """The side of an image in pixels, and its tokens; None: not known."""

  image_size: int | None
  patches: int | None


def read(config: ConfigDict) -> Encoder:
  """Return what is known of the encoder that the stages of a config read with.

  Of weights made by a stage, or of none, the config's sizes are true; of an
  artifact its model.json says them, of a Hugging Face folder its config.json.

  Raises:
    InputError: an address that is none.
  """
  section = config.get("vision")
  if section is None:
    return Encoder(None, None)
  address = _origin(config, section.get("init") or "")
  found = _described(address) if address else section.to_dict()
  side, patch, tokens = (
    found[name] if isinstance(found.get(name), int) else 0
    for name in ("image_size", "patch_size", "feature_tokens")
  )
  patches = tokens or (side and patch and (side // patch) ** 2)
  return Encoder(side or None, patches or None)


def _origin(config: ConfigDict, address: str) -> str:
  """Return where an encoder comes from before any stage trains it."""
  seen = set()
  while address.startswith("@"):
    name = address[1:].partition(":")[0]
    if name in seen or name not in config:
      return ""
    seen.add(name)
    inputs = config[name].get("inputs") or {}
    address = inputs.get("vision") or inputs.get("init") or ""
  return address


def _described(address: str) -> Mapping[str, Any]:
  """Return the sizes that stand beside weights, as far as they do."""
  kind, _, rest = address.partition(":")
  if kind in ("bv", "timm"):
    return {}
  if kind == "hf":
    folder = rest.partition("?")[0].partition(":")[0]
    # A model of the hub would be fetched.
    if not pathlib.Path(folder).expanduser().is_dir():
      return {}
  where = addresses.parse(address)
  if where.kind != "hf":
    return _json(where.path / "model.json").get("vision") or {}
  whole = _json(where.path / "config.json")
  found = dict(whole.get("vision_config") or whole)
  names = {"image_size": "image_size", "tokens": "feature_tokens"}
  return found | {
    name: where.options[option]
    for option, name in names.items()
    if option in where.options
  }


def _json(path: pathlib.Path) -> dict[str, Any]:
  """Return the object in a file; nothing if there is none."""
  try:
    found = json.loads(path.read_text("utf-8"))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}
