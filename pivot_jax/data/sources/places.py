"""Where rows stand, and where their images may lie: inside a root, only there.

A path out of a data set is never trusted. No file is opened here.
"""

import os
import pathlib
import re
from typing import NamedTuple

from pivot_jax.errors import InputError

_NAME = re.compile(r"(.+)([:#])(\d+)", re.DOTALL)


class Place(NamedTuple):
  """A file and the index of a row in it, from 0."""

  file: str
  row: int


def place(name: str) -> Place:
  """Return what a row's name says: FILE:LINE, FILE#INDEX or FILE:ROW.

  Raises:
    ValueError: the name of something else, as of a scene.
  """
  found = _NAME.fullmatch(name)
  if not found:
    raise ValueError(f"{name} is not the name of a row")
  file, mark, number = found[1], found[2], int(found[3])
  lines = mark == ":" and file.endswith(".jsonl")
  return Place(file, number - 1 if lines else number)


def resolve(root: str | os.PathLike, relative: str) -> pathlib.Path:
  """Return the file `relative` names inside `root`, and only there.

  Raises:
    InputError: an absolute path, a URL, `..`, a symbolic link that leads out
      of `root`, or no such file.
  """
  if not isinstance(relative, str) or not relative or "\0" in relative:
    raise InputError(f"image: {relative!r} is not a path", kind="missing_image")
  if "://" in relative or relative.startswith("data:"):
    raise InputError(
      f"image: {relative!r} is a URL; download it into the image root",
      kind="outside_root",
    )
  # Both kinds of path, so that a data set means the same on every system.
  kinds = (pathlib.PurePosixPath(relative), pathlib.PureWindowsPath(relative))
  if any(path.anchor or ".." in path.parts for path in kinds):
    raise InputError(
      f"image: {relative!r} escapes the image root; use a relative path",
      kind="outside_root",
    )
  root = pathlib.Path(root)
  path = root / relative
  try:
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
      raise InputError(
        f"image: {relative!r} escapes the image root by a link",
        kind="outside_root",
      )
    found = real.is_file()
  except (OSError, RuntimeError) as error:  # A loop of links, a long name.
    raise InputError(
      f"image: {path}: {reason(error)}", kind="missing_image"
    ) from None
  if not found:
    raise InputError(f"image: {path}: no such file", kind="missing_image")
  return path


def reason(error: BaseException) -> str:
  """Return what an error says, in one line."""
  text = str(error.strerror or error) if isinstance(error, OSError) else None
  return " ".join((text or str(error) or type(error).__name__).split())
