"""Trees of arrays to Orbax's files, and back, in bounded memory.

Each shard is written by one process, so that a tree that every device holds
whole is written by the first process alone. Arrays are stored in chunks, of
which a reader takes those that it needs.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from pivot_jax import processes, trees

LOG = logging.getLogger("pivot_jax")

# Bytes of a chunk, at most. Of a checkpoint it is what is held of a shard while
# it is written; of an artifact, small enough for slices along any axis.
CHUNK, _SMALL_CHUNK = 2**26, 2**22
# Bytes that are gathered before they go to a file.
_FILE = 2**26
# Those that tell of each read that fails beside the one that is raised.
_NOISY = ("absl", "asyncio")
_MEMORY_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")


class _Leaves(ocp.type_handlers.NumpyHandler):
  """Writes host leaves, by the first process, few of them at a time.

  A leaf that is read when it is asked for is in memory while it is written.
  """

  async def serialize(
    self, values: Sequence[Any], infos: Sequence[Any], args: Any = None
  ) -> Sequence[Any]:
    """Return nothing to wait for: what is given is written."""
    if not processes.first():
      return []
    for leaves, *rest in _groups(values, infos, args):
      arrays = [np.asarray(leaf) for leaf in leaves]
      begun = await super().serialize(arrays, *rest)
      # Or the next ones would be read beside them.
      del arrays
      for one in begun:
        one.result()
      del begun, one
    return []


class _Arrays(ocp.type_handlers.ArrayHandler):
  """Writes arrays from the devices, of which few are on the host at a time."""

  async def serialize(
    self, values: Sequence[Any], infos: Sequence[Any], args: Any = None
  ) -> Sequence[Any]:
    """Return what is done when all are written."""
    begin = super().serialize

    async def write():
      for group in _groups(values, infos, args):
        for begun in await begin(*group):
          begun.result()

    pool = concurrent.futures.ThreadPoolExecutor(1, "one_by_one")
    written = pool.submit(asyncio.run, write())
    pool.shutdown(wait=False)
    return [written]


def _groups(
  values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None
) -> Iterator[tuple[list[Any], list[Any], list[Any]]]:
  """Yield neighbors that have few bytes together, or one that has more."""
  group, taken = ([], [], []), 0
  hows = args or [ocp.SaveArgs()] * len(values)
  for value, info, how in zip(values, infos, hows):
    size = _bytes(value, whole=True)
    if group[0] and taken + size > CHUNK:
      yield group
      group, taken = ([], [], []), 0
    for one, listed in zip((value, info, how), group, strict=True):
      listed.append(one)
    taken += size
  if group[0]:
    yield group


def handler(
  tree: PyTree,
  *,
  save_gb: float,
  one_by_one: bool = False,
  compressed: bool = False,
) -> ocp.PyTreeCheckpointHandler:
  """Return what writes trees of the sizes of `tree`.

  Args:
    tree: arrays or leaves that are read when they are asked for.
    save_gb: GB that are being written at a time.
    one_by_one: a large array goes to the host when the one before is written.
      Else all do before a save returns, and are written behind it.
    compressed: whether files are smaller by a tenth, and take longer.
  """
  # Orbax refuses what is not smaller than its limit, which cannot be waited at
  # from one array to the next.
  leaves = jax.tree.leaves(tree)
  sizes = [_bytes(leaf, whole=one_by_one) for leaf in leaves]
  least = max([CHUNK, *sizes]) + 1
  return ocp.PyTreeCheckpointHandler(
    save_concurrent_gb=max(save_gb, least / 1e9),
    use_compression=compressed,
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (
        jax.Array,
        (_Arrays if one_by_one else ocp.type_handlers.ArrayHandler)(
          use_replica_parallel=False, enable_write_sharding_file=False
        ),
      ),
      (trees.Deferred, _Leaves(deepcopy_host_arrays=False)),
    ),
  )


def save_args(tree: PyTree, *, chunk: int = CHUNK) -> ocp.args.PyTreeSave:
  """Return how a tree is written: in chunks, and files of a bounded size."""
  return ocp.args.PyTreeSave(
    tree,
    save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk), tree),
    ocdbt_target_data_file_size=_FILE,
  )


def save(folder: pathlib.Path, tree: PyTree, *, alone: bool = False) -> None:
  """Write a tree, one leaf at a time; return when it is there.

  Of several processes all call it, or, `alone`, the first.
  """
  processes_of = ocp.options.MultiprocessingOptions(
    active_processes={0} if alone else None,
    barrier_sync_key_prefix="alone" if alone else None,
  )
  with ocp.Checkpointer(
    handler(tree, save_gb=0, one_by_one=True, compressed=True),
    multiprocessing_options=processes_of,
  ) as saver:
    saver.save(folder, args=save_args(tree, chunk=_SMALL_CHUNK), force=True)


def restore(
  folder: pathlib.Path,
  target: PyTree,
  *,
  bytes_at_once: int | None = None,
  part: bool = False,
) -> Any:
  """Return a tree of arrays on devices; each process reads what its own hold.

  No process waits for another one.

  Args:
    folder: of the files.
    target: shapes with shardings.
    bytes_at_once: that are read at a time, more than any shard has, with the
      chunks around it; None: no limit.
    part: whether the files hold more leaves.
  """
  reader = ocp.PyTreeCheckpointHandler(
    restore_concurrent_gb=bytes_at_once and bytes_at_once / 1e9
  )
  args = ocp.checkpoint_utils.construct_restore_args(target)
  return reader.restore(
    folder,
    args=ocp.args.PyTreeRestore(
      item=target, restore_args=args, partial_restore=part
    ),
  )


def read_leaf(folder: pathlib.Path, tree: PyTree, number: int) -> np.ndarray:
  """Return one leaf of a stored tree, by its place among those of `tree`."""
  leaves, shape = jax.tree.flatten(tree)
  wanted = [ocp.PLACEHOLDER] * len(leaves)
  wanted[number] = leaves[number]
  how = ocp.RestoreArgs(restore_type=np.ndarray)
  found = ocp.PyTreeCheckpointHandler().restore(
    folder,
    args=ocp.args.PyTreeRestore(
      item=jax.tree.unflatten(shape, wanted),
      restore_args=jax.tree.unflatten(shape, [how] * len(leaves)),
    ),
  )
  return jax.tree.leaves(found)[number]


def local_bytes(leaf: jax.Array) -> int:
  """Return the bytes of the shards of an array that this process writes."""
  return sum(x.data.nbytes for x in leaf.addressable_shards if not x.replica_id)


def memory() -> int:
  """Return the bytes of this machine's memory, or of its container's."""
  size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  try:
    return min(size, int(_MEMORY_LIMIT.read_text("ascii")))
  except (OSError, ValueError):
    return size


def first_line(error: Exception) -> str:
  """Return what is wrong, in one line."""
  return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Send what Orbax and TensorStore say of damaged files to the debug log."""
  loggers = [logging.getLogger(name) for name in _NOISY]

  def keep(record: logging.LogRecord) -> bool:
    LOG.debug("%s: %s", record.name, record.getMessage())
    return False

  for one in loggers:
    one.addFilter(keep)
  try:
    yield
  finally:
    for one in loggers:
      one.removeFilter(keep)


def _bytes(leaf: Any, *, whole: bool) -> int:
  shape = leaf.shape
  if isinstance(leaf, jax.Array) and not whole:
    shape = leaf.sharding.shard_shape(shape)
  return math.prod(shape) * np.dtype(leaf.dtype).itemsize
