"""Folders of safetensors: one file or shards with an index, read and written.

Names, layouts and configurations of models are not known here (`hf.py`).
Pickled weights are refused: opening one runs whatever code it holds.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# Registers bfloat16 with numpy, which safetensors needs to read it.
import ml_dtypes  # noqa: F401
import numpy as np
import safetensors
import safetensors.numpy

from pivot_jax import errors

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FLOATS = ("F64", "F32", "F16", "BF16")


class Stored(NamedTuple):
  """Where one tensor lies, its shape, and its type as safetensors names it."""

  path: Path
  shape: tuple[int, ...]
  dtype: str


def contents(folder: Path) -> dict[str, Stored]:
  """Lists the tensors of a folder without reading them.

  Raises:
    InputError: no safetensors, a missing or damaged file, or an index that does
      not fit its shards.
  """
  found: dict[str, Stored] = {}
  for path, names in _files(folder).items():
    try:
      with safetensors.safe_open(path, framework="numpy") as file:
        present = set(file.keys())
        lost = sorted((names or set()) - present)
        if lost:
          raise errors.InputError(
            f"{path}: lacks {', '.join(lost)}, which {_INDEX} places there;"
            " download the folder again"
          )
        for name in sorted(present):
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
  """Reads the named tensors as float32, each file opened once.

  Raises:
    InputError: a tensor that is not a float.
  """
  arrays = {}
  for name in names:
    path, _, dtype = stored[name]
    if dtype not in _FLOATS:
      raise errors.InputError(
        f"{path}: {name} is stored as {dtype}, not as a float"
        f" ({', '.join(_FLOATS)}); give unquantised weights"
      )
  by_file: dict[Path, list[str]] = {}
  for name in names:
    by_file.setdefault(stored[name].path, []).append(name)
  for path, group in by_file.items():
    with safetensors.safe_open(path, framework="numpy") as file:
      for name in group:
        arrays[name] = np.asarray(file.get_tensor(name), np.float32)
  return arrays


def write(
  folder: Path,
  arrays: Mapping[str, np.ndarray],
  *,
  shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes one file, or shards of at most `shard_bytes` with an index."""
  folder.mkdir(parents=True, exist_ok=True)
  shards: list[dict[str, np.ndarray]] = [{}]
  size = 0
  for name, array in arrays.items():
    if shards[-1] and size + array.nbytes > shard_bytes:
      shards.append({})
      size = 0
    # safetensors writes the memory of a transposed view in the wrong order.
    shards[-1][name] = np.ascontiguousarray(array)
    size += array.nbytes
  count = len(shards)
  names = [_FILE]
  if count > 1:
    names = [
      f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
    ]
  for file, shard in zip(names, shards, strict=True):
    # transformers refuses a file that does not say which layout it has.
    safetensors.numpy.save_file(shard, folder / file, metadata={"format": "pt"})
  if count > 1:
    place = {k: f for f, s in zip(names, shards, strict=True) for k in s}
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": place}
    write_json(folder / _INDEX, index)


def read_json(path: Path) -> dict:
  """Reads a JSON object."""
  try:
    value = json.loads(path.read_text())
  except FileNotFoundError:
    raise errors.InputError(
      f"{path}: not found; give the folder of a Hugging Face checkpoint"
    ) from None
  except (OSError, ValueError) as error:
    raise errors.InputError(f"{path}: is not readable JSON ({error})") from None
  if not isinstance(value, dict):
    raise errors.InputError(f"{path}: holds no JSON object")
  return value


def write_json(path: Path, value: dict) -> None:
  """Writes a JSON object for people to read."""
  path.write_text(json.dumps(value, indent=2) + "\n")


def _files(folder: Path) -> dict[Path, set[str] | None]:
  """The files to read, each with the names the index expects in it."""
  if (folder / _INDEX).exists():
    places = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(places, dict):
      raise errors.InputError(f"{folder / _INDEX}: has no weight_map")
    files: dict[Path, set[str] | None] = {}
    for name, file in places.items():
      if Path(file).name != file:
        raise errors.InputError(
          f"{folder / _INDEX}: {name} lies in {file!r}, outside the folder"
        )
      names = files.setdefault(folder / file, set())
      names.add(name)
    absent = sorted(path.name for path in files if not path.exists())
    if absent:
      raise errors.InputError(
        f"{folder}: {', '.join(absent)} named by {_INDEX} not found; download"
        " the missing files"
      )
    return files
  if (folder / _FILE).exists():
    return {folder / _FILE: None}
  pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
  if pickles:
    raise errors.InputError(
      f"{folder}: {', '.join(pickles)} are pickles, which can run code when"
      " opened; convert them to safetensors (transformers: from_pretrained,"
      " then save_pretrained)"
    )
  raise errors.InputError(f"{folder}: holds neither {_FILE} nor {_INDEX}")
