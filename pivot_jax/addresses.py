"""Addresses of weights: one syntax in configs, on the command line, in Python.

  DIR                    an artifact of ours      package:toy   one that ships
  hf:DIR, hf:org/name    a Hugging Face folder, or model of the hub
  bv:FILE.npz            big_vision's SigLIP      timm:FILE.safetensors

A subtree may follow after a colon (`DIR:vision`, `bv:FILE.npz:img`), and
choices after a question mark: `hf:DIR?image_size=378&positions=dinov2`.

Files name addresses, too, and may be foreign. Of those only what a caller, a
config or the command line named in this process is read (`name`, `is_named`).
"""

import functools
import importlib.resources
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pivot_jax import texts
from pivot_jax.errors import InputError

FOREIGN = ("hf", "bv", "timm")
# What may stand after "?", and how it is read.
_OPTIONS: Mapping[str, tuple[Callable[[str], Any], str]] = {
  "image_size": (int, "a whole number of pixels"),
  "positions": (str, "big_vision or dinov2"),
  "tokens": (int, "a square number, as 576"),
  "feature_layer": (int, "a whole number, as -2"),
  "final_norm": (
    lambda text: {"true": True, "false": False}[text.lower()],
    "true or false",
  ),
  "revision": (str, "a name"),
  "tower": (str, "the folder of an MLLM's encoder"),
}
# The choices that say which blocks are read, and so which are not.
_LAYER = ("feature_layer", "final_norm")
# Folders, files, and models of the hub by their names.
_named: set[pathlib.Path | str] = set()
# What a model of the hub is read from; pickles are not even downloaded.
_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")


class Address(NamedTuple):
  """A parsed address; `kind` is dir, package, hf, bv or timm.

  part: of the model, vision, projector or llm; empty for all of it.
  inside: of an npz file, the subtree that holds the tower.
  origin: an address by which the same weights are found again from elsewhere,
    read to the same layer: an absolute path, or a model of the hub with its
    revision.
  """

  kind: str
  path: pathlib.Path
  part: str
  options: dict[str, Any]
  inside: str = ""
  origin: str = ""


def parse(address: str) -> Address:
  """Return the parts of an address; a model of the hub is found or fetched.

  Raises:
    InputError: no folder or file named, an unknown option, or a model that is
      not in the local cache while the hub cannot be asked.
  """
  kind, name, part, query = _split(address)
  options = _options(address, query)
  if options and kind not in FOREIGN:
    raise InputError(
      f"{address}: choices after ? are for published weights; an artifact has"
      " made its own (model.json)"
    )
  if "tower" in options and kind != "hf":
    raise InputError(f"{address}: a tower is of an MLLM's folder, hf:DIR")
  if not name:
    raise InputError(f"{address!r} names no folder: give DIR or DIR:subtree")
  path = _path(kind, name)
  if kind == "package":
    return Address(kind, path, part, options)
  origin, kept = str(path.absolute()), {}
  if _is_hub(kind, name, path):
    path = _from_hub(name, options.get("revision"))
    origin, kept = name, {"revision": path.name}
  elif "revision" in options:
    raise InputError(
      f"{address}: a revision is of a model of the hub, and this is a file or a"
      " folder"
    )
  inside = ""
  if kind == "bv" and part != "vision":
    inside, part = part, ""
  kept |= {name: options[name] for name in _LAYER if name in options}
  if "tower" in options:
    kept["tower"] = str(_path("hf", options["tower"]).absolute())
  query = urllib.parse.urlencode({k: _spell(v) for k, v in kept.items()})
  origin = f"{kind}:{origin}{f':{inside}' if inside else ''}"
  origin += f"?{query}" if query else ""
  return Address(kind, path, part, options, inside, origin)


def is_there(address: str) -> bool:
  """Return whether an address names a file, a folder or a model of the hub.

  The hub is not asked.
  """
  kind, name, _, _ = _split(address)
  path = _path(kind, name)
  return bool(name) and (path.exists() or _is_hub(kind, name, path))


def tokenizer_folder(address: str) -> pathlib.Path:
  """Return the tokenizer folder of an artifact, or the folder itself."""
  folder = parse(address).path
  nested = folder / "tokenizer"
  return nested if nested.is_dir() else folder


def name(address: str) -> None:
  """Note an address as one that a person named."""
  _named.update(_places(address))


def is_named(address: str) -> bool:
  """Return whether an address, or a folder around it, was named.

  A model of the hub counts in any revision. Nothing is fetched or opened.
  """
  return all(
    place in _named
    or (
      isinstance(place, pathlib.Path) and not _named.isdisjoint(place.parents)
    )
    for place in _places(address)
  )


def _places(address: str) -> list[pathlib.Path | str]:
  """Return what an address reads from, links followed."""
  kind, name, _, query = _split(address)
  path = _path(kind, name)
  found: list[pathlib.Path | str] = [
    name if _is_hub(kind, name, path) else path.resolve()
  ]
  for tower in urllib.parse.parse_qs(query).get("tower", ()):
    found.append(_path("hf", tower).resolve())
  return found


def _split(address: str) -> tuple[str, str, str, str]:
  """Return kind, name, part and query."""
  kind, rest = "dir", address
  for prefix in ("package", *FOREIGN):
    if address.startswith(prefix + ":"):
      kind, rest = prefix, address[len(prefix) + 1 :]
  rest, _, query = rest.partition("?")
  name, _, part = rest.partition(":")
  if "\0" in rest or len(rest) > _LONGEST:
    raise InputError(f"{texts.shown(address, longest=100)}: is no address")
  return kind, name, part, query


def _path(kind: str, name: str) -> pathlib.Path:
  if kind == "package":
    root = importlib.resources.files("pivot_jax") / "assets"
    return pathlib.Path(str(root)) / name
  try:
    return pathlib.Path(name).expanduser()
  except RuntimeError as error:
    raise InputError(f"{name}: {error}") from error


def _is_hub(kind: str, name: str, path: pathlib.Path) -> bool:
  known = kind == "hf" and re.fullmatch(_HUB_ID, name)
  return bool(known) and not path.exists()


def _spell(value: Any) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


_LONGEST = 4000  # characters of a path
_HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"


def _options(address: str, query: str) -> dict[str, Any]:
  found = {}
  for name, text in urllib.parse.parse_qsl(query, keep_blank_values=True):
    if name not in _OPTIONS:
      raise InputError(
        f"{address}: unknown choice {name!r}; there are {', '.join(_OPTIONS)}"
      )
    if name in found:
      raise InputError(f"{address}: {name} is given twice")
    read, words = _OPTIONS[name]
    try:
      found[name] = read(text)
    except (ValueError, KeyError):
      raise InputError(f"{address}: {name}={text!r}: give {words}") from None
  return found


@functools.lru_cache(maxsize=64)
def _from_hub(name: str, revision: str | None) -> pathlib.Path:
  """Return the folder of a model in the local cache, fetched if need be."""
  import huggingface_hub
  from huggingface_hub import errors

  try:
    folder = huggingface_hub.snapshot_download(
      name, revision=revision, allow_patterns=list(_FILES)
    )
  except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
    reason = str(error).strip().splitlines()[0]
    raise InputError(
      f"hf:{name}: no such folder, and the hub did not give it ({reason});"
      f" download it where there is a network, by `hf download {name}`, or give"
      " a folder as hf:DIR"
    ) from None
  return pathlib.Path(folder)
