"""Hashes of the inputs of a stage, by which other files and weights are noticed.

A record of a stage says by which rules its hashes were made (`RULES`), so that
one of an earlier version is compared as it was written:

  1  a result counts by all its files, its times among them; an address by its
     folder, whatever choices stand behind it; weights of more than 16 MiB in a
     folder by size and ends; a list of files by the times of its files
  2  a result of the package's kinds counts by what decides what its readers
     compute, an address with its choices, weights by the whole of what is read
     of them, listed files by content, and a training's tokenizer by its files
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from pivot_jax import addresses, files, metrics, names
from pivot_jax.data import images, opener
from pivot_jax.errors import InputError
from pivot_jax.weights import artifacts

RULES = 2
# Files of more bytes are not read as a whole to be told apart.
_LARGE = 2**30
_SHARD = 2**24
_END = 2**20
# Of a folder of published weights, what is read; its card and its pickles are not.
_WEIGHTS = (".json", ".safetensors", ".npz", ".txt", ".model", ".jinja")
_TOKENIZER = (
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
  "merges.txt",
)
_MODEL = "model.json"
# Of a result, what no reader computes with: rates, and what model.json tells of
# places and versions; its fingerprint is one of these too.
_NOT_READ = ("speed.jsonl", "fingerprint.json", _MODEL)
_TOLD = ("versions", "sources", "detached_from")


@dataclasses.dataclass(frozen=True)
class Step:
  """One stage as it will run: its own name, config, inputs and folder."""

  name: str
  kind: str
  config: ConfigDict
  inputs: Mapping[str, str]
  folder: pathlib.Path


class Inputs:
  """Hashes of what stages read, each file looked at once in a run."""

  def __init__(self):
    self._known: dict[tuple[pathlib.Path, bool], str] = {}
    self._rows: dict[tuple[str, int], str] = {}

  def of(self, step: Step, *, rules: int = RULES) -> dict[str, str]:
    """Return a hash per input and per file or folder of a source.

    A stage counts by its results, for a report and a kind of the user's own
    its numbers too; an artifact by its fingerprint, files by their content,
    those of the user's own code among them. In a folder images count by name
    and size.

    Args:
      rules: by which the hashes are made, see above.

    Raises:
      InputError: rules of a later version.
    """
    if rules not in (1, RULES):
      raise InputError(
        f"{step.folder}: was recorded by a later version (rules {rules!r}): use "
        "that one, or another --workdir"
      )
    texts = {}
    for name in sorted(step.inputs):
      texts[name] = self._input(step, name, rules)
    for name, spec in step.config.get("sources", {}).items():
      for field in ("path", "image_root", "bad", "tokenizer"):
        if spec.get(field):
          place = files.input_path(spec[field])
          texts[f"{name}.{field}"] = self._files(place)
      own = names.is_own(spec.get("kind", ""))
      if own or (spec.get("path") and _lists(spec)):
        texts[f"{name}.rows"] = self._listed(spec, 1 if own else rules)
    for own in own_names(step):
      texts[f"code of {own}"] = self._files(names.file_of(own))
    if rules > 1 and step.kind == "train" and step.config.get("tokenizer"):
      folder = addresses.tokenizer_folder(step.config.tokenizer)
      held = [folder / name for name in _TOKENIZER if (folder / name).exists()]
      texts["tokenizer"] = "".join(map(self._files, held))
    return {name: short_hash(text.encode()) for name, text in texts.items()}

  def _input(self, step: Step, name: str, rules: int) -> str:
    """Return what tells the weights or the result at an address apart."""
    where = addresses.parse(step.inputs[name])
    folder = where.path
    done, prints = folder / "done.json", folder / "fingerprint.json"
    own = names.is_own(step.kind)
    parts = []
    if done.exists():
      record = metrics.read_record(done, "kind", "outputs", "metrics")
      # What a kind of the user's own writes under these names is not known.
      decides = rules > 1 and not names.is_own(record["kind"])
      outputs = record["outputs"]
      made = [_without(outputs, _NOT_READ) if decides else outputs]
      if step.kind == "report" or own:
        made.append(record["metrics"])
      parts = [json.dumps(x, sort_keys=True) for x in made]
    else:
      decides = rules > 1
      if not prints.exists():
        parts = [self._files(folder, weights=decides and not own)]
    if prints.exists() and (decides or not done.exists()):
      parts.append(artifacts.leaf_prints(prints))
      parts.append(_model(folder / _MODEL) if decides else "")
    return "".join(parts) + (_choices(where, name) if rules > 1 else "")

  def _listed(self, spec: ConfigDict, rules: int) -> str:
    """Return what tells the rows apart that lie in other files than `path`."""
    key = json.dumps(spec.to_dict(), sort_keys=True, default=list), rules
    if key not in self._rows:
      if rules > 1:
        marks = [
          _mark(x, shard=x.suffix == ".parquet")
          for x in opener.files_of(spec.to_dict())
        ]
        self._rows[key] = json.dumps(marks)
      else:
        self._rows[key] = opener.open_source(spec.to_dict()).stamp()
    return self._rows[key]

  def _files(self, path: pathlib.Path, *, weights: bool = False) -> str:
    """Return the marks of a file, or of a folder's; `weights`: see `_WEIGHTS`."""
    key = path, weights
    if key not in self._known:
      inside = sorted(path.rglob("*")) if path.is_dir() else [path]
      if weights and path.is_dir():
        inside = [file for file in inside if _is_read(file.relative_to(path))]
      self._known[key] = json.dumps(
        [
          [str(file.relative_to(path)), self._mark_in(path, file, weights)]
          for file in inside
          if file.is_file()
        ]
      )
    return self._known[key]

  def _mark_in(self, path: pathlib.Path, file: pathlib.Path, weights: bool):
    """Return the mark of a file; in a folder, an image's is its size."""
    shard = file != path
    if shard and file.suffix.lower() in images.SUFFIXES:
      return file.stat().st_size
    return _mark(file, shard=shard, whole=weights)


def own_names(step: Step) -> list[str]:
  """Return what of a stage is the user's own code."""
  sources = step.config.get("sources", {}).values()
  asked = (step.kind, step.config.get("objective", ""))
  found = (*asked, *(spec.get("kind", "") for spec in sources))
  return sorted({name for name in found if names.is_own(name)})


def short_hash(content: bytes) -> str:
  """Return the first 16 digits of the SHA-256 of bytes."""
  return hashlib.sha256(content).hexdigest()[:16]


def _choices(where: addresses.Address, name: str) -> str:
  """Return what of an address chooses among the weights at its path.

  An input that is called as a part takes that part in any case.
  """
  part = "" if where.part == name else where.part
  chosen = [part, where.inside, where.options]
  return json.dumps(chosen, sort_keys=True) if any(chosen) else ""


def _is_read(inside: pathlib.Path) -> bool:
  """Return whether a file of a folder of weights is one that is read."""
  hidden = any(part.startswith(".") for part in inside.parts)
  return inside.suffix in _WEIGHTS and not hidden


def _without(held: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
  return {key: value for key, value in held.items() if key not in keys}


def _model(path: pathlib.Path) -> str:
  """Return what readers of an artifact take from its model.json."""
  if not path.exists():
    return ""
  found = files.read_object(path)
  found = _without(found, _TOLD)
  if isinstance(found.get("unread"), dict):
    found["unread"] = _without(found["unread"], ("address",))
  return json.dumps(found, sort_keys=True)


def _lists(spec: ConfigDict) -> bool:
  """Return whether a path names other files that hold the rows."""
  path = pathlib.Path(spec.path)
  return "*" in path.name or opener.format_of(path) in ("mixture", "mmpr")


def _mark(file: pathlib.Path, *, shard: bool, whole: bool = False) -> str:
  """Return the hash of a file.

  Unless the whole of it counts, a file of gigabytes and a shard count by size
  and ends.
  """
  size = file.stat().st_size
  # Shards are many, and each is large.
  if not whole and size > (_SHARD if shard else _LARGE):
    with file.open("rb") as opened:
      ends = opened.read(_END)
      opened.seek(size - _END)
      return f"{size} {short_hash(ends + opened.read())}"
  with file.open("rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()
