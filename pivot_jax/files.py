"""Files that are whole or not there, JSON, versions, and local paths.

Whatever another run may read is written aside under an unpredictable name in
the same folder and takes its own name when it is done. A link in place of the
target is replaced; what it leads to stays as it is. What is appended to, locked
or filled by others is not written through a link either: that is an error.
"""

import contextlib
import importlib.metadata
import importlib.resources
import json
import math
import os
import pathlib
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pivot_jax.errors import InputError

# Of it, texts and numbers, those of numpy and paths among them.
Content = Mapping[str, Any] | Sequence[Any]
RECIPES = "package:configs/"
# Whether this process writes: of several that run together only the first does
# (`processes.start`).
writes = True
# Of a JSON file; the index of a checkpoint of 100,000 tensors has a tenth of it.
LARGEST_JSON = 2**26
# What stands behind the name of a file that is not whole yet.
_ASIDE = r"(\.[0-9a-f]+)?\.tmp"
# One slash is left of two where an address has already become a path.
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


def local_path(path: str | os.PathLike, name: str) -> pathlib.Path:
  """Return a path to write to; raise InputError for gs://... and the like.

  A folder `gs:` would be made of it. `name` is that of the flag or argument.
  """
  text = os.fspath(path)
  if _REMOTE.match(text):
    raise InputError(
      f"{name}={text}: only folders of this machine are written; give one, and "
      "copy it there afterwards"
    )
  return pathlib.Path(text)


def is_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
  """Return whether a path, all links followed, lies in a folder."""
  real = pathlib.Path(os.path.realpath(path))
  return real.is_relative_to(os.path.realpath(folder))


def input_path(path: str | os.PathLike) -> pathlib.Path:
  """Return a path to read; `package:configs/FILE` lies beside the recipes.

  So a config names a file that ships with it in one way, wherever it is
  installed and wherever a run starts.
  """
  text = os.fspath(path)
  if not text.startswith(RECIPES):
    return pathlib.Path(text)
  folder = importlib.resources.files("pivot_jax.configs")
  return pathlib.Path(str(folder)) / text.removeprefix(RECIPES)


def check_named(path: pathlib.Path) -> None:
  """Raise InputError for a folder without a name of its own: `.`, `/`, `..`."""
  if path.name in ("", ".."):
    raise InputError(f"{path}: has no name; give the one of a new folder")


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Give an empty file to fill, which replaces `path` if nothing is raised.

  Raises InputError where `path` is a folder.
  """
  _check_writes(path)
  aside = _aside(path)
  aside.touch(exist_ok=False)
  try:
    yield aside
    try:
      os.replace(aside, path)
    except IsADirectoryError as error:
      raise InputError(f"{path}: is a folder; move it away") from error
  finally:
    aside.unlink(missing_ok=True)


def open_own(path: pathlib.Path, flags: int) -> int:
  """Open a file to write, which is made if it is absent, and not through a link.

  Nothing is cut off. Returns the descriptor. Raises InputError for a link, a
  folder, and for a pipe or a device.
  """
  _check_writes(path)
  never = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
  try:
    place = os.open(path, os.O_CREAT | never | flags, 0o666)
  except OSError as error:
    why = "a symbolic link" if path.is_symlink() else error.strerror
    raise InputError(f"{path}: cannot be written ({why})") from error
  if not stat.S_ISREG(os.fstat(place).st_mode):
    os.close(place)
    raise InputError(f"{path}: cannot be written (no regular file)")
  return place


def append_text(path: pathlib.Path, text: str) -> None:
  """Append a text as UTF-8.

  Raises as `open_own`, and for a file that has another name besides: what is
  appended would stand there, too.
  """
  place = open_own(path, os.O_WRONLY | os.O_APPEND)
  with open(place, "a", encoding="utf-8") as file:
    if os.fstat(place).st_nlink > 1:
      raise InputError(
        f"{path}: is a hard link, so that another file would change with it: "
        "put a copy in its place"
      )
    file.write(text)


def make_folder(path: pathlib.Path) -> None:
  """Make a folder unless it is there; raise InputError where a link is."""
  _check_writes(path)
  if path.is_symlink():
    raise InputError(f"{path}: is a symbolic link, which is not followed")
  path.mkdir(parents=True, exist_ok=True)


def check_unlinked(path: pathlib.Path) -> None:
  """Raise InputError for a symbolic link at a path or anywhere below it."""
  below = (
    pathlib.Path(parent, name)
    for parent, folders, names in os.walk(path)
    for name in (*folders, *names)
  )
  for one in (path, *below):
    if one.is_symlink():
      raise InputError(
        f"{one}: is a symbolic link, which is not followed: put in its place "
        "what it leads to, or use another --workdir"
      )


@contextlib.contextmanager
def writing_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Give an empty folder to fill, which becomes `path` if nothing is raised.

  Folders above it are made. Raises InputError where `path` cannot be written:
  it is a file, a link or a folder that holds something, it is not allowed, or
  as `check_named`.
  """
  check_named(path)
  _check_writes(path)
  folder = _aside(path)
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
  except OSError as error:
    raise InputError(f"{path}: cannot be written ({error})") from error
  try:
    yield folder
    try:
      os.replace(folder, path)
    except OSError as error:
      raise InputError(f"{path}: cannot be written ({error})") from error
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def is_left_over(path: pathlib.Path, name: str) -> bool:
  """Return whether a killed writer of the file `name` left this file behind."""
  return bool(re.fullmatch(re.escape(name) + _ASIDE, path.name))


def write_text(path: pathlib.Path, text: str) -> None:
  """Write a text as UTF-8, whole or not at all; half a surrogate is spelt."""
  with writing(path) as aside:
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(
  path: pathlib.Path, content: Content, *, sort_keys: bool = True
) -> None:
  """Write JSON, whole or not at all.

  Raises InputError for a number that is not finite, which JSON does not have
  and `read_json` refuses.
  """
  for place, value in _numbers(content):
    if not math.isfinite(value):
      raise InputError(
        f"{path}: {place} would be {value}, which no file of JSON holds: look "
        "at what makes it"
      )
  text = json.dumps(content, indent=2, sort_keys=sort_keys, default=_plain)
  write_text(path, text + "\n")


def save_arrays(
  path: pathlib.Path,
  arrays: Mapping[str, np.ndarray],
  *,
  compressed: bool = False,
) -> None:
  """Write named arrays as .npz, whole or not at all."""
  save = np.savez_compressed if compressed else np.savez
  with writing(path) as aside, aside.open("wb") as file:
    # No array is called as an option of `savez`.
    save(file, **arrays)  # pyright: ignore[reportArgumentType]


def read_json(path: pathlib.Path, *, largest: int = LARGEST_JSON) -> Any:
  """Return the content of a JSON file of numbers that are finite.

  Raises:
    InputError: naming the file: it is no regular file or link to one, has more
      than `largest` bytes, is not JSON, or nests too deeply, or holds NaN,
      Infinity or a number beyond float64.
  """
  data = read_bytes(path, largest=largest)
  try:
    return json.loads(
      data.decode("utf-8-sig"), parse_constant=_not_finite, parse_float=_finite
    )
  except (ValueError, RecursionError) as error:
    why = "nested too deeply" if isinstance(error, RecursionError) else error
    raise InputError(f"{path}: not readable as JSON ({why})") from error


def read_object(
  path: pathlib.Path, *, largest: int = LARGEST_JSON
) -> dict[str, Any]:
  """Return the object that a JSON file holds; raises as `read_json`."""
  found = read_json(path, largest=largest)
  if not isinstance(found, dict):
    raise InputError(f"{path}: holds no JSON object")
  return found


def parse_line(text: str, where: str) -> dict[str, Any]:
  """Return the object that a line of JSON lines holds, which may have NaN.

  Raises InputError naming `where` if it holds none.
  """
  try:
    found = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise InputError(f"{where}: not readable as JSON ({error})") from error
  if not isinstance(found, dict):
    raise InputError(f"{where}: holds no JSON object")
  return found


def read_bytes(path: pathlib.Path, *, largest: int) -> bytes:
  """Return the bytes of a file that may be foreign.

  Raises:
    InputError: naming the file: it is not there, no regular file or link to one
      (a device or a pipe would never end), or has more than `largest` bytes.
  """
  try:
    # Of a pipe, opening alone would wait for a writer.
    place = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(place, "rb") as file:
      found = os.fstat(place)
      if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: is no regular file")
      if found.st_size > largest:
        raise InputError(
          f"{path}: has {found.st_size} bytes, more than the {largest} that are read"
        )
      # A file may grow while it is read.
      return file.read(largest)
  except OSError as error:
    raise InputError(f"{path}: not readable ({error.strerror})") from error


def versions() -> dict[str, str]:
  """Return the versions of what computes and stores, for every record."""
  names = ("pivot_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
  found = {name: importlib.metadata.version(name) for name in names}
  return found | {"python": platform.python_version()}


def _check_writes(path: pathlib.Path) -> None:
  """Raise where another process is the one that writes."""
  if not writes:
    raise RuntimeError(f"{path}: only the first process may write")


def _aside(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


def _numbers(content: Any, place: str = "") -> Iterator[tuple[str, float]]:
  """Yield the floating numbers of a content, and where they are."""
  if isinstance(content, float | np.floating):
    yield place, float(content)
  elif isinstance(content, Mapping):
    for key, value in content.items():
      yield from _numbers(value, f"{place}.{key}" if place else str(key))
  elif isinstance(content, list | tuple):
    for index, value in enumerate(content):
      yield from _numbers(value, f"{place}[{index}]")


def _not_finite(name: str) -> float:
  raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise ValueError(f"{text[:20]} is beyond float64")
  return value


def _plain(value):
  if isinstance(value, (np.integer, np.floating)):
    return value.item()
  if isinstance(value, pathlib.Path):
    return str(value)
  raise TypeError(f"{type(value).__name__} does not go into JSON")
