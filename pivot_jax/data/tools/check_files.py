"""Opens what is to be checked; what has no row that can be read raises why."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from pivot_jax import files
from pivot_jax.data import opener
from pivot_jax.data.sources import json_index
from pivot_jax.errors import InputError


def is_there(path: str) -> bool:
  """Return whether there is such a file or folder, or one of a pattern."""
  place = files.input_path(path)
  return place.exists() or ("*" in place.name and _matches(place))


def open_file(path: str, root: str | None) -> Any:
  """Return the source of a path of the command line.

  Raises:
    InputError: nothing there, nothing that is known, or no row that can be
      read; of a .json or .jsonl file it then has a `kind`.
  """
  if path.startswith("scenes:"):
    raise InputError(f"{path}: scenes are made, and have no faults; give files")
  file = pathlib.Path(path)
  try:
    return opener.open_path(file, image_root=root, flawed=True)
  except InputError as error:
    if not opener.holds_records(file):
      raise
    refused = error
  return _Unknown(_lines(file, refused))


def open_entry(spec: Mapping[str, Any]) -> Any:
  """Return the source of a config's entry; raise as `open_file`."""
  file = pathlib.Path(spec["path"])
  try:
    return opener.open_source(spec, flawed=True)
  except InputError as error:
    if opener.holds_records(file):
      _lines(file, error)
    # The file has rows, and something else of the entry is wrong.
    raise


def _matches(pattern: pathlib.Path) -> bool:
  return any(pattern.parent.glob(pattern.name))


def _lines(path: pathlib.Path, refused: InputError) -> json_index.File:
  """Return a file's records, or raise that it has none."""
  try:
    found = json_index.File(path)
  except InputError as error:
    # Anything but a list is refused as JSON that is none.
    is_json = error.kind == "bad_json" and _is_json(path)
    kind = "schema" if is_json else error.kind
    raise InputError(str(refused), kind=kind) from None
  if not len(found):
    raise InputError(f"{path}: the file has no rows", kind="schema")
  return found


def _is_json(path: pathlib.Path) -> bool:
  """Return whether a file, unless it is very large, is one JSON value."""
  with path.open("rb") as file:
    data = file.read(json_index.LONGEST + 1)
  if len(data) > json_index.LONGEST:
    return False
  try:
    json.loads(data.decode("utf-8-sig"))
  except (ValueError, RecursionError):
    return False
  return True


class _Unknown:
  """The records of a file of which none tells what kind they are of."""

  def __init__(self, file: json_index.File):
    self._file = file

  def __len__(self) -> int:
    return len(self._file)

  def name(self, index: int) -> str:
    return self._file.name(index)

  def text(self, index: int) -> dict[str, Any]:
    self._file.record(index)
    raise InputError(
      "has none of: conversations; question, chosen and rejected; question and"
      " answer",
      kind="schema",
    )
