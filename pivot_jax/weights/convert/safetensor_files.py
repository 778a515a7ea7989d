"""Folders of safetensors: one file or shards with an index, read and written.

Names, layouts and configurations of models are not known here (`hf.py`).
Pickled weights are refused: opening one runs whatever code it holds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import huggingface_hub

# Registers bfloat16 with numpy, which safetensors needs to read it.
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from pivot_jax import errors, files, texts

_PATTERN = "model{suffix}.safetensors"
_FILE = _PATTERN.format(suffix="")
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pth.tar", "*.ckpt", "*.pkl")
_FLOATS = ("F64", "F32", "F16", "BF16")
_CHUNK = 2**22  # elements read at a time
_ROWS = 32  # and copied at a time
_PICKLED = (
  "a pickle can run code when opened and is not read; convert it to safetensors"
  " where you trust it (docs/formats.md says how)"
)


class Stored(NamedTuple):
  """The file of one tensor, its shape, and its type as safetensors names it."""

  path: Path
  shape: tuple[int, ...]
  dtype: str


def contents(folder: Path) -> dict[str, Stored]:
  """List the tensors of a folder without reading them.

  Raises:
    InputError: no safetensors, a missing or damaged file, or an index that does
      not fit its shards.
  """
  found: dict[str, Stored] = {}
  for path, names in _files(folder).items():
    present = contents_of_file(path)
    lost = sorted((names or set()) - present.keys())
    if lost:
      raise errors.InputError(
        f"{path}: lacks {', '.join(lost)}, which {_INDEX} places there;"
        " download the folder again"
      )
    stray = sorted(present.keys() - names) if names is not None else []
    if stray:
      raise errors.InputError(
        f"{path}: holds {', '.join(stray)}, which {_INDEX} does not place"
        " there; give the index and the shards of one checkpoint"
      )
    found |= present
  return found


def contents_of_file(path: Path) -> dict[str, Stored]:
  """List the tensors of one safetensors file without reading them.

  Raises:
    InputError: no such file, a pickle, or a truncated or malformed file.
  """
  if any(path.match(pattern) for pattern in _PICKLES):
    raise errors.InputError(f"{path}: {_PICKLED}")
  if not path.is_file():
    raise errors.InputError(f"{path}: is no regular file")
  found = {}
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      for name in sorted(file.keys()):
        view = file.get_slice(name)
        shape = tuple(view.get_shape())
        found[name] = Stored(path, shape, view.get_dtype())
  except (safetensors.SafetensorError, OSError) as error:
    raise errors.InputError(
      f"{path}: cannot be read as safetensors ({error}); copy or download"
      " it again"
    ) from error
  return found


def read(
  stored: Mapping[str, Stored], names: list[str]
) -> dict[str, np.ndarray]:
  """Read the named tensors as float32.

  Raises:
    InputError: a tensor that is not a float.
  """
  arrays = {}
  for name in names:
    arrays[name] = np.empty(stored[name].shape, np.float32)
    fill(arrays[name], stored[name], name)
  return arrays


def not_floats(stored: Mapping[str, Stored]) -> list[str]:
  """Return "name type" of the tensors that are not floats."""
  return [
    f"{name} {place.dtype}"
    for name, place in stored.items()
    if place.dtype not in _FLOATS
  ]


def fill(
  view: np.ndarray,
  stored: Stored,
  name: str,
  *,
  block: int = 0,
  blocks: int = 1,
  lead: int = 0,
) -> None:
  """Write a stored tensor, or block `block` of `blocks` of its rows, cast.

  Leading axes of length one (`lead`) are skipped. It reads some megabytes at
  a time, so that memory holds the target and little else.

  Raises:
    InputError: a tensor that is not a float.
  """
  if stored.dtype not in _FLOATS:
    raise errors.InputError(
      f"{stored.path}: {name} is stored as {stored.dtype}, not as a float"
      f" ({', '.join(_FLOATS)}); give unquantised weights"
    )
  with safetensors.safe_open(stored.path, framework="numpy") as file:
    if lead or not view.ndim:
      whole = file.get_tensor(name)
      view[...] = whole.reshape(whole.shape[lead:])
      return
    source = file.get_slice(name)
    rows = stored.shape[0] // blocks
    step = max(1, _CHUNK * rows // max(1, view.size))
    for start in range(0, rows, step):
      stop = min(rows, start + step)
      part = source[block * rows + start : block * rows + stop]
      part = part.astype(view.dtype, copy=False)
      # A few rows at a time a transposed copy stays in the cache.
      for row in range(0, stop - start, _ROWS):
        end = min(stop, start + row + _ROWS)
        view[start + row : end] = part[row : row + _ROWS]


def write(
  folder: Path,
  arrays: Mapping[str, np.ndarray],
  *,
  dtype: str = "float32",
  shard_bytes: int = 5_000_000_000,
) -> None:
  """Write one file, or shards of at most `shard_bytes` with an index."""
  files.make_folder(folder)
  kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
  split = huggingface_hub.split_state_dict_into_shards_factory(
    dict(arrays),
    get_storage_size=lambda array: array.size * kind.itemsize,
    filename_pattern=_PATTERN,
    max_shard_size=shard_bytes,
  )
  for file, names in split.filename_to_tensors.items():
    # safetensors writes the memory of a transposed view in the wrong order, and
    # transformers refuses a file that does not say which layout it has.
    with files.writing(folder / file) as aside:
      safetensors.numpy.save_file(
        {name: cast(name, arrays[name], kind) for name in names},
        aside,
        metadata={"format": "pt"},
      )
  if split.is_sharded:
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    write_json(folder / _INDEX, index)


def cast(name: str, array: np.ndarray, kind: np.dtype) -> np.ndarray:
  """Return an array in another dtype; refuse what float16 cannot hold."""
  with np.errstate(over="ignore"):
    cast = np.ascontiguousarray(array, kind)
  if (
    kind == np.float16
    and not np.isfinite(cast).all()
    and np.isfinite(array).all()
  ):
    raise errors.InputError(
      f"{name} has numbers beyond float16 (65504); write bfloat16 or float32"
    )
  return cast


def read_json(path: Path) -> dict:
  """Read a JSON object; raises InputError as `files.read_object`."""
  if not path.exists():
    raise errors.InputError(
      f"{path}: not found; give the folder of a Hugging Face checkpoint"
    )
  return files.read_object(path)


def write_json(path: Path, value: dict) -> None:
  """Write a JSON object, its keys in their order as Hugging Face's files have."""
  files.write_json(path, value, sort_keys=False)


def _files(folder: Path) -> dict[Path, set[str] | None]:
  """Return the files to read, each with the names the index expects in it."""
  if (folder / _INDEX).exists() and (folder / _FILE).exists():
    raise errors.InputError(
      f"{folder}: holds both {_FILE} and {_INDEX}, which may be of two"
      " checkpoints; remove one of them"
    )
  if (folder / _INDEX).exists():
    places = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(places, dict):
      raise errors.InputError(f"{folder / _INDEX}: has no weight_map")
    found: dict[Path, set[str]] = {}
    for name, file in places.items():
      if not isinstance(file, str):
        raise errors.InputError(
          f"{folder / _INDEX}: {name} lies in"
          f" {texts.shown(repr(file), longest=100)}, which is no name of a file"
        )
      if Path(file).name != file:
        raise errors.InputError(
          f"{folder / _INDEX}: {name} lies in {file!r}, outside the folder"
        )
      found.setdefault(folder / file, set()).add(name)
    absent = sorted(path.name for path in found if not path.exists())
    if absent:
      raise errors.InputError(
        f"{folder}: {', '.join(absent)} named by {_INDEX} not found; download"
        " the missing files"
      )
    return dict(found)
  if (folder / _FILE).exists():
    return {folder / _FILE: None}
  pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
  if pickles:
    raise errors.InputError(f"{folder}: holds {', '.join(pickles)}: {_PICKLED}")
  raise errors.InputError(f"{folder}: holds neither {_FILE} nor {_INDEX}")


def has_weights(folder: Path) -> bool:
  """Return whether a folder holds weights, of a kind that is read or not."""
  patterns = ("*.safetensors", _INDEX, *_PICKLES)
  return any(True for pattern in patterns for _ in folder.glob(pattern))


def equal(stored: Mapping[str, Stored], first: str, second: str) -> bool:
  """Return whether two stored tensors hold the same numbers."""
  one, other = stored[first], stored[second]
  if one.shape != other.shape:
    return False
  if one.dtype != other.dtype:
    arrays = read(stored, [first, second])
    return np.array_equal(arrays[first], arrays[second])
  with (
    safetensors.safe_open(one.path, framework="numpy") as a,
    safetensors.safe_open(other.path, framework="numpy") as b,
  ):
    left, right = a.get_slice(first), b.get_slice(second)
    step = max(1, _CHUNK // max(1, int(np.prod(one.shape[1:]))))
    rows = one.shape[0]
    return all(
      np.array_equal(
        left[i : min(rows, i + step)], right[i : min(rows, i + step)]
      )
      for i in range(0, rows, step)
    )
