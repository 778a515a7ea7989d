"""The run directory: what is finished, begun, claimed, and from which inputs.

A stage's folder is its result once `done.json` stands in it, written last;
until then `begun.json` says with which settings and inputs it was begun. Both
hold hashes, so that a changed setting, file or weight is noticed and never
makes a mixture of two runs: `change` tells it, and what is replaced stays as
`STAGE.old` until the new one is done. Nothing here knows what a stage does.
"""

import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pivot_jax import files, metrics, names
from pivot_jax.errors import InputError
from pivot_jax.recipe import settings
from pivot_jax.recipe.inputs import RULES, Inputs, Step, own_names, short_hash

LOG = logging.getLogger("pivot_jax")

# Settings that say how a run is shown or kept, not what it computes.
LOGGING_KEYS = (
  *("tensorboard", "writers", "profile", "save_every", "title", "shipped"),
  *("workers", "arm", "measure", "keep_every", "save_concurrent_gb"),
  "restore_concurrent_gb",
)
# A kind of the user's own may compute with what others only are shown by.
_OWN_FREE = (
  *("tensorboard", "writers", "profile", "mesh", "arm", "measure"),
  *("keep_every", "save_concurrent_gb", "restore_concurrent_gb"),
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
  "writers",
)
_BEGUN, _DONE, _CONFIG = "begun.json", "done.json", "config.json"
# A folder that holds the last record is a result that was set aside.
_OLD, _ASIDE = ".old", "replaced.json"
_RECORDS = (_BEGUN, _DONE, _ASIDE)
# Folders of results, and what a run writes beside those of its stages.
_FOLDERS = ("params", "tokenizer", "hf")
_FILES = (
  *("config.json", "plan.txt", "report.json", "report.html"),
  *("owner.json", "goodput.jsonl"),
)
# Sizes of parts that a stage makes itself; given weights bring theirs.
_PARTS = ("vision", "llm")


def free_keys(kind: str, *, begun: bool = False) -> tuple[str, ...]:
  """Return the settings that do not tell two stages of a kind apart.

  `begun`: the stage is not finished, so that the rest of a training may be made
  of other batches.
  """
  if names.is_own(kind):
    return _OWN_FREE
  if kind == "report":
    return tuple(key for key in FREE_KEYS if key != "title")
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
  return short_hash(text.encode())


def is_done(step: Step) -> bool:
  """Return whether a stage has a result, however it was made.

  Raises InputError if a file of the result is not what the stage wrote.
  """
  path = step.folder / _DONE
  if not path.exists():
    return False
  sums = _checksums(step)
  outputs = metrics.read_record(path, "outputs")["outputs"]
  changed = [n for n, mark in outputs.items() if sums.get(n) != mark]
  if changed:
    raise InputError(
      f"{step.folder / changed[0]} is not what the stage wrote: delete "
      f"{step.folder} to make it again"
    )
  return True


def is_begun(step: Step) -> bool:
  """Return whether a stage has checkpoints that it would go on from."""
  # One that is not whole has another name.
  places = (step.folder / "checkpoints").glob("*")
  whole = any(place.name.isdigit() for place in places)
  return whole and (step.folder / _BEGUN).exists()


def change(step: Step, inputs: Inputs, *, unknown: Sequence[str] = ()) -> str:
  """Return what differs between a stage as it is there and as it is set.

  Empty if nothing does, or nothing is there to be lost. What decides is the
  stage's own section, its sources and what it reads; settings that came with a
  later version of the package decide nothing in what was made before.

  Args:
    unknown: names of inputs that are not compared, since they are to be made.
  """
  if is_done(step):
    done = metrics.read_record(step.folder / _DONE, "fields", "inputs")
    before, begun = done["fields"], False
  elif is_begun(step):
    done = metrics.read_record(step.folder / _BEGUN, "inputs")
    before, begun = files.read_object(step.folder / _CONFIG), True
  else:
    return ""
  now = step.config.to_dict()
  free = (*free_keys(step.kind, begun=begun), *_unused(step))
  if not own_names(step) and step.kind != "report":
    free = (*free, *(key for key in now if key not in before))
  if settings.deciding(before, free) != settings.deciding(now, free):
    said = settings.difference(
      settings.deciding(before, free), settings.deciding(now, free), ()
    )
    return said or "settings"
  other = _other_inputs(step, done, inputs, unknown)
  return f"other {', '.join(other)}" if other else ""


def _other_inputs(
  step: Step,
  record: Mapping[str, Any],
  inputs: Inputs,
  unknown: Sequence[str],
) -> list[str]:
  """Return the inputs that are not those of a record, but the unknown ones."""
  before = record["inputs"]
  marks = inputs.of(step, rules=record.get("rules", 1))
  return [
    name
    for name in sorted(marks.keys() | before.keys())
    if name not in unknown and marks.get(name) != before.get(name)
  ]


def log_free_changes(step: Step) -> None:
  """Log settings that changed without unmaking a stage."""
  path = step.folder / _DONE
  if path.exists():
    before = metrics.read_record(path, "fields")["fields"]
    what = "stays, made"
  elif is_begun(step):
    before, what = files.read_object(step.folder / _CONFIG), "goes on"
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


def replaces_old(
  step: Step, inputs: Inputs, *, unknown: Sequence[str] = ()
) -> bool:
  """Return whether what was set aside would go, and nobody allowed that.

  An attempt that was begun with the present settings and inputs was allowed to.
  """
  if not (old(step).folder / _ASIDE).exists():
    return False
  claim = step.folder / _BEGUN
  if not claim.exists():
    return True
  begun = metrics.read_record(claim, "config", "inputs")
  now = fingerprint(step.kind, step.config.to_dict())
  other = _other_inputs(step, begun, inputs, unknown)
  return begun["config"] != now or bool(other)


def check_whole(step: Step) -> None:
  """Raise InputError if a result that would go holds a file of somebody else's.

  Only the top of the folder is looked at.
  """
  record = step.folder / _DONE
  if not record.exists():
    return
  outputs = metrics.read_record(record, "outputs")["outputs"]
  own = {*_RECORDS, _CONFIG, *_CONTINUED, *_FOLDERS}
  own |= {place.partition("/")[0] for place in outputs}
  for path in sorted(step.folder.iterdir()):
    # What file managers and file systems leave is nobody's.
    hidden = path.name.startswith(".")
    left = any(files.is_left_over(path, name) for name in own)
    if path.name not in own and not left and not hidden:
      raise InputError(
        f"{path}: no run wrote it, and {step.name} is made again and would "
        "delete it: move it away"
      )


def discard_old(step: Step) -> None:
  """Delete what a finished stage has replaced."""
  before = old(step)
  _check_own(before)
  if before.folder.exists():
    _remove(before.folder)


def _remove(folder: pathlib.Path) -> None:
  """Delete a folder of the run, what says that it is the run's last."""
  aside = folder.name.endswith(_OLD)
  last = (_ASIDE,) if aside else (_BEGUN, _DONE)
  for path in sorted(folder.iterdir(), key=lambda x: x.name in last):
    _delete(path)
  folder.rmdir()


def _delete(path: pathlib.Path) -> None:
  """Delete a file, a link or a folder; what a link leads to stays."""
  linked = path.is_symlink()
  shutil.rmtree(path) if path.is_dir() and not linked else path.unlink()


def check_folders(workdir: pathlib.Path, steps: Iterable[Step]) -> None:
  """Raise InputError if a stage's folder holds what no run has put there.

  Nothing is touched. A folder is the run's if a begun or finished stage is in
  it; an empty one may become so. The files beside the stages are the run's if
  one of its stages or its lock is there.
  """
  steps = list(steps)
  _check_files(workdir, steps)
  for step in [x for one in steps for x in (one, old(one))]:
    for place in reversed(step.folder.relative_to(workdir).parents[:-1]):
      _check_place(workdir / place, step.name)
    _check_own(step)


def _check_files(workdir: pathlib.Path, steps: Sequence[Step]) -> None:
  """Raise for a file that the run would replace and that is no run's."""
  lock_file = workdir / "lock"
  told = (
    files.read_bytes(lock_file, largest=2**20) if lock_file.exists() else b""
  )
  ours = told.isdigit() or any(
    _is_record(one.folder / name)
    for step in steps
    for one in (step, old(step))
    for name in _RECORDS
  )
  foreign = [name for name in _FILES if (workdir / name).exists() and not ours]
  if told and not told.isdigit():
    foreign.append(lock_file.name)
  if foreign:
    raise InputError(
      f"{workdir / foreign[0]}: no run wrote it, and a run would replace it: "
      "move it away or use another --workdir"
    )


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
  """Return whether a file is a record as a run writes them, of `_RECORDS`."""
  if path.is_symlink() or not path.is_file():
    return False
  try:
    content = files.read_json(path)
  except InputError:
    return False
  # A stage that was begun or finished, or one that was set aside.
  return isinstance(content, dict) and (
    {"config", "inputs"} <= set(content) or set(content) == {"stage"}
  )


def begin(step: Step, inputs: Inputs) -> None:
  """Clear half a result, keeping committed checkpoints of the same making."""
  _check_own(step)
  files.make_folder(step.folder)
  claim = step.folder / _BEGUN
  begun = {
    "config": fingerprint(step.kind, step.config.to_dict()),
    "inputs": inputs.of(step),
    "rules": RULES,
  }
  # A run that is killed before it writes the settings anew needs the old ones.
  stays = (_BEGUN, _CONFIG, *(_CONTINUED if is_begun(step) else ()))
  for path in step.folder.iterdir():
    if path.name not in stays:
      _delete(path)
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
      "rules": RULES,
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
    place.as_posix(): short_hash(path.read_bytes())
    for place, path in sorted(places.items())
    if place.parts[0] not in about
  }
