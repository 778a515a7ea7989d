"""Artifacts: a folder of parameters that explains itself.

`params/` (orbax) or `params.safetensors` (shipped with the package),
`model.json` with every choice, `tokenizer/`, and `fingerprint.json` with a
CRC32 per leaf and one of model.json, which are verified on load. They find
damage, not forgery: whoever changes a file can write its CRC32 anew.
"""

import functools
import json
import logging
import math
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors
from jax.typing import DTypeLike
from safetensors import numpy as safetensors_numpy

from pivot_jax import files, processes, trees
from pivot_jax.errors import InputError
from pivot_jax.weights import model_json, orbax_files

LOG = logging.getLogger("pivot_jax")

_META, _PRINTS = "model.json", "fingerprint.json"
# Bytes of leaves that are read at a time; a larger leaf is read alone.
_GROUP = 2**26


def save(
  path: pathlib.Path,
  params: trees.Params,
  *,
  meta: Mapping[str, Any],
  alone: bool = False,
) -> None:
  """Write `params/`, `model.json` and `fingerprint.json` into a folder.

  Leaves are arrays on devices or on the host, or `trees.Deferred`. Of several
  processes all call it, or, `alone`, the first.
  """
  write(path, params, alone=alone)
  if processes.first():
    describe(path, meta, written(path))
  if not alone:
    processes.barrier("artifact")


def write(
  path: pathlib.Path, params: trees.Params, *, alone: bool = False
) -> None:
  """Write `params/`: each process the shards that it holds, one leaf at a time.

  What is not spread over processes is written, and read before, by the first.
  """
  if processes.first():
    files.make_folder(path)
  flat = trees.flatten(params)
  orbax_files.save(
    path.absolute() / "params",
    trees.unflatten({name: _to_write(leaf) for name, leaf in flat.items()}),
    alone=alone,
  )


def _to_write(leaf: Any) -> jax.Array | trees.Deferred:
  if isinstance(leaf, trees.Deferred):
    return leaf
  if isinstance(leaf, jax.Array):
    if processes.count() == 1 or not leaf.is_fully_addressable:
      return leaf
  return trees.Deferred(
    tuple(leaf.shape), np.dtype(leaf.dtype), lambda: np.asarray(leaf)
  )


def written(
  path: pathlib.Path,
  look: Callable[[str, np.ndarray], None] = lambda name, leaf: None,
) -> dict[str, str]:
  """Return the CRC32 of each leaf in the files of `write`.

  Each leaf is shown to `look`, one after another: memory holds few of them.
  """
  shapes, load_leaf, _ = _restorer(path)
  prints = {}
  for name in shapes:
    leaf = load_leaf(name)
    prints[name] = trees.leaf_crc(leaf)
    look(name, leaf)
    # Or the next one would be read beside it.
    del leaf
  return prints


def save_packaged(
  path: pathlib.Path, params: trees.Params, *, meta: Mapping[str, Any]
) -> None:
  """Write an artifact as bfloat16 safetensors, for shipping."""
  files.make_folder(path)
  flat = {
    name: np.asarray(jax.device_get(leaf)).astype(ml_dtypes.bfloat16)
    for name, leaf in trees.flatten(params).items()
  }
  with files.writing(path / "params.safetensors") as aside:
    safetensors_numpy.save_file(flat, aside)
  describe(path, meta, trees.fingerprint(trees.unflatten(flat)))


def describe(
  folder: pathlib.Path, meta: Mapping[str, Any], prints: Mapping[str, str]
) -> None:
  """Write model.json, and the fingerprints of it and of the leaves."""
  path = folder / _META
  files.write_json(path, dict(meta) | {"versions": files.versions()})
  files.write_json(folder / _PRINTS, {**prints, _META: _crc(path)})


def leaf_prints(path: pathlib.Path) -> str:
  """Return the text of a fingerprint.json as it is of the leaves alone.

  model.json also has versions and the paths of the machine, which two artifacts
  of the same parameters need not share.
  """
  prints = files.read_object(path)
  if prints.pop(_META, None) is None:
    return path.read_text("utf-8")
  return json.dumps(prints, indent=2, sort_keys=True) + "\n"


def _crc(path: pathlib.Path) -> str:
  return f"{zlib.crc32(files.read_bytes(path, largest=files.LARGEST_JSON)):08x}"


def open_folder(
  folder: pathlib.Path, address: str
) -> tuple[
  dict[str, Any],
  dict[str, tuple[int, ...]],
  Callable[[str, Any], np.ndarray],
  Callable[[str], Callable[[jax.sharding.Sharding, np.dtype], Any] | None],
]:
  """Return model.json, the leaves' shapes, and a reader of one, verified.

  And, by leaf, what reads onto devices the slices that they hold, unverified;
  None of a leaf that is small, or stored in one piece.

  Raises:
    InputError: no artifact, or a damaged one; the reader raises it, too.
  """
  if not folder.is_dir():
    raise InputError(f"{address}: no such folder{_packages(address)}")
  path = folder / _META
  if not path.exists():
    raise InputError(
      f"{address}: has no model.json, so it is no pivot_jax artifact; for a "
      "Hugging Face folder write hf:DIR"
    )
  want = files.read_object(folder / _PRINTS)
  _check_meta(path, want.pop(_META, None))
  meta = model_json.read(path)
  packaged = folder / "params.safetensors"
  have, load_leaf, placer = (
    _packaged(packaged) if packaged.exists() else _restorer(folder)
  )
  differ = sorted(set(have) ^ set(want))
  if differ:
    raise InputError(
      f"{address}: {len(differ)} leaves differ from fingerprint.json, first "
      f"{differ[0]}: the files are damaged; make them again or use a copy"
    )

  def read(name: str, dtype: DTypeLike) -> np.ndarray:
    leaf = load_leaf(name)
    if trees.leaf_crc(leaf) != want[name]:
      raise InputError(
        f"{address}: leaf {name} differs from fingerprint.json: the files are "
        "damaged; make them again or use a copy"
      )
    return leaf.astype(dtype, copy=False)

  return meta, {name: have[name] for name in sorted(have)}, read, placer


def _check_meta(path: pathlib.Path, crc: str | None) -> None:
  """Raise InputError if model.json is not the one that was written."""
  if crc is None:
    LOG.info(
      "%s is not covered by %s, as in artifacts of version 0.1", path, _PRINTS
    )
  elif _crc(path) != crc:
    raise InputError(
      f"{path}: differs from {_PRINTS}: it was damaged or changed; make the "
      "artifact again or use a copy"
    )


def _packages(address: str) -> str:
  """List what ships with the package, for an address that names no such thing."""
  if not address.startswith("package:"):
    return ""
  root = pathlib.Path(__file__).parents[1] / "assets"
  found = sorted(p.parent for p in root.rglob("model.json"))
  names = ", ".join(p.relative_to(root).as_posix() for p in found)
  return f"; there are {names}"


def _packaged(path: pathlib.Path):
  try:
    flat = safetensors_numpy.load_file(path)
  except (safetensors.SafetensorError, OSError) as error:
    raise InputError(
      f"{path}: damaged or incomplete ({error}): use a copy"
    ) from error
  shapes = {name: leaf.shape for name, leaf in flat.items()}
  return shapes, lambda name: flat[name].copy(), lambda name: None


def _restorer(folder: pathlib.Path):
  """Restore leaves in groups of which memory holds one.

  Each time a checkpoint is read, so are the metadata of all its leaves.
  """
  path = folder.absolute() / "params"
  if not path.is_dir():
    raise InputError(
      f"{folder}: neither params/ nor params.safetensors is there"
    )
  try:
    # The handler itself: where a checkpointer reads, processes wait for all.
    found = ocp.PyTreeCheckpointHandler().metadata(path)
    leaves = trees.flatten(found.tree)
    groups = _groups(leaves)
  # Orbax raises whatever the fields of damaged metadata lead to.
  except Exception as error:
    raise _damaged(path, error) from error
  held: dict[str, np.ndarray] = {}

  def load_leaf(name: str) -> np.ndarray:
    if len(groups[name]) == 1:
      held.clear()
      return _restore(path, groups[name])[name]
    if name not in held:
      held.clear()
      held.update(_restore(path, groups[name]))
    # What is held may be given again, and belongs to none who asks.
    return held[name].copy()

  def placer(name: str):
    if not _is_sliced(leaves[name]):
      return None
    return functools.partial(_place, path, name, leaves[name])

  shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
  return shapes, load_leaf, placer


def _is_sliced(leaf: Any) -> bool:
  """Return whether a leaf is large, and stored in pieces that are not."""
  chunk = leaf.storage and leaf.storage.chunk_shape
  size = np.dtype(leaf.dtype).itemsize
  large = math.prod(leaf.shape) * size > _GROUP
  return large and bool(chunk) and math.prod(chunk) * size <= orbax_files.CHUNK


def _place(
  path: pathlib.Path,
  name: str,
  stored: Any,
  where: jax.sharding.Sharding,
  dtype: np.dtype,
) -> jax.Array:
  """Read onto each device what it holds of a leaf."""
  shape, chunk = tuple(stored.shape), stored.storage.chunk_shape
  wanted = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  # One shard at a time, with the chunks that it touches.
  touched = max(
    math.prod(
      -(-(part.stop or whole) // piece) * piece
      - (part.start or 0) // piece * piece
      for part, whole, piece in zip(index, shape, chunk)
    )
    for index in where.devices_indices_map(shape).values()
  )
  try:
    found = orbax_files.restore(
      path,
      trees.unflatten({name: wanted}),
      bytes_at_once=touched * np.dtype(stored.dtype).itemsize + 1,
      part=True,
    )
  except Exception as error:
    raise _damaged(path, error) from error
  return trees.flatten(found)[name]


def _groups(leaves: Mapping[str, Any]) -> dict[str, list[str]]:
  """Return by leaf the neighbors of its part that are read with it."""
  found: dict[str, list[str]] = {}
  group: list[str] = []
  taken, part = 0, ""
  for name, leaf in leaves.items():
    size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    top = name.partition("/")[0]
    if top != part or taken + size > _GROUP:
      group, taken, part = [], 0, top
    group.append(name)
    taken += size
    found[name] = group
  return found


def _restore(
  path: pathlib.Path, wanted: Sequence[str]
) -> dict[str, np.ndarray]:
  args = ocp.RestoreArgs(restore_type=np.ndarray)
  restore = ocp.args.PyTreeRestore(
    item=trees.unflatten(dict.fromkeys(wanted, 0)),
    restore_args=trees.unflatten(dict.fromkeys(wanted, args)),
    partial_restore=True,
  )
  try:
    return trees.flatten(
      ocp.PyTreeCheckpointHandler().restore(path, args=restore)
    )
  except Exception as error:
    raise _damaged(path, error) from error


def _damaged(path: pathlib.Path, error: Exception) -> InputError:
  first = next(iter(str(error).splitlines()), type(error).__name__)
  return InputError(
    f"{path}: damaged or incomplete ({first}): make the "
    "stage again, or restore the folder from a copy"
  )
