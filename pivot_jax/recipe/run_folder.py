"""The run directory: what is finished, begun, claimed, and from which inputs.

A stage's folder is its result once `done.json` stands in it, written last;
until then `begun.json` says with which settings and inputs it was begun. Both
hold hashes, so that a changed setting, file or weight is noticed and never
makes a mixture of two runs: `change` tells it, and what is replaced stays as
`STAGE.old` until the new one is done. Nothing here knows what a stage does.
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

from pivot_jax import addresses, files, metrics, names
from pivot_jax.data import images, opener
from pivot_jax.errors import InputError
from pivot_jax.recipe import settings

LOG = logging.getLogger("pivot_jax")

# Settings that say how a run is shown or kept, not what it computes.
LOGGING_KEYS = (
  *("tensorboard", "writers", "profile", "save_every", "title", "shipped"),
  *("workers", "arm", "measure"),
)
# A kind of the user's own may compute with what others only are shown by.
_OWN_FREE = ("tensorboard", "writers", "profile", "mesh", "arm", "measure")
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
  "writers",
)
_BEGUN, _DONE, _CONFIG = "begun.json", "done.json", "config.json"
# A folder that holds the last record is a result that was set aside.
_OLD, _ASIDE = ".old", "replaced.json"
_RECORDS = (_BEGUN, _DONE, _ASIDE)
# Sizes of parts that a stage makes itself; given weights bring theirs.
_PARTS = ("vision", "llm")
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

    A stage counts by its results, for a report and a kind of the user's own
    its numbers too; an artifact by its fingerprint, files by their content,
    those of the user's own code among them. In a folder images count by name
    and size.
    """
    texts = {}
    for name, address in sorted(step.inputs.items()):
      folder = addresses.parse(address).path
      done, prints = folder / "done.json", folder / "fingerprint.json"
      if done.exists():
        record = metrics.read_done(done, "outputs", "metrics")
        made = [record["outputs"]]
        if step.kind == "report" or names.is_own(step.kind):
          made.append(record["metrics"])
        texts[name] = "".join(json.dumps(x, sort_keys=True) for x in made)
      elif prints.exists():
        texts[name] = prints.read_text(encoding="utf-8")
      else:
        texts[name] = self._files(folder)
    for name, spec in step.config.get("sources", {}).items():
      for field in ("path", "image_root", "bad", "tokenizer"):
        if spec.get(field):
          texts[f"{name}.{field}"] = self._files(pathlib.Path(spec[field]))
      own = names.is_own(spec.get("kind", ""))
      if own or (spec.get("path") and _lists(spec)):
        texts[f"{name}.rows"] = self._stamp(spec)
    for own in _own_names(step):
      texts[f"code of {own}"] = self._files(names.file_of(own))
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


def _own_names(step: Step) -> list[str]:
  """Return what of a stage is the user's own code."""
  sources = step.config.get("sources", {}).values()
  asked = (step.kind, step.config.get("objective", ""))
  found = (*asked, *(spec.get("kind", "") for spec in sources))
  return sorted({name for name in found if names.is_own(name)})


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
  if names.is_own(kind):
    return _OWN_FREE
  counts = kind in _BATCH_COUNTS and not begun
  return FREE_KEYS if counts else (*FREE_KEYS, _BATCH)


def _unused(step: Step) -> tuple[str, ...]:
  """Return the shared settings that decide nothing in a stage.

  Sizes of the parts count where a training makes them; a kind of the user's own
  may read everything.
  """
  if names.is_own(step.kind):
    return ()
  if step.kind != "train":
    return _PARTS
  return tuple(p for p in _PARTS if {"init", p} & step.inputs.keys())


def fingerprint(kind: str, fields: Mapping[str, Any]) -> str:
  """Return the hash of the settings that decide a stage's result."""
  text = json.dumps(settings.deciding(fields, free_keys(kind)), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_done(step: Step) -> bool:
  """Return whether a stage has a result, however it was made.

  Raises InputError if a file of the result is not what the stage wrote.
  """
  path = step.folder / _DONE
  if not path.exists():
    return False
  sums = _checksums(step)
  outputs = metrics.read_done(path, "outputs")["outputs"]
  changed = [n for n, mark in outputs.items() if sums.get(n) != mark]
  if changed:
    raise InputError(
      f"{step.folder / changed[0]} is not what the stage wrote: delete "
      f"{step.folder} to make it again"
    )
  return True


def is_begun(step: Step) -> bool:
  """Return whether a stage has checkpoints that it would go on from."""
  checkpoints = step.folder / "checkpoints"
  return (step.folder / _BEGUN).exists() and any(checkpoints.glob("*"))


def change(step: Step, inputs: Inputs, *, unknown: Sequence[str] = ()) -> str:
  """Return what differs between a stage as it is there and as it is set.

  Empty if nothing does, or nothing is there to be lost. What decides is the
  stage's own section, its sources and what it reads; settings that came with a
  later version of the package decide nothing in what was made before.

  Args:
    unknown: names of inputs that are not compared, since they are to be made.
  """
  if is_done(step):
    done = metrics.read_done(step.folder / _DONE, "fields", "inputs")
    before, begun = done["fields"], False
  elif is_begun(step):
    done = files.read_json(step.folder / _BEGUN)
    before, begun = files.read_json(step.folder / _CONFIG), True
  else:
    return ""
  now = step.config.to_dict()
  free = (*free_keys(step.kind, begun=begun), *_unused(step))
  if not _own_names(step) and step.kind != "report":
    free = (*free, *(key for key in now if key not in before))
  if settings.deciding(before, free) != settings.deciding(now, free):
    said = settings.difference(
      settings.deciding(before, free), settings.deciding(now, free), ()
    )
    return said or "settings"
  marks = inputs.of(step)
  other = [
    name
    for name in sorted(marks.keys() | done["inputs"].keys())
    if name not in unknown and marks.get(name) != done["inputs"].get(name)
  ]
  return f"other {', '.join(other)}" if other else ""


def log_free_changes(step: Step) -> None:
  """Log settings that changed without unmaking a stage."""
  path = step.folder / _DONE
  if path.exists():
    before = metrics.read_done(path, "fields")["fields"]
    what = "stays, made"
  elif is_begun(step):
    before, what = files.read_json(step.folder / _CONFIG), "goes on"
  else:
    return
  free = (*LOGGING_KEYS, *_unused(step))
  changed = settings.difference(before, step.config.to_dict(), free)
  if changed:
    LOG.info("%s %s with other settings: %s", step.name, what, changed)


def old(step: Step) -> Step:
  """Return a stage as it was before it is made again."""
  folder = step.folder.with_name(step.folder.name + _OLD)
  return dataclasses.replace(step, folder=folder)


def set_aside(step: Step) -> None:
  """Make room for a stage that is made again; what is there is STAGE.old.

  A result that was set aside before stays, and an attempt after it goes.
  """
  _check_own(step)
  _check_own(old(step))
  if (step.folder / _DONE).exists():
    discard_old(step)
  if old(step).folder.exists():
    _remove(step.folder)
    return
  files.write_json(step.folder / _ASIDE, {"stage": step.name})
  step.folder.rename(old(step).folder)


def can_restore(
  step: Step, inputs: Inputs, *, unknown: Sequence[str] = ()
) -> bool:
  """Return whether what was set aside is what is asked for."""
  before = old(step)
  if not (before.folder / _ASIDE).exists():
    return False
  try:
    there = is_done(before) or is_begun(before)
  except InputError:
    # Half of it was deleted when the run was killed.
    return False
  return there and not change(before, inputs, unknown=unknown)


def restore(step: Step, inputs: Inputs) -> bool:
  """Take back what was set aside, if it is what is asked for."""
  if not can_restore(step, inputs):
    return False
  _check_own(step)
  if step.folder.exists():
    _remove(step.folder)
  old(step).folder.rename(step.folder)
  (step.folder / _ASIDE).unlink()
  return True


def replaces_old(step: Step) -> bool:
  """Return whether what was set aside would go, and nobody allowed that.

  An attempt that was begun with the present settings was allowed to.
  """
  if not (old(step).folder / _ASIDE).exists():
    return False
  claim = step.folder / _BEGUN
  now = fingerprint(step.kind, step.config.to_dict())
  return not (claim.exists() and files.read_json(claim)["config"] == now)


def discard_old(step: Step) -> None:
  """Delete what a finished stage has replaced."""
  before = old(step)
  _check_own(before)
  if before.folder.exists():
    _remove(before.folder)


def _remove(folder: pathlib.Path) -> None:
  """Delete a folder of the run, what says that it is the run's last."""
  for path in sorted(folder.iterdir(), key=lambda x: x.name in _RECORDS):
    linked = path.is_symlink()
    shutil.rmtree(path) if path.is_dir() and not linked else path.unlink()
  folder.rmdir()


def check_folders(workdir: pathlib.Path, steps: Iterable[Step]) -> None:
  """Raise InputError if a stage's folder holds what no run has put there.

  Nothing is touched. A folder is the run's if a begun or finished stage is in
  it; an empty one may become so.
  """
  for step in [x for one in steps for x in (one, old(one))]:
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
  aside = folder.name.endswith(_OLD)
  records = (_ASIDE,) if aside else (_BEGUN, _DONE)
  if any(_is_record(folder / n) for n in records):
    if not (folder / _DONE).exists():
      # Others write into these, by names that are known before.
      for name in _CONTINUED:
        files.check_unlinked(folder / name)
    return
  if not folder.exists():
    return
  # A run that is killed while it writes the record leaves a file behind.
  inside = sorted(
    path.name
    for path in folder.iterdir()
    if not files.is_left_over(path, _BEGUN)
  )
  if inside:
    raise InputError(
      f"{folder}: holds {inside[0]!r}, but no {' or '.join(records)} of a run, "
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
  return isinstance(content, dict) and bool({"config", "stage"} & set(content))


def begin(step: Step, inputs: Inputs) -> None:
  """Clear half a result, keeping committed checkpoints of the same making."""
  _check_own(step)
  files.make_folder(step.folder)
  claim = step.folder / _BEGUN
  begun = {
    "config": fingerprint(step.kind, step.config.to_dict()),
    "inputs": inputs.of(step),
  }
  # A run that is killed before it writes the settings anew needs the old ones.
  stays = (_BEGUN, _CONFIG, *(_CONTINUED if is_begun(step) else ()))
  for path in step.folder.iterdir():
    if path.name in stays:
      continue
    linked = path.is_symlink()
    shutil.rmtree(path) if path.is_dir() and not linked else path.unlink()
  files.write_json(claim, begun)
  files.write_json(step.folder / _CONFIG, step.config.to_dict())


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
      "outputs": _checksums(step),
      "metrics": metrics,
      "seconds": round(seconds, 2),
      "versions": files.versions(),
    },
  )
  shutil.rmtree(step.folder / "checkpoints", ignore_errors=True)
  (step.folder / _BEGUN).unlink()


def _checksums(step: Step) -> dict[str, str]:
  """Return a hash per result file; parameters have a fingerprint of theirs.

  A kind of the user's own has none, so that files in its folders count.
  """
  about = (*_RECORDS, _CONFIG, *_CONTINUED)
  if not names.is_own(step.kind):
    about = (*_RECORDS, _CONFIG)
    inside = [path for path in step.folder.iterdir() if path.is_file()]
  else:
    inside = [path for path in step.folder.rglob("*") if path.is_file()]
  places = {path.relative_to(step.folder): path for path in inside}
  return {
    place.as_posix(): _short_hash(path.read_bytes())
    for place, path in sorted(places.items())
    if place.parts[0] not in about
  }


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Hold the run's lock file; two runs of one workdir would mix."""
  place = files.open_own(workdir / "lock", os.O_RDWR)
  with open(place, "r+b") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise InputError(
        f"{workdir} is in use by another process: wait for it or use another "
        "--workdir"
      ) from error
    # Under another name (a hard link) it may be somebody's file.
    if os.fstat(place).st_nlink == 1:
      file.truncate()
      file.write(str(os.getpid()).encode())
      file.flush()
    yield
