"""Hashes of the inputs of a stage, by which other files and weights are noticed.

A record of a stage says by which rules its hashes were made (`RULES`), so that
one of an earlier version is compared as it was written:

  1  a result counts by all its files, its times among them; an address by its
     folder, whatever choices stand behind it; weights of more than 16 MiB in a
     folder by size and ends; a list of files by the times of its files
  2  a result counts by what decides what its readers compute, an address with
     its choices, weights and listed files by content, and a training's
     tokenizer by its rules
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from pivot_jax import addresses, files, metrics, names
from pivot_jax.data import images, opener
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError
from pivot_jax.weights import artifacts

RULES = 2
# Files of more bytes are not read as a whole to be told apart.
_LARGE = 2**30
_SHARD = 2**24
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
    self._tokenizers: dict[str, str] = {}

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
    for name, address in sorted(step.inputs.items()):
      texts[name] = self._input(step, address, rules)
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
      texts["tokenizer"] = self._tokenizer(step.config.tokenizer)
    return {name: short_hash(text.encode()) for name, text in texts.items()}

  def _input(self, step: Step, address: str, rules: int) -> str:
    """Return what tells the weights or the result at an address apart."""
    where = addresses.parse(address)
    folder = where.path
    done, prints = folder / "done.json", folder / "fingerprint.json"
    if done.exists():
      record = metrics.read_record(done, "outputs", "metrics")
      made = [record["outputs"]]
      if rules > 1:
        kept = record["outputs"].items()
        made = [{k: v for k, v in kept if k not in _NOT_READ}]
      if step.kind == "report" or names.is_own(step.kind):
        made.append(record["metrics"])
      found = "".join(json.dumps(x, sort_keys=True) for x in made)
      if rules > 1 and prints.exists():
        found += artifacts.leaf_prints(prints)
    elif prints.exists():
      found = artifacts.leaf_prints(prints)
    else:
      return self._files(folder, whole=rules > 1) + _choices(where, rules)
    if rules > 1:
      found += _model(folder / _MODEL)
    return found + _choices(where, rules)

  def _listed(self, spec: ConfigDict, rules: int) -> str:
    """Return what tells the rows apart that lie in other files than `path`."""
    key = json.dumps(spec.to_dict(), sort_keys=True, default=list), rules
    if key not in self._rows:
      if rules > 1:
        marks = [self._files(x) for x in opener.files_of(spec.to_dict())]
        self._rows[key] = json.dumps(marks)
      else:
        self._rows[key] = opener.open_source(spec.to_dict()).stamp()
    return self._rows[key]

  def _tokenizer(self, address: str) -> str:
    if address not in self._tokenizers:
      folder = addresses.tokenizer_folder(address)
      self._tokenizers[address] = load_tokenizer(folder).fingerprint
    return self._tokenizers[address]

  def _files(self, path: pathlib.Path, *, whole: bool = False) -> str:
    key = path, whole
    if key not in self._known:
      inside = sorted(path.rglob("*")) if path.is_dir() else [path]
      self._known[key] = json.dumps(
        [
          [
            str(file.relative_to(path)),
            _mark(file, listed=file != path, whole=whole),
          ]
          for file in inside
          if file.is_file()
        ]
      )
    return self._known[key]


def own_names(step: Step) -> list[str]:
  """Return what of a stage is the user's own code."""
  sources = step.config.get("sources", {}).values()
  asked = (step.kind, step.config.get("objective", ""))
  found = (*asked, *(spec.get("kind", "") for spec in sources))
  return sorted({name for name in found if names.is_own(name)})


def short_hash(content: bytes) -> str:
  """Return the first 16 digits of the SHA-256 of bytes."""
  return hashlib.sha256(content).hexdigest()[:16]


def _choices(where: addresses.Address, rules: int) -> str:
  """Return what of an address chooses among the weights at its path."""
  chosen = [where.part, where.inside, where.options]
  return json.dumps(chosen, sort_keys=True) if rules > 1 and any(chosen) else ""


def _model(path: pathlib.Path) -> str:
  """Return what readers of an artifact take from its model.json."""
  if not path.exists():
    return ""
  found = files.read_object(path)
  unread = found.get("unread") or {}
  found = {k: v for k, v in found.items() if k not in _TOLD}
  found["unread"] = {k: v for k, v in unread.items() if k != "address"}
  return json.dumps(found, sort_keys=True)


def _lists(spec: ConfigDict) -> bool:
  """Return whether a path names other files that hold the rows."""
  path = pathlib.Path(spec.path)
  return "*" in path.name or opener.format_of(path) in ("mixture", "mmpr")


def _mark(file: pathlib.Path, *, listed: bool, whole: bool) -> Any:
  """Return the size of an image in a folder, the hash of any other file.

  Unless the whole of it counts, a file of gigabytes and a shard of a folder
  count by size and ends.
  """
  size = file.stat().st_size
  if listed and file.suffix.lower() in images.SUFFIXES:
    return size
  # Shards are many, and each is large.
  if not whole and size > (_SHARD if listed else _LARGE):
    with file.open("rb") as opened:
      ends = opened.read(2**20)
      opened.seek(size - 2**20)
      return f"{size} {short_hash(ends + opened.read())}"
  with file.open("rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()
