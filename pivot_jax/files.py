"""JSON files, the versions of what wrote them, and which paths are local."""

import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pivot_jax.errors import InputError

# Of it, texts and numbers, those of numpy and paths among them.
Content = Mapping[str, Any] | Sequence[Any]
# One slash is left of two where an address has already become a path.
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


def local_path(path: str | os.PathLike, name: str) -> pathlib.Path:
  """Return a path to write to; raises InputError for gs://... and the like.

  A folder `gs:` would be made of it. `name` is that of the flag or argument.
  """
  text = os.fspath(path)
  if _REMOTE.match(text):
    raise InputError(
      f"{name}={text}: only folders of this machine are written; give one, and "
      "copy it there afterwards"
    )
  return pathlib.Path(text)


def write_json(path: pathlib.Path, content: Content) -> None:
  """Write JSON aside and renames it into place."""
  aside = path.with_name(path.name + ".tmp")
  text = json.dumps(content, indent=2, sort_keys=True, default=_plain)
  aside.write_text(text + "\n", encoding="utf-8")
  aside.rename(path)


def read_json(path: pathlib.Path) -> Any:
  """Return the content of a JSON file; raises InputError naming it."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: not readable as JSON ({error})") from error


def versions() -> dict[str, str]:
  """Return the versions of what computes and stores, for every record."""
  names = ("pivot_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
  found = {name: importlib.metadata.version(name) for name in names}
  return found | {"python": platform.python_version()}


def _plain(value):
  if isinstance(value, (np.integer, np.floating)):
    return value.item()
  if isinstance(value, pathlib.Path):
    return str(value)
  raise TypeError(f"{type(value).__name__} does not go into JSON")
