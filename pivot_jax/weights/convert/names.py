"""Parameter paths to Hugging Face tensor names, and back.

Paths are named after Hugging Face modules, so there is no table: `/` becomes
`.`, a stacked `layers` axis becomes `layers.0`, `layers.1`, ..., and a leaf
becomes `weight` or `bias`, a matrix transposed, a patch kernel from
[p, q, C, D] to [D, C, p, q]. Which prefix a checkpoint puts before such a name
is not known here (`hf.py`), nor what towers call it that are not named like
SigLIP's (`layouts.py`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np
from jaxtyping import PyTree

_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "embedding": "weight",
  "bias": "bias",
}


class Slot(NamedTuple):
  """The place of one foreign tensor in the parameter tree.

  path: of the leaf. layer: index into its stacked axis, None if not stacked.
  shape: the foreign tensor's.
  """

  path: tuple[str, ...]
  layer: int | None
  shape: tuple[int, ...]


def slots(shapes: PyTree) -> dict[str, Slot]:
  """Map the foreign name of every tensor of a tree to its place.

  `shapes` is a nested dict whose leaves have a `shape`. A leaf with no torch
  counterpart in `_LEAVES` (a class token, a factor) keeps its own name.
  """
  found = {}
  for path, leaf in _leaves(shapes).items():
    if "layers" not in path:
      shape = _foreign_shape(path, leaf.shape)
      found[_name(path, None)] = Slot(path, None, shape)
      continue
    shape = _foreign_shape(path, leaf.shape[1:])
    for layer in range(leaf.shape[0]):
      found[_name(path, layer)] = Slot(path, layer, shape)
  return found


def to_foreign(params: PyTree) -> dict[str, np.ndarray]:
  """Return the tensors of a tree under their foreign names and layouts."""
  leaves = {path: np.asarray(leaf) for path, leaf in _leaves(params).items()}
  arrays = {}
  for name, slot in slots(params).items():
    leaf = leaves[slot.path]
    if slot.layer is not None:
      leaf = leaf[slot.layer]
    arrays[name] = leaf.transpose(_axes_to_foreign(slot.path, leaf.ndim))
  return arrays


def from_foreign(
  shapes: PyTree, read: Callable[[list[str]], Mapping[str, np.ndarray]]
) -> PyTree:
  """Build a float32 tree; `read` gives the tensors of a list of names."""

  def fill(name: str, view: np.ndarray) -> None:
    view[...] = read([name])[name]

  return flax.traverse_util.unflatten_dict(
    {
      path: build_leaf(path, leaf.shape, np.float32, fill)
      for path, leaf in _leaves(shapes).items()
    }
  )


def build_leaf(
  path: tuple[str, ...],
  shape: tuple[int, ...],
  dtype: np.typing.DTypeLike,
  fill: Callable[[str, np.ndarray], None],
) -> np.ndarray:
  """Return one leaf, its tensors written straight into their place.

  `fill(name, view)` writes the tensor of that foreign name, cast, into a view
  that has the foreign layout: memory holds the leaf and what `fill` reads.
  """
  leaf = _aligned(shape, np.dtype(dtype))
  stacked = "layers" in path
  for layer in range(shape[0]) if stacked else (None,):
    part = leaf if layer is None else leaf[layer]
    view = part.transpose(_axes_to_foreign(path, part.ndim))
    fill(_name(path, layer), view)
  return leaf


def _leaves(tree: PyTree) -> dict[tuple[str, ...], Any]:
  return dict(flax.traverse_util.flatten_dict(tree))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Return an empty array that a CPU device takes over instead of copying it."""
  size = math.prod(shape) * dtype.itemsize
  room = np.empty(size + 64, np.uint8)
  start = -room.ctypes.data % 64
  return room[start : start + size].view(dtype).reshape(shape)


def _name(path, layer):
  parts = [*path[:-1], _LEAVES.get(path[-1], path[-1])]
  if layer is not None:
    parts.insert(parts.index("layers") + 1, str(layer))
  return ".".join(parts)


def _foreign_shape(path, shape):
  return tuple(shape[axis] for axis in _axes_to_foreign(path, len(shape)))


def _axes_to_foreign(path, ndim):
  if path[-1] != "kernel":
    return tuple(range(ndim))
  return {2: (1, 0), 4: (3, 2, 0, 1)}[ndim]
