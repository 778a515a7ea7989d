"""Artifacts: a folder of parameters that explains itself.

`params/` (orbax) or `params.safetensors` (shipped with the package),
`model.json` with every choice, `tokenizer/`, and `fingerprint.json` with a
CRC32 per leaf and one of model.json, which are verified on load. They find
damage, not forgery: whoever changes a file can write its CRC32 anew.
"""

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

from pivot_jax import files, trees
from pivot_jax.errors import InputError
from pivot_jax.weights import model_json

LOG = logging.getLogger("pivot_jax")

_META, _PRINTS = "model.json", "fingerprint.json"
# Bytes of leaves that are read at a time; a larger leaf is read alone.
_GROUP = 2**26


def save(
  path: pathlib.Path, params: trees.Params, *, meta: Mapping[str, Any]
) -> None:
  """Write `params/`, `model.json` and `fingerprint.json` into a folder."""
  files.make_folder(path)
  host = jax.device_get(params)
  with ocp.PyTreeCheckpointer() as saver:
    saver.save(path.absolute() / "params", host, force=True)
  _describe(path, meta, trees.fingerprint(host))


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
  _describe(path, meta, trees.fingerprint(trees.unflatten(flat)))


def _describe(
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
]:
  """Return model.json, the leaves' shapes, and a reader of one, verified.

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
  have, load_leaf = (
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
    return np.asarray(leaf).astype(dtype)

  return meta, {name: have[name] for name in sorted(have)}, read


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
  return {name: leaf.shape for name, leaf in flat.items()}, flat.__getitem__


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
    with ocp.PyTreeCheckpointer() as reader:
      found = reader.metadata(path).item_metadata
    if found is None:
      raise OSError("its metadata cannot be read")
    leaves = trees.flatten(found.tree)
    groups = _groups(leaves)
  # Orbax raises whatever the fields of damaged metadata lead to.
  except Exception as error:
    raise _damaged(path, error) from error
  held: dict[str, np.ndarray] = {}

  def load_leaf(name: str) -> np.ndarray:
    if name not in held:
      held.clear()
      held.update(_restore(path, groups[name]))
    return held[name]

  return {name: tuple(leaf.shape) for name, leaf in leaves.items()}, load_leaf


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
    with ocp.PyTreeCheckpointer() as reader:
      return trees.flatten(reader.restore(path, args=restore))
  except Exception as error:
    raise _damaged(path, error) from error


def _damaged(path: pathlib.Path, error: Exception) -> InputError:
  first = next(iter(str(error).splitlines()), type(error).__name__)
  return InputError(
    f"{path}: damaged or incomplete ({first}): make the "
    "stage again, or restore the folder from a copy"
  )
