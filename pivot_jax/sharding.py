"""Mesh, PARAM_RULES and ACTIVATION_RULES: the only file that names a mesh axis.

Parameters are placed by rules over their paths, activations by the logical axis
names that the models use. Nothing here knows a model's code.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, Shaped
from ml_collections import ConfigDict

from pivot_jax import processes, trees
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# Pattern -> axes of the *last* dimensions, so that a stacked layer axis needs
# no second rule. Column-parallel into a block, row-parallel out of it.
PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (
    r".*/(q_proj|k_proj|v_proj|fc1|gate_proj|up_proj)/kernel",
    ("fsdp", "tensor"),
  ),
  (r".*/(o_proj|out_proj|fc2|down_proj)/kernel", ("tensor", "fsdp")),
  (r".*/(q_proj|k_proj|v_proj|fc1|gate_proj|up_proj)/bias", ("tensor",)),
  (r"llm/embed_tokens/embedding", ("tensor", "fsdp")),
  (r"llm/lm_head/kernel", ("fsdp", "tensor")),
  # Row-parallel out: column-parallel twice, XLA gives the first layer and the
  # tower a wrong gradient on a mesh of three axes.
  (r"projector/linear_1/kernel", ("fsdp", "tensor")),
  (r"projector/linear_2/kernel", ("tensor", "fsdp")),
  (r"vision/embeddings/.*/(kernel|embedding)", (None, "fsdp")),
  (r".*", ()),
)

ACTIVATION_RULES: tuple[tuple[str, Any], ...] = (
  ("rows", ROWS),
  ("heads", "tensor"),
  ("tokens", None),
  ("patches", None),
  ("embed", None),
)


def make_mesh(shape: Mapping[str, int] | ConfigDict) -> Mesh:
  """Return a mesh of axes data, fsdp, tensor; -1 takes what is left.

  Axis types are Auto: linen's modules fail under jax's default of Explicit.
  """
  unknown = sorted(set(shape) - set(AXES))
  if unknown:
    raise InputError(f"mesh has unknown axes {unknown}; the axes are {AXES}")
  sizes = [int(shape.get(axis, 1)) for axis in AXES]
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise InputError(
      f"mesh {dict(zip(AXES, sizes))}: give sizes of 1 or more; one may be -1"
    )
  devices = jax.device_count()
  if sizes.count(-1) == 1:
    known = -int(np.prod(sizes))
    sizes[sizes.index(-1)] = max(1, devices // known)
  if int(np.prod(sizes)) != devices:
    raise InputError(
      f"mesh {dict(zip(AXES, sizes))} needs {int(np.prod(sizes))} devices, "
      f"there are {devices}: set one axis to -1, or change --config.mesh"
    )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def infer(shapes: PyTree, mesh: Mesh, rules: Sequence = PARAM_RULES) -> Any:
  """Return a tree of NamedShardings for a tree of arrays or shapes.

  A dimension that its axis does not divide stays whole, and is logged.
  """
  placed = {}
  for path, leaf in trees.flatten(shapes).items():
    axes = trees.first_match(rules, path)
    axes = axes[-len(leaf.shape) :] if leaf.shape else ()
    whole = (None,) * (len(leaf.shape) - len(axes))
    spec: list[str | None] = [*whole, *axes]
    for dimension, axis in enumerate(spec):
      if axis and leaf.shape[dimension] % mesh.shape[axis]:
        LOG.info(
          "%s: dimension %d of %s is not divided over %s",
          *(path, dimension, tuple(leaf.shape), axis),
        )
        spec[dimension] = None
    placed[path] = NamedSharding(mesh, PartitionSpec(*spec))
  return trees.unflatten(placed)


def like_params(state_shapes: PyTree, params: PyTree, mesh: Mesh) -> Any:
  """Return shardings for an optimizer state: its copies of parameters alike.

  A subtree of the state whose structure and shapes are the parameters' gets the
  parameters' shardings; every other leaf is replicated.
  """
  target = jax.tree.structure(params)
  shardings = infer(params, mesh)

  def is_copy(node: PyTree) -> bool:
    return jax.tree.structure(node) == target and [
      x.shape for x in jax.tree.leaves(node)
    ] == [x.shape for x in jax.tree.leaves(params)]

  def place(node: PyTree):
    return shardings if is_copy(node) else replicated(mesh)

  return jax.tree.map(place, state_shapes, is_leaf=is_copy)


def replicated(mesh: Mesh) -> NamedSharding:
  """Return the sharding of a value that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def over_rows(mesh: Mesh) -> NamedSharding:
  """Return the sharding of a batch: its first axis over (data, fsdp)."""
  return NamedSharding(mesh, PartitionSpec(ROWS))


def row_shards(mesh: Mesh) -> int:
  """Return over how many shards the rows of a batch are spread."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def row_groups(mesh: Mesh) -> list[list[int]]:
  """Return by share of a batch's rows, in their order, the processes with it.

  Processes whose devices hold the same rows, as along the axis tensor, have one
  share together.

  Raises:
    InputError: processes that hold some rows in common and others not.
  """
  held = _rows_by_process(mesh)
  groups: dict[tuple[int, ...], list[int]] = {}
  for process in sorted(held):
    groups.setdefault(tuple(sorted(held[process])), []).append(process)
  sizes = {len(rows) for rows in groups}
  if sum(map(len, groups)) != row_shards(mesh) or len(sizes) != 1:
    raise InputError(
      f"mesh {dict(mesh.shape)}: its rows do not divide over {len(held)} "
      "processes: let data x fsdp or tensor be a multiple of the devices of one"
    )
  return [groups[rows] for rows in sorted(groups)]


def _rows_by_process(mesh: Mesh) -> dict[int, set[int]]:
  """Return by process the shards of a batch's rows that its devices hold.

  On a slice they need not lie side by side.
  """
  held: dict[int, set[int]] = {}
  places = over_rows(mesh).devices_indices_map((row_shards(mesh),))
  for device, (rows,) in places.items():
    held.setdefault(device.process_index, set()).add(rows.start or 0)
  return held


def own_share(mesh: Mesh) -> tuple[int, int]:
  """Return which of how many shares of a batch's rows this process has."""
  groups = row_groups(mesh)
  mine = jax.process_index()
  return next(i for i, held in enumerate(groups) if mine in held), len(groups)


def own_rows(array: jax.Array, mesh: Mesh) -> np.ndarray:
  """Return the rows of this process's share of an array over a batch's rows.

  They are in the order in which `place_rows` took them.
  """
  return _of_processes(array, mesh, [jax.process_index()])


def all_rows(array: jax.Array, mesh: Mesh) -> np.ndarray:
  """Return an array over a batch's rows in all processes, share by share."""
  return _of_processes(array, mesh, [one[0] for one in row_groups(mesh)])


def _of_processes(
  array: jax.Array, mesh: Mesh, those: Sequence[int]
) -> np.ndarray:
  by_shard = whole(array).reshape(row_shards(mesh), -1, *array.shape[1:])
  held = _rows_by_process(mesh)
  places = [place for process in those for place in sorted(held[process])]
  return by_shard[places].reshape(-1, *array.shape[1:])


def whole(array: jax.Array) -> np.ndarray:
  """Return an array, which may be spread over processes, as numpy in all."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)


def filled(
  piece: Shaped[np.ndarray, "n *rest"], size: int
) -> Shaped[np.ndarray, "N *rest"]:
  """Fill a batch up with rows of zeros, so that one executable serves all."""
  return np.pad(
    piece, ((0, max(0, size - len(piece))), *((0, 0),) * (piece.ndim - 1))
  )


def place_rows(tree: PyTree, mesh: Mesh) -> Any:
  """Return host arrays (this process's rows) placed over the mesh."""
  sharding = over_rows(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), tree
  )


def place(
  tree: trees.Params,
  mesh: Mesh,
  rules: Sequence = PARAM_RULES,
  *,
  dtypes: Mapping[str, Any] | None = None,
) -> Any:
  """Return a tree of host arrays placed by the parameter rules, leaf by leaf.

  The arrays are copied: donating the result never deletes the caller's tree. Of
  an artifact's leaf that was verified, slices are read, by each process those of
  its devices; with several processes it is verified first, by one of them.
  `dtypes` gives leaves another dtype by path.
  """
  flat = trees.flatten(tree)
  dtypes = dtypes or {path: leaf.dtype for path, leaf in flat.items()}
  if processes.count() > 1:
    unread = {k: x for k, x in flat.items() if _is_unread(x)}
    fingerprint(trees.unflatten(unread))
  return trees.unflatten(
    {
      path: _placed(path, leaf, mesh, rules, np.dtype(dtypes[path]))
      for path, leaf in flat.items()
    }
  )


def _placed(path, leaf, mesh, rules, dtype: np.dtype) -> jax.Array:
  """Return a leaf on the devices, read by slices where they hold slices."""
  where = trees.flatten(infer({path: leaf}, mesh, rules))[path]
  if not isinstance(leaf, trees.Deferred):
    return _on_devices(np.array(leaf, dtype), where)
  if leaf.place and leaf.verified and not where.is_fully_replicated:
    return jax.block_until_ready(leaf.place(where, dtype))
  return _on_devices(leaf.read().astype(dtype, copy=False), where)


def _is_unread(leaf: Any) -> bool:
  """Return whether slices of a leaf could be read if it were verified."""
  deferred = isinstance(leaf, trees.Deferred)
  return deferred and leaf.place is not None and not leaf.verified


def fingerprint(tree: trees.Params) -> dict[str, str]:
  """Return `trees.fingerprint`, in all processes, of which each reads a part.

  Leaves that are read from files are verified by it, each by one process.

  Raises:
    InputError: in all of them, what is wrong with a leaf.
  """
  flat = trees.flatten(tree)
  found: dict[str, str] = {}
  problem = None
  try:
    for path in _own_part(flat):
      found[path] = trees.leaf_crc(flat[path])
  except InputError as error:
    if processes.count() == 1:
      raise
    problem = str(error)
  if processes.count() > 1:
    everyone = processes.exchange("fingerprints", [found, problem])
    wrong = [one for _, one in everyone if one is not None]
    if wrong:
      raise InputError(wrong[0])
    found = {k: v for one, _ in everyone for k, v in one.items()}
  for leaf in flat.values():
    if isinstance(leaf, trees.Deferred):
      leaf.verified = True
  return {path: found[path] for path in flat}


def _own_part(flat: Mapping[str, Any]) -> list[str]:
  """Return the leaves that this process reads: neighbors, alike in bytes."""
  sizes = {
    path: int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    for path, leaf in flat.items()
  }
  total, before, own = max(1, sum(sizes.values())), 0, []
  for path, size in sizes.items():
    # The process in whose part the middle of the leaf lies.
    middle = (2 * before + size) * processes.count() // (2 * total)
    if min(middle, processes.count() - 1) == processes.index():
      own.append(path)
    before += size
  return own


def place_leaf(
  path: str, leaf: np.ndarray, mesh: Mesh, rules: Sequence = PARAM_RULES
) -> jax.Array:
  """Return one host array placed by the parameter rules.

  The array is taken over: a CPU device may share its memory, and the caller may
  not write to it. It is on the devices when this returns.
  """
  return _on_devices(
    leaf, trees.flatten(infer({path: leaf}, mesh, rules))[path]
  )


def _on_devices(leaf: np.ndarray, where: NamedSharding) -> jax.Array:
  return jax.block_until_ready(
    jax.make_array_from_callback(leaf.shape, where, leaf.__getitem__)
  )
