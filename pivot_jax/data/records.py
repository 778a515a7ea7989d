"""Strict reading of JSON records and of the fields in them.

Errors name the field only; `sources.py`, which says what kind of row a record
is, adds the file and the row.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pivot_jax.errors import InputError

Record = Mapping[str, Any]


def parse(data: bytes) -> Record:
  """Returns the JSON object that the bytes of a record hold.

  Raises:
    InputError: no UTF-8, no JSON, or no object; it names no row.
  """
  try:
    record = json.loads(data.decode("utf-8").removeprefix("\ufeff"))
  except UnicodeDecodeError as error:
    byte = error.start + 1
    raise InputError(
      f"invalid UTF-8 at byte {byte} of the line", kind="bad_utf8"
    ) from None
  except json.JSONDecodeError as error:
    raise InputError(
      f"invalid JSON at column {error.colno}: {error.msg}", kind="bad_json"
    ) from None
  except (ValueError, RecursionError) as error:
    raise InputError(
      f"JSON that cannot be read: {error}", kind="bad_json"
    ) from None
  return as_object(record)


def as_object(record: Any) -> Record:
  """Returns a JSON value that is an object; raises InputError for any other."""
  if not isinstance(record, dict):
    kind = type(record).__name__
    raise InputError(f"a record must be a JSON object, not {kind}")
  return record


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


def image_paths(record: Record) -> str | list[str] | None:
  """Returns the path of a record's image, a list of several, None for none."""
  found = record.get("image")
  if not isinstance(found, list):
    return None if found is None else _utf8(found, "image")
  paths = [_utf8(one, f"image[{i}]") for i, one in enumerate(found)]
  if not paths:
    return None
  return paths if len(paths) > 1 else paths[0]


def listed(image: Any) -> list[Any]:
  """Returns the images of a row (None, one, or a list of several) as a list."""
  if image is None:
    return []
  return list(image) if isinstance(image, list) else [image]


def given_id(record: Record, default: str) -> str:
  """Returns the id of a record as text, `default` if it has none."""
  found = record.get("id")
  if found is None:
    return default
  if isinstance(found, bool) or not isinstance(found, (str, int)):
    raise InputError(f"id: must be text or a number, not {found!r}")
  return _utf8(str(found), "id")


@contextlib.contextmanager
def located(name: str) -> Iterator[None]:
  """Puts the row's name before the message of an error that passes."""
  try:
    yield
  except InputError as error:
    raise InputError(f"{name}: {error}", kind=error.kind) from None


def _utf8(found: Any, field: str) -> str:
  if not isinstance(found, str):
    raise InputError(f"{field}: must be text, not {found!r}")
  try:
    found.encode("utf-8")
  except UnicodeEncodeError:
    # JSON can spell half a surrogate pair, which no tokenizer can read.
    raise InputError(
      f"{field}: has half a surrogate pair; fix it", kind="lone_surrogate"
    ) from None
  return found
