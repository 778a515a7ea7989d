"""Checkpoints of a training, from which it goes on where it was stopped."""

import logging
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from pivot_jax import files, trees
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")


class Resumable:
  """Committed checkpoints of a running training, newest verified first.

  Each holds the trainable parameters, optimizer state, step, examples seen and
  random key, with a CRC32 per leaf. Frozen parameters are not in it: they come,
  verified, from the stage's inputs.
  """

  def __init__(self, folder: pathlib.Path, *, keep: int = 2):
    self._folder = folder.absolute()
    self._manager = _manager(self._folder, keep)

  def save(self, step: int, state: PyTree, note: Mapping[str, Any]) -> None:
    """Commit a state; return when it is on disk."""
    _check_free(self._folder, state)
    crcs = trees.fingerprint(_named(jax.device_get(state)))
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        meta=ocp.args.JsonSave({"crc": crcs, "note": dict(note)}),
      ),
    )
    self._manager.wait_until_finished()

  def restore(self, target: PyTree) -> tuple[int, Any, dict[str, Any]] | None:
    """Return (step, state, note) of the newest sound checkpoint, or None.

    `target` is a state of shapes with shardings. None: there is no checkpoint. A
    damaged one is named, set aside as `STEP.bad`, and the one before it is taken.

    Raises:
      InputError: every checkpoint is damaged; nothing is set aside.
    """
    damaged: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      read, problem = self._read(step, target)
      if problem is None:
        self._set_aside(damaged)
        return step, read["state"], read["meta"]["note"]
      damaged[step] = problem
    listed = [f"{step} ({problem})" for step, problem in damaged.items()]
    listed += sorted(path.name for path in self._folder.glob("*.bad"))
    if listed:
      raise InputError(
        f"{self._folder}: every checkpoint is damaged: {'; '.join(listed)}; put "
        f"a copy of one back, or delete {self._folder} to begin at step 0"
      )
    return None

  def _set_aside(self, damaged: Mapping[int, str]) -> None:
    for step, problem in damaged.items():
      LOG.warning(
        "checkpoint %d is damaged (%s): set aside as %d.bad, the one before it "
        "is taken",
        *(step, problem, step),
      )
      bad = self._folder / f"{step}.bad"
      shutil.rmtree(bad, ignore_errors=True)
      (self._folder / str(step)).rename(bad)
    if damaged:
      self._manager.close()
      self._manager = _manager(self._folder, 2)

  def close(self) -> None:
    """Release the manager's threads."""
    self._manager.close()

  def _read(self, step: int, target: Any) -> tuple[Any, str | None]:
    try:
      read = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()
        ),
      )
    # Orbax raises a bare Exception where an array's file is missing.
    except Exception as error:  # noqa: BLE001
      return None, next(iter(str(error).splitlines()), type(error).__name__)
    have = trees.fingerprint(_named(jax.device_get(read["state"])))
    want = read["meta"]["crc"]
    wrong = sorted(
      name
      for name in want.keys() | have.keys()
      if want.get(name) != have.get(name)
    )
    return read, f"leaf {wrong[0]}: CRC32 differs" if wrong else None


def _manager(folder: pathlib.Path, keep: int) -> ocp.CheckpointManager:
  files.make_folder(folder)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep, enable_async_checkpointing=False, create=True
  )
  return ocp.CheckpointManager(folder, options=options)


def _named(state: Any) -> dict[str, Any]:
  """Return `{key path: leaf}` of any pytree, flat."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }


def _check_free(folder: pathlib.Path, state: Any) -> None:
  need = 1.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  free = shutil.disk_usage(folder).free
  if free < need:
    raise InputError(
      f"{folder}: {free / 1e9:.2f} GB free but a checkpoint needs "
      f"{need / 1e9:.2f} GB: free some space and run the same command again"
    )
