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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from pivot_jax import addresses, files
from pivot_jax.data import images, opener
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

# Settings that say how a run is shown or kept, not what it computes.
LOGGING_KEYS = (
  *("tensorboard", "profile", "save_every", "title", "shipped"),
  "workers",
)
# The one definition of what never makes another run, begun or finished: how it
# is shown, and where and how the same updates are computed.
FREE_KEYS = (*LOGGING_KEYS, "mesh", "accum", "pack", "compute")
# An update is made of `batch` examples, so that it decides what these kinds
# make. An unfinished training may all the same go on with another one: its place
# in the data is a number of examples. For other kinds it is a matter of memory.
_BATCH_COUNTS = ("train", "segment_probe")
_BATCH = "batch"
# Files of a training that goes on from a checkpoint.
_CONTINUED = (
  *("checkpoints", "metrics.jsonl", "speed.jsonl", "tensorboard", "profile"),
)
_BEGUN, _DONE, _CONFIG = "begun.json", "done.json", "config.json"
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
    """Return a hash per input and per file or folder of a source.

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
      self._stamps[key] = opener.open_source(spec.to_dict()).stamp()
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
  """Return whether a path names other files that hold the rows."""
  path = pathlib.Path(spec.path)
  return "*" in path.name or opener.format_of(path) in ("mixture", "mmpr")


def _mark(file: pathlib.Path, *, listed: bool) -> str | int:
  """Return the size of an image in a folder, the hash of any other file.

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


def free_keys(kind: str, *, begun: bool = False) -> tuple[str, ...]:
  """Return the settings that do not tell two stages of a kind apart.

  `begun`: the stage is not finished, so that the rest of a training may be made
  of other batches.
  """
  counts = kind in _BATCH_COUNTS and not begun
  return FREE_KEYS if counts else (*FREE_KEYS, _BATCH)


def fingerprint(kind: str, fields: Mapping[str, Any]) -> str:
  """Return the hash of the settings that decide a stage's result."""
  text = json.dumps(_deciding(fields, free_keys(kind)), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _deciding(fields: Mapping[str, Any], free: Sequence[str]) -> dict[str, Any]:
  """Return the settings that count, as they are read back from JSON."""
  kept = {key: value for key, value in fields.items() if key not in free}
  return json.loads(json.dumps(kept, default=list))


def finished(step: Step, inputs: Inputs) -> bool:
  """Return whether a stage is done; raise if it was done otherwise."""
  path = step.folder / _DONE
  if not path.exists():
    return False
  done = files.read_json(path)
  free, now = free_keys(step.kind), step.config.to_dict()
  if _deciding(done["fields"], free) != _deciding(now, free):
    raise InputError(
      f"{step.folder} was made with other settings "
      f"({_difference(done['fields'], now, free)}): use another "
      "--workdir, or delete the folder to make it again"
    )
  if done["inputs"] != inputs.of(step):
    raise InputError(
      f"{step.folder} was made from other inputs than there are now: delete it "
      "to make it again"
    )
  sums = _checksums(step.folder)
  changed = [n for n, mark in done["outputs"].items() if sums.get(n) != mark]
  if changed:
    raise InputError(
      f"{step.folder / changed[0]} is not what the stage wrote: delete "
      f"{step.folder} to make it again"
    )
  otherwise = _difference(done["fields"], now, LOGGING_KEYS)
  if otherwise:
    LOG.info("%s stays, made with other settings: %s", step.name, otherwise)
  return True


def check_folders(workdir: pathlib.Path, steps: Iterable[Step]) -> None:
  """Raise InputError if a stage's folder holds what no run has put there.

  Nothing is touched. A folder is the run's if a begun or finished stage is in
  it; an empty one may become so.
  """
  for step in steps:
    for place in reversed(step.folder.relative_to(workdir).parents[:-1]):
      _check_place(workdir / place, step.name)
    _check_own(step)


def _check_place(folder: pathlib.Path, name: str) -> None:
  if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
    what = "a symbolic link" if folder.is_symlink() else "a file"
    raise InputError(
      f"{folder}: is {what}, where {name} makes a folder of its own: move it "
      "away or use another --workdir"
    )


def _check_own(step: Step) -> None:
  """Raise InputError unless the stage's folder is absent, empty or its own."""
  folder = step.folder
  _check_place(folder, step.name)
  if not folder.exists() or any(
    _is_record(folder / n) for n in (_BEGUN, _DONE)
  ):
    return
  # A run that is killed while it writes the record leaves a file behind.
  inside = sorted(
    path.name
    for path in folder.iterdir()
    if not files.is_left_over(path, _BEGUN)
  )
  if inside:
    raise InputError(
      f"{folder}: holds {inside[0]!r}, but no {_BEGUN} or {_DONE} of a run, "
      f"and {step.name} would delete it: move the folder away or use "
      "another --workdir"
    )


def _is_record(path: pathlib.Path) -> bool:
  """Return whether a file is begun.json or done.json as a run writes them."""
  if path.is_symlink() or not path.is_file():
    return False
  try:
    content = files.read_json(path)
  except InputError:
    return False
  return isinstance(content, dict) and "config" in content


def begin(step: Step, inputs: Inputs) -> None:
  """Clear half a result, keeping committed checkpoints of the same making."""
  _check_own(step)
  step.folder.mkdir(parents=True, exist_ok=True)
  claim = step.folder / _BEGUN
  begun = {
    "config": fingerprint(step.kind, step.config.to_dict()),
    "inputs": inputs.of(step),
  }
  kept = claim.exists() and any((step.folder / "checkpoints").glob("*"))
  if kept:
    _check_begun(step, begun["inputs"])
  # A run that is killed before it writes the settings anew needs the old ones.
  stays = (_BEGUN, _CONFIG, *(_CONTINUED if kept else ()))
  for path in step.folder.iterdir():
    if path.name in stays:
      continue
    linked = path.is_symlink()
    shutil.rmtree(path) if path.is_dir() and not linked else path.unlink()
  files.write_json(claim, begun)
  files.write_json(step.folder / _CONFIG, step.config.to_dict())


def _check_begun(step: Step, inputs: Mapping[str, str]) -> None:
  """Raise if a stage with checkpoints was begun from something else."""
  before = files.read_json(step.folder / _CONFIG)
  free, now = free_keys(step.kind, begun=True), step.config.to_dict()
  other = ""
  if _deciding(before, free) != _deciding(now, free):
    other = f"settings ({_difference(before, now, free)})"
  elif files.read_json(step.folder / _BEGUN)["inputs"] != inputs:
    other = "inputs"
  if other:
    raise InputError(
      f"{step.folder} was begun with other {other}: delete it to make it again"
    )
  changed = _difference(before, now, LOGGING_KEYS)
  if changed:
    LOG.info("%s goes on with other settings: %s", step.name, changed)


def finish(
  step: Step, inputs: Inputs, metrics: Mapping[str, Any], seconds: float
) -> None:
  """Commit a result: `done.json` last, and only then the checkpoints go."""
  files.write_json(
    step.folder / _DONE,
    {
      "stage": step.name,
      "kind": step.kind,
      "config": fingerprint(step.kind, step.config.to_dict()),
      "fields": step.config.to_dict(),
      "inputs": inputs.of(step),
      "outputs": _checksums(step.folder),
      "metrics": metrics,
      "seconds": round(seconds, 2),
      "versions": files.versions(),
    },
  )
  shutil.rmtree(step.folder / "checkpoints", ignore_errors=True)
  (step.folder / _BEGUN).unlink()


def _checksums(folder: pathlib.Path) -> dict[str, str]:
  """Return a hash per result file; parameters have a fingerprint of theirs."""
  sums, about = {}, (_DONE, _BEGUN, _CONFIG)
  for path in sorted(folder.iterdir()):
    if path.is_file() and path.name not in about:
      sums[path.name] = _short_hash(path.read_bytes())
  return sums


def claim(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Write the run's config, or refuse a workdir of another configuration."""
  path = workdir / "config.json"
  now = json.loads(json.dumps(config.to_dict(), default=list))
  if path.exists():
    before = files.read_json(path)
    # Of another batch each stage judges for itself.
    free = (*FREE_KEYS, _BATCH)
    if _without(before, free) != _without(now, free):
      raise InputError(
        f"{workdir} belongs to another configuration "
        f"({_difference(before, now, free)}): use another --workdir"
      )
  else:
    files.write_json(path, now)


def _without(node: Any, keys: Sequence[str]) -> Any:
  if not isinstance(node, Mapping):
    return node
  return {
    key: _without(value, keys) for key, value in node.items() if key not in keys
  }


def _difference(
  before: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str]
) -> str:
  """Return the first few settings that differ, as `key: old -> new`."""
  old = _leaves(_without(before, free))
  new = _leaves(_without(json.loads(json.dumps(now, default=list)), free))
  changed = [
    f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
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
  """Hold the run's lock file; two runs of one workdir would mix."""
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
