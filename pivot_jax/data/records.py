"""Strict reading of JSON files: records by index, and the fields in them.

A file is UTF-8 (a byte order mark is accepted) and holds JSON objects, as one
list or one a line. Field errors name the field only; `sources.py`, which says
what kind of row a record is, adds the file and the row.
"""

import array
import codecs
import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pivot_jax.errors import InputError

Record = Mapping[str, Any]


class List:
  """A JSON list of objects, held in memory."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    data = path.read_bytes()
    try:
      records = _parse(data)
    except UnicodeDecodeError as error:
      line = data.count(b"\n", 0, error.start) + 1
      byte = error.start - data.rfind(b"\n", 0, error.start)
      raise InputError(
        f"{path}:{line}: invalid UTF-8 at byte {byte} of the line"
      ) from None
    except json.JSONDecodeError as error:
      raise InputError(
        f"{path}:{error.lineno}: invalid JSON at column {error.colno}:"
        f" {error.msg}"
      ) from None
    except (ValueError, RecursionError) as error:
      raise InputError(f"{path}: JSON that cannot be read: {error}") from None
    if not isinstance(records, list):
      raise InputError(f"{path}: must be a JSON list of records")
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def name(self, index: int) -> str:
    return f"{self._path}#{index}"

  def record(self, index: int) -> Record:
    return _object(self._records[index])


class Lines:
  """JSON objects, one a line; of the lines only the offsets are in memory."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    offsets = array.array("q", [0])
    last = 0  # The last line that is not blank; those after it do not count.
    with path.open("rb") as file:
      for number, line in enumerate(file, 1):
        offsets.append(offsets[-1] + len(line))
        if line.removeprefix(codecs.BOM_UTF8).strip():
          last = number
    self._offsets = np.asarray(offsets[: last + 1], np.int64)

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def name(self, index: int) -> str:
    return f"{self._path}:{index + 1}"

  def record(self, index: int) -> Record:
    begin, end = map(int, self._offsets[index : index + 2])
    # Opened anew so that threads and processes can share the source.
    with self._path.open("rb") as file:
      file.seek(begin)
      line = file.read(end - begin)
    try:
      record = _parse(line)
    except UnicodeDecodeError as error:
      byte = error.start + 1
      raise InputError(f"invalid UTF-8 at byte {byte} of the line") from None
    except json.JSONDecodeError as error:
      raise InputError(
        f"invalid JSON at column {error.colno}: {error.msg}"
      ) from None
    except (ValueError, RecursionError) as error:
      raise InputError(f"JSON that cannot be read: {error}") from None
    return _object(record)


def text(record: Record, field: str) -> str:
  """Returns a text field that can be written as UTF-8."""
  if field not in record:
    raise InputError(f"{field}: the field is missing")
  return _utf8(record[field], field)


def turns(record: Record) -> list[dict[str, str]]:
  """Returns the turns of a LLaVA record, keys as they came."""
  if "conversations" not in record:
    raise InputError("conversations: the field is missing")
  found = record["conversations"]
  if not isinstance(found, list) or not found:
    raise InputError("conversations: must be a list of turns, and not empty")
  for index, turn in enumerate(found):
    where = f"conversations[{index}]"
    if not isinstance(turn, dict):
      raise InputError(f"{where}: must have the keys from and value")
    if not ({"from", "role"} & set(turn)):
      raise InputError(f"{where}.from: the field is missing")
    if not ({"value", "content"} & set(turn)):
      raise InputError(f"{where}.value: the field is missing")
    for key in ("from", "role", "value", "content"):
      if key in turn:
        _utf8(turn[key], f"{where}.{key}")
  return found


def question_and_answer(found: Sequence[Record]) -> tuple[str, str]:
  """Returns the texts of a question's turn and its answer's."""
  roles = [turn.get("from", turn.get("role")) for turn in found]
  asked, answered = ("human", "user"), ("gpt", "assistant")
  if len(roles) != 2 or roles[0] not in asked or roles[1] not in answered:
    raise InputError(
      "conversations: an evaluation row needs one turn from human and one from"
      f" gpt, not {roles}"
    )
  question, answer = (turn.get("value", turn.get("content")) for turn in found)
  return question, answer


def image_path(record: Record) -> str | None:
  """Returns the path of a record's one image, None for a text-only record."""
  found = record.get("image")
  if isinstance(found, list):
    if len(found) > 1:
      raise InputError(f"image: {len(found)} images; a row has one at most")
    found = found[0] if found else None
  return None if found is None else _utf8(found, "image")


def given_id(record: Record, default: str) -> str:
  """Returns the id of a record as text, `default` if it has none."""
  found = record.get("id")
  if found is None:
    return default
  if isinstance(found, bool) or not isinstance(found, (str, int)):
    raise InputError(f"id: must be text or a number, not {found!r}")
  return _utf8(str(found), "id")


def number_ids(
  file: List | Lines, *, stem: str, unique: bool
) -> dict[int, str]:
  """Returns new ids for the rows whose id an earlier row has.

  Reading every record also finds the lines that are not JSON objects.

  Raises:
    InputError: a record that cannot be read, or with `unique` a second use.
  """
  first: dict[str, int] = {}
  again: list[tuple[int, str]] = []
  for index in range(len(file)):
    with located(file.name(index)):
      found = given_id(file.record(index), f"{stem}-{index}")
    if found in first:
      again.append((index, found))
    first.setdefault(found, index)
  if again and unique:
    index, found = again[0]
    raise InputError(
      f"{file.name(index)}: id: {found!r} is also the id of"
      f" {file.name(first[found])}; an evaluation needs each id once"
    )
  used, count, renamed = set(first), dict.fromkeys(first, 1), {}
  for index, found in again:
    count[found] += 1
    while f"{found}#{count[found]}" in used:
      count[found] += 1
    renamed[index] = f"{found}#{count[found]}"
    used.add(renamed[index])
  return renamed


@contextlib.contextmanager
def located(name: str) -> Iterator[None]:
  """Puts the row's name before the message of an error that passes."""
  try:
    yield
  except InputError as error:
    raise InputError(f"{name}: {error}") from None


def _parse(data: bytes) -> Any:
  return json.loads(data.decode("utf-8").removeprefix("\ufeff"))


def _object(record: Any) -> Record:
  if not isinstance(record, dict):
    kind = type(record).__name__
    raise InputError(f"a record must be a JSON object, not {kind}")
  return record


def _utf8(found: Any, field: str) -> str:
  if not isinstance(found, str):
    raise InputError(f"{field}: must be text, not {found!r}")
  try:
    found.encode("utf-8")
  except UnicodeEncodeError:
    # JSON can spell half a surrogate pair, which no tokenizer can read.
    raise InputError(f"{field}: has half a surrogate pair; fix it") from None
  return found
