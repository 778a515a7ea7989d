"""The run directory: what is finished, begun, claimed, and from which inputs.

A stage's folder is its result once `done.json` stands in it, written last;
until then `begun.json` says with which settings and inputs it was begun. Both
hold hashes, so that a changed setting, file or weight is an error and never a
mixture of two runs. Nothing here knows what a stage does.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from pivot_jax import addresses, files
from pivot_jax.data import images, registry
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

# Fields that say how a run is shown or kept, not what it computes.
LOGGING_KEYS = (
  *("tensorboard", "profile", "save_every", "title", "shipped"),
  "workers",
)
# What a training may go on with otherwise than it began: its place in the data is
# a number of examples, and its state does not depend on where it lies.
_CHANGEABLE = ("batch", "accum", "mesh", "pack")
_FREE = (*LOGGING_KEYS, *_CHANGEABLE)
# Files of more bytes are not read as a whole to be told apart.
_LARGE = 2**30
_SHARD = 2**24


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
    self._known: dict[pathlib.Path, str] = {}
    self._stamps: dict[str, str] = {}

  def of(self, step: Step) -> dict[str, str]:
    """Returns a hash per input and per file or folder of a source.

    A stage counts by its results, an artifact by its fingerprint, files by
    their content. In a folder images count by name and size.
    """
    texts = {}
    for name, address in sorted(step.inputs.items()):
      folder = addresses.parse(address).path
      done, prints = folder / "done.json", folder / "fingerprint.json"
      if done.exists():
        outputs = files.read_json(done)["outputs"]
        texts[name] = json.dumps(outputs, sort_keys=True)
      elif prints.exists():
        texts[name] = prints.read_text(encoding="utf-8")
      else:
        texts[name] = self._files(folder)
    for name, spec in step.config.get("sources", {}).items():
      for field in ("path", "image_root", "bad", "tokenizer"):
        if spec.get(field):
          texts[f"{name}.{field}"] = self._files(pathlib.Path(spec[field]))
      if spec.get("path") and _lists(spec):
        texts[f"{name}.rows"] = self._stamp(spec)
    return {name: _short_hash(text.encode()) for name, text in texts.items()}

  def _stamp(self, spec: ConfigDict) -> str:
    """Return the stamp of a source, which is opened once in a run."""
    key = json.dumps(spec.to_dict(), sort_keys=True, default=list)
    if key not in self._stamps:
      self._stamps[key] = registry.open_source(spec.to_dict()).stamp()
    return self._stamps[key]

  def _files(self, path: pathlib.Path) -> str:
    if path not in self._known:
      inside = sorted(path.rglob("*")) if path.is_dir() else [path]
      self._known[path] = json.dumps(
        [
          [str(file.relative_to(path)), _mark(file, listed=file != path)]
          for file in inside
          if file.is_file()
        ]
      )
    return self._known[path]


def _lists(spec: ConfigDict) -> bool:
  """Returns whether a path names other files that hold the rows."""
  path = pathlib.Path(spec.path)
  return "*" in path.name or registry.format_of(path) in ("mixture", "mmpr")


def _mark(file: pathlib.Path, *, listed: bool) -> str | int:
  """Returns the size of an image in a folder, the hash of any other file.

  A file of gigabytes counts by its size and its ends.
  """
  size = file.stat().st_size
  if listed and file.suffix.lower() in images.SUFFIXES:
    return size
  # Shards are many, and each is large.
  if size > (_SHARD if listed else _LARGE):
    with file.open("rb") as opened:
      ends = opened.read(2**20)
      opened.seek(size - 2**20)
      return f"{size} {_short_hash(ends + opened.read())}"
  with file.open("rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()


def _short_hash(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]


def fingerprint(step: Step, without: Sequence[str] = ()) -> str:
  """Returns the hash of a stage's own config, without logging keys."""
  fields = {
    key: value
    for key, value in step.config.to_dict().items()
    if key not in LOGGING_KEYS and key not in without
  }
  text = json.dumps(fields, sort_keys=True, default=list)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished(step: Step, inputs: Inputs) -> bool:
  """Returns whether a stage is done; raises if it was done otherwise."""
  path = step.folder / "done.json"
  if not path.exists():
    return False
  done = files.read_json(path)
  if done["config"] != fingerprint(step):
    raise InputError(
      f"{step.folder} was made with other settings "
      f"({_difference(done['fields'], step.config.to_dict())}): use another "
      "--workdir, or delete the folder to make it again"
    )
  if done["inputs"] != inputs.of(step):
    raise InputError(
      f"{step.folder} was made from other inputs than there are now: delete it "
      "to make it again"
    )
  now = _checksums(step.folder)
  changed = [n for n, mark in done["outputs"].items() if now.get(n) != mark]
  if changed:
    raise InputError(
      f"{step.folder / changed[0]} is not what the stage wrote: delete "
      f"{step.folder} to make it again"
    )
  return True


def begin(step: Step, inputs: Inputs) -> None:
  """Clears half a result, keeping committed checkpoints of the same making."""
  step.folder.mkdir(parents=True, exist_ok=True)
  claim = step.folder / "begun.json"
  begun = {
    "config": fingerprint(step, _CHANGEABLE),
    "inputs": inputs.of(step),
  }
  kept = any((step.folder / "checkpoints").glob("*"))
  if kept and claim.exists():
    if files.read_json(claim) != begun:
      raise InputError(
        f"{step.folder} was begun with other settings or inputs: delete it to "
        "make it again"
      )
    before = files.read_json(step.folder / "config.json")
    changed = _difference(before, step.config.to_dict())
    if changed:
      LOG.info("%s goes on with other settings: %s", step.name, changed)
  for path in step.folder.iterdir():
    if path.name not in ("checkpoints", "metrics.jsonl", claim.name):
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  files.write_json(claim, begun)
  files.write_json(step.folder / "config.json", step.config.to_dict())


def finish(
  step: Step, inputs: Inputs, metrics: Mapping[str, Any], seconds: float
) -> None:
  """Commits a result: `done.json` last, and only then the checkpoints go."""
  files.write_json(
    step.folder / "done.json",
    {
      "stage": step.name,
      "kind": step.kind,
      "config": fingerprint(step),
      "fields": step.config.to_dict(),
      "inputs": inputs.of(step),
      "outputs": _checksums(step.folder),
      "metrics": metrics,
      "seconds": round(seconds, 2),
      "versions": files.versions(),
    },
  )
  shutil.rmtree(step.folder / "checkpoints", ignore_errors=True)
  (step.folder / "begun.json").unlink()


def _checksums(folder: pathlib.Path) -> dict[str, str]:
  """Returns a hash per result file; parameters have a fingerprint of theirs."""
  sums, about = {}, ("done.json", "begun.json", "config.json")
  for path in sorted(folder.iterdir()):
    if path.is_file() and path.name not in about:
      sums[path.name] = _short_hash(path.read_bytes())
  return sums


def claim(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Writes the run's config, or refuses a workdir of another configuration."""
  path = workdir / "config.json"
  now = json.loads(json.dumps(config.to_dict(), default=list))
  if path.exists():
    before = files.read_json(path)
    if _without(before, _FREE) != _without(now, _FREE):
      raise InputError(
        f"{workdir} belongs to another configuration "
        f"({_difference(before, now)}): use another --workdir"
      )
  else:
    files.write_json(path, now)


def _without(node: Any, keys: Sequence[str]) -> Any:
  if not isinstance(node, Mapping):
    return node
  return {
    key: _without(value, keys) for key, value in node.items() if key not in keys
  }


def _difference(before: Mapping, now: Mapping) -> str:
  """Returns the first few settings that differ, as `key: old -> new`."""
  old, new = _leaves(before), _leaves(json.loads(json.dumps(now, default=list)))
  changed = [
    f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and key.split(".")[-1] not in LOGGING_KEYS
  ]
  return "; ".join(changed[:4]) + (" ..." if len(changed) > 4 else "")


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(node, Mapping):
    return {prefix: node}
  found: dict[str, Any] = {}
  for key, value in node.items():
    found |= _leaves(value, f"{prefix}.{key}" if prefix else str(key))
  return found


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the run's lock file; two runs of one workdir would mix."""
  with (workdir / "lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise InputError(
        f"{workdir} is in use by another process: wait for it or use another "
        "--workdir"
      ) from error
    file.write(str(os.getpid()))
    yield
