"""Checkpoints of a training, from which it goes on where it was stopped.

Orbax writes them, each process the shards that it holds, while the training
goes on. With several processes all of them call the same methods in the same
order; the first alone decides which step is restored, and marks and deletes.
"""

import dataclasses
import logging
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from pivot_jax import files, processes, trees
from pivot_jax.errors import InputError
from pivot_jax.weights import checksums, orbax_files

LOG = logging.getLogger("pivot_jax")

# In the folder of a checkpoint that is damaged: why it is passed over.
_MARK = "damaged.txt"
# Part of the memory of a host that a copy of its shards may take.
_ROOM = 0.25


class Resumable:
  """Committed checkpoints of a running training, newest verified first.

  Each holds the trainable parameters, optimizer state, step, examples seen and
  random key, with a checksum per leaf (`checksums.py`; a CRC32 in those of
  version 0.1). Frozen parameters are not in it: they come, verified, from the
  stage's inputs.

  Args:
    folder: of the checkpoints, one to a step.
    keep: how many of the newest sound ones stay.
    keep_every: those of steps that it divides stay for ever; 0: none.
    save_concurrent_gb: GB of the state that a process may hold on its host. A
      state that fits is copied there, and the training goes on while it is
      written. Of a larger one a leaf is there at a time, and `save` returns when
      all is on disk. None: a quarter of the host's memory, or 2.
    restore_concurrent_gb: GB that are read at a time, at least the largest leaf.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    *,
    keep: int = 2,
    keep_every: int = 0,
    save_concurrent_gb: float | None = None,
    restore_concurrent_gb: float = 2.0,
  ):
    self._folder = folder.absolute()
    self._policy = _Kept(keep, keep_every, set())
    self._save_gb, self._restore_gb = save_concurrent_gb, restore_concurrent_gb
    self._manager: ocp.CheckpointManager | None = None
    self._waits = False
    self._begun, self._took, self._waited = 0.0, 0.0, 0.0
    self._told = False
    if processes.first():
      files.make_folder(self._folder)
    processes.barrier("checkpoints")

  def save(self, step: int, state: PyTree, note: Mapping[str, Any]) -> None:
    """Begin to commit a state, when the one before is on disk.

    The arrays may be donated when this returns.
    """
    started = time.monotonic()
    self.wait()
    manager = self._manager or self._start(state)
    self._forget(step, manager)
    if processes.first():
      _check_free(self._folder, state)
    self._begun, self._took, self._waited = started, 0.0, 0.0
    sums = checksums.of_leaves(_named(state))
    manager.save(
      step,
      args=ocp.args.Composite(
        state=orbax_files.save_args(state),
        meta=ocp.args.JsonSave({"checksum": sums, "note": dict(note)}),
      ),
      # Whatever later steps there are, they are damaged.
      force=True,
    )
    if self._waits:
      self.wait()
    self._waited = time.monotonic() - started
    self._tell()

  def took(self) -> float | None:
    """Return the seconds of the last save, None while it is being written."""
    return self._took or None

  def wait(self) -> None:
    """Return when what was begun is on disk."""
    if self._manager is not None:
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Wait, and release the manager's threads."""
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  def restore(self, target: PyTree) -> tuple[int, Any, dict[str, Any]] | None:
    """Return (step, state, note) of the newest sound checkpoint, or None.

    `target` is a state of shapes with shardings, on any mesh. None: there is no
    checkpoint. A damaged one is named, marked, and the one before it is taken.

    Raises:
      InputError: every checkpoint is damaged; nothing is marked.
    """
    self.wait()
    steps, marked = processes.decide("checkpoints", self._list)
    damaged: dict[int, str] = {}
    for step in steps:
      state, meta, problem = self._read(step, target)
      if problem is None:
        self._mark(damaged)
        self._policy.damaged |= damaged.keys() | {int(one) for one in marked}
        return step, state, meta["note"]
      damaged[step] = problem
    listed = [f"{step} ({problem})" for step, problem in damaged.items()]
    listed += [f"{step} ({problem})" for step, problem in marked.items()]
    listed += processes.decide(
      "damaged before",
      lambda: sorted(path.name for path in self._folder.glob("*.bad")),
    )
    if listed:
      raise InputError(
        f"{self._folder}: every checkpoint is damaged: {'; '.join(listed)}; put "
        f"a copy of one back, or delete {self._folder} to begin at step 0"
      )
    return None

  def _list(self) -> tuple[list[int], dict[str, str]]:
    """Return the steps that may be sound, newest first, and the marked ones."""
    found = [int(x.name) for x in self._folder.iterdir() if x.name.isdecimal()]
    marks = {step: self._folder / str(step) / _MARK for step in sorted(found)}
    marked = {
      str(step): path.read_text("utf-8").strip()
      for step, path in marks.items()
      if path.exists()
    }
    sound = [step for step in found if str(step) not in marked]
    return sorted(sound, reverse=True), marked

  def _read(self, step: int, target: PyTree) -> tuple[Any, Any, str | None]:
    """Return a state, its meta, and what is wrong, in any of the processes."""
    folder = self._folder / str(step)
    problem, state = None, None
    with orbax_files.quiet():
      meta, problem = processes.decide(f"meta {step}", lambda: _meta(folder))
      if problem is None:
        try:
          leaves = jax.tree.leaves(target)
          largest = max(leaf.size * leaf.dtype.itemsize for leaf in leaves)
          state = orbax_files.restore(
            folder / "state",
            target,
            bytes_at_once=max(int(self._restore_gb * 1e9), largest + 1),
          )
        # Orbax raises a bare Exception where an array's file is missing.
        except Exception as error:  # noqa: BLE001
          problem = orbax_files.first_line(error)
      problem = _any_of(problem)
      if problem is None:
        problem = _any_of(_compare(meta, state, folder / "state"))
    return state, meta, problem

  def _mark(self, damaged: Mapping[int, str]) -> None:
    for step, problem in damaged.items():
      LOG.warning(
        "checkpoint %d is damaged (%s): marked by %s in its folder, the one "
        "before it is taken",
        *(step, problem, _MARK),
      )
      if processes.first():
        files.write_text(self._folder / str(step) / _MARK, f"{problem}\n")

  def _forget(self, step: int, manager: ocp.CheckpointManager) -> None:
    """Delete a damaged checkpoint whose step the training passes again."""
    if step not in self._policy.damaged:
      return
    if processes.first():
      shutil.rmtree(self._folder / str(step), ignore_errors=True)
    processes.barrier("damaged checkpoint")
    self._policy.damaged.discard(step)
    manager.reload()

  def _start(self, state: PyTree) -> ocp.CheckpointManager:
    """Return the manager, which is made when the sizes are known."""
    own = sum(map(orbax_files.local_bytes, jax.tree.leaves(state)))
    limit = self._save_gb
    if limit is None:
      limit = max(2.0, _ROOM * orbax_files.memory() / 1e9)
    self._waits = any(processes.exchange("sizes", own > limit * 1e9))
    if self._waits and self._save_gb is None:
      limit = 2.0
    self._manager = _Manager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._policy,
        create=False,
        async_options=ocp.AsyncOptions(
          timeout_secs=int(processes.SLOW),
          post_finalization_callback=self._written,
        ),
      ),
      item_handlers={
        "state": orbax_files.handler(
          state, save_gb=limit, one_by_one=self._waits
        ),
        "meta": ocp.JsonCheckpointHandler(),
      },
    )
    return self._manager

  def _written(self) -> None:
    self._took = time.monotonic() - self._begun
    self._tell()

  def _tell(self) -> None:
    """Say once what a save took, when both times are known."""
    if self._took and self._waited and not self._told:
      self._told = True
      LOG.info(
        "saved in %.1f s, training waited %.1f s", self._took, self._waited
      )


@dataclasses.dataclass
class _Kept:
  """Says what stays: the newest sound checkpoints, some for ever, damaged ones."""

  keep: int
  every: int
  damaged: set[int]

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> Sequence[bool]:
    """Return for each checkpoint whether it stays."""
    del context
    steps = [one.step for one in checkpoints]
    sound = sorted(step for step in steps if step not in self.damaged)
    newest = sound[-self.keep :]
    return [
      step in newest
      or step in self.damaged
      or (self.every > 0 and step % self.every == 0)
      for step in steps
    ]


def _meta(folder: pathlib.Path) -> tuple[dict[str, Any], str | None]:
  """Return what is noted of a checkpoint, and what is wrong with that."""
  path = folder / "meta" / "metadata"
  try:
    meta = files.read_object(path)
  except InputError as error:
    return {}, orbax_files.first_line(error)
  known = "checksum" in meta or "crc" in meta
  if not known or "note" not in meta:
    return {}, f"{path}: holds no checksums"
  return meta, None


def _any_of(problem: str | None) -> str | None:
  """Return the first of what is wrong in the processes."""
  found = processes.exchange("damage", problem)
  wrong = [number for number, one in enumerate(found) if one is not None]
  if not wrong:
    return None
  who = f"process {wrong[0]}: " if len(found) > 1 else ""
  return f"{who}{found[wrong[0]]}"


def _compare(
  meta: Mapping[str, Any], state: PyTree, folder: pathlib.Path
) -> str | None:
  """Return what is wrong with the leaves of a state, None if nothing is."""
  if "checksum" in meta:
    kind, want = "checksum", meta["checksum"]
    have = checksums.of_leaves(_named(state))
  else:
    kind, want = "CRC32", meta["crc"]
    have = _crcs(state, folder)
  wrong = sorted(
    name
    for name in want.keys() | have.keys()
    if want.get(name) != have.get(name)
  )
  return f"leaf {wrong[0]}: {kind} differs" if wrong else None


def _crcs(state: PyTree, folder: pathlib.Path) -> dict[str, str]:
  """Return the CRC32 of each leaf, as version 0.1 noted them.

  With several processes each leaf is read whole by one of them.
  """
  leaves = _named(state)
  if processes.count() == 1:
    return {name: trees.leaf_crc(leaf) for name, leaf in leaves.items()}
  own = list(leaves)[processes.index() :: processes.count()]
  found = {
    name: trees.leaf_crc(orbax_files.read_leaf(folder, state, number))
    for number, name in enumerate(leaves)
    if name in own
  }
  told = processes.exchange("CRC32", found)
  return {name: crc for one in told for name, crc in one.items()}


def _named(state: Any) -> dict[str, Any]:
  """Return `{key path: leaf}` of any pytree, flat."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }


class _Manager(ocp.CheckpointManager):
  """Does not ask whether to stop: `processes.stop_at` counts all that ask."""

  def reached_preemption(self, step: int) -> bool:
    """Return that no stop is due."""
    del step
    return False


def _check_free(folder: pathlib.Path, state: Any) -> None:
  need = 1.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  free = shutil.disk_usage(folder).free
  if free < need:
    raise InputError(
      f"{folder}: {free / 1e9:.2f} GB free but a checkpoint needs "
      f"{need / 1e9:.2f} GB: free some space and run the same command again"
    )
