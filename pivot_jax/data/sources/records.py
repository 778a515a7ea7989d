"""Strict reading of JSON records and of the fields in them.

Errors name the field only; the source that reads the record adds the file and
the row (`located`).
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pivot_jax.errors import InputError

Record = Mapping[str, Any]
Json = None | bool | int | float | str | list[Any] | dict[str, Any]
# The field `image` of a row: pixels, or a path or True in place of them.
Shown = None | bool | str | np.ndarray | Sequence[Any]

# The fields that pictures are read from, and those that hold a question.
PICTURES = ("image", "images")
QUESTIONS = ("question", "prompt")

# Fields of a row of each kind; texts where no type is named.
_FIELDS = {
  "conversation": ("conversations",),
  "preference": ("question", "chosen", "rejected"),
  "eval": ("question", "answer"),
  "classify": ("label",),
  "segment": (),
}
_TYPES = {"conversations": list, "label": int}
_MOST_IMAGES = 10_000  # Of a row.
# Keys that hold a picture, as `img`, `image_path`, `input_images`, `video2`.
_PICTURE = (
  "(?:image|img|picture|pic|photo|photograph|video|frame|screenshot"
  "|jpe?g|png|webp|gif|mp4)s?"
)
_AROUND = (
  "(?:(?:path|file|filename|name|url|uri|link|byte|data|base64|b64|list|src"
  "|local|input|main|query|original|orig|raw|decoded|full|reference|ref|left"
  "|right|first|second|before|after|chosen|rejected|target|pil|rgb"
  "|value|content)s?|[0-9]|[ab])"
)
_NAMED = re.compile(rf"(?:{_AROUND}[_. -]?)*{_PICTURE}(?:[_. -]?{_AROUND})*")
# Those that often say where a picture came from, of a row that has one.
_ORIGIN = re.compile("name|url|uri|link|src|orig|raw")
# Keys whose texts are text, whatever they end in: fields and names of rows.
_TEXTS = frozenset(
  (*QUESTIONS, "conversations", "chosen", "rejected", "answer", "answers")
  + ("category", "kind", "from", "value", "role", "content")
)
_ROW_NAME = re.compile(
  r"(?:.*[_. -])?(?:id|ids|ID|index)|.*[a-z]I[dD]s?|(?:data_)?source"
)
_SUFFIXES = frozenset(
  "jpg jpeg png gif webp bmp ppm pgm tif tiff svg avif heic"
  " mp4 avi mov mkv webm".split()
)
_QUERY = re.compile("[?#]")
_LONGEST = 1000  # Characters of a path or an address.
# How base64 of JPEG, PNG, GIF and WebP begins; shorter texts are words.
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
_SHORTEST = 64


def parse(data: bytes) -> Record:
  """Return the JSON object that the bytes of a record hold.

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


def as_object(record: Json) -> Record:
  """Return a JSON value that is an object; raise InputError for any other."""
  if not isinstance(record, dict):
    kind = type(record).__name__
    raise InputError(f"a record must be a JSON object, not {kind}")
  return record


def text(record: Record, field: str) -> str:
  """Return a text field that can be written as UTF-8."""
  if field not in record:
    raise InputError(f"{field}: the field is missing")
  return _utf8(record[field], field)


def turns(record: Record) -> list[dict[str, str]]:
  """Return the turns of a LLaVA record, keys as they came."""
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
    if len(turn) > 2:
      check_unread(turn, shown=_shown(record), where=f"{where}.")
  return found


def question(record: Record) -> str:
  """Return a row's question, in `question` or `prompt`, which must agree."""
  held = [name for name in QUESTIONS if record.get(name) is not None]
  if len(held) > 1 and record["question"] != record["prompt"]:
    raise InputError(
      "question and prompt: are two different texts; keep one", kind="schema"
    )
  named = [name for name in QUESTIONS if name in record]
  return text(record, (*held, *named, "question")[0])


def question_and_answer(found: Sequence[Record]) -> tuple[str, str]:
  """Return the texts of a question's turn and its answer's."""
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
  """Return the path of a record's image, a list of several, None for none.

  They are read from `image` or from `images`.

  Raises:
    InputError: both hold images, a path is no text, or another key looks like
      a picture, which nothing reads.
  """
  held = [name for name in PICTURES if record.get(name) not in (None, [])]
  if len(held) > 1:
    raise InputError(
      "image and images: both hold pictures; keep one", kind="schema"
    )
  check_unread(
    {key: value for key, value in record.items() if key not in PICTURES},
    shown=_shown(record),
  )
  if not held:
    return None
  name, found = held[0], record[held[0]]
  if not isinstance(found, list):
    return _utf8(found, name)
  paths = [_utf8(one, f"{name}[{i}]") for i, one in enumerate(found)]
  return paths if len(paths) > 1 else paths[0]


def check_unread(
  fields: Record, *, shown: Sequence[str] = (), where: str = ""
) -> None:
  """Raise for a field that looks like a picture, as nothing reads it.

  A field looks so by its name. In a row that shows no picture, it looks so by
  its value, too: the name of a file of pictures, or base64. In a row that shows
  some, a field may name the same ones again.

  Args:
    shown: the paths of the pictures that are read.
    where: the start of the fields' names in messages.
  """
  for key, value in fields.items():
    if _is_unread(key, value, shown):
      raise unread(f"{where}{key}")


def unread(name: str) -> InputError:
  """Return the error of a field or column of pictures that is not read."""
  return InputError(
    f"{name}: looks like a picture, and pictures are read from image or images;"
    " rename the key, or remove it",
    kind="schema",
  )


class _Key(NamedTuple):
  """The roles of a key: a picture's name, its origin's, or some text's."""

  named: bool
  origin: bool
  text: bool


@functools.lru_cache(maxsize=4096)
def _key(key: str) -> _Key:
  lower = key.lower()
  named = len(key) <= 64 and bool(_NAMED.fullmatch(lower))
  return _Key(
    named,
    bool(_ORIGIN.search(lower)),
    lower in _TEXTS or bool(_ROW_NAME.fullmatch(key)),
  )


def names_picture(key: str) -> bool:
  """Return whether a field or column is named as one of pictures."""
  return _key(key).named


def _is_unread(key: str, value: Any, shown: Sequence[str]) -> bool:
  about = _key(key)
  if about.named:
    texts = _leaves(value)
    if not shown or not texts:
      return bool(texts)
    stems = set(map(_stem, shown))
    return not about.origin and not stems.issuperset(map(_stem, texts))
  if shown or about.text:
    return False
  return any(map(_is_picture, _leaves(value)))


def _shown(record: Record) -> list[str]:
  return _leaves([record.get(name) for name in PICTURES])


def _leaves(value: Any) -> list[str]:
  """Return the texts in a JSON value, but for empty ones."""
  if isinstance(value, str):
    return [value] if value else []
  found, waiting = [], [value]
  # No recursion: a value may be nested as deeply as JSON can be.
  while waiting:
    one = waiting.pop()
    if isinstance(one, str) and one:
      found.append(one)
    elif isinstance(one, dict):
      waiting += one.values()
    elif isinstance(one, list):
      waiting += one
  return found


def _is_picture(value: str) -> bool:
  if value.startswith(("data:image/", "data:video/")):
    return True
  if len(value) >= _SHORTEST and value.startswith(_BASE64):
    return True
  if len(value) > _LONGEST or "\n" in value:
    return False
  # An address may go on after the path.
  return any(map(_has_suffix, (value, _QUERY.split(value, 1)[0])))


def _has_suffix(path: str) -> bool:
  stem, _, suffix = path.rpartition(".")
  return suffix.lower() in _SUFFIXES and stem[-1:] not in ("", " ", ".")


def _stem(path: str) -> str:
  name = path.replace("\\", "/").rpartition("/")[2]
  return name.rpartition(".")[0] or name


def check_packed(
  row: Record, held: Json | bytes, kind: str, *, whole: bool
) -> None:
  """Raise unless a stored record has what a row of a kind has.

  Args:
    row: its fields.
    held: its images' files, or, unless it is the `whole` row, their number.

  Raises:
    KeyError: a field that is missing.
    TypeError: one of another type.
  """
  for field in ("id", *_FIELDS[kind]):
    # Of text, or a list of turns, which coders look at.
    if not isinstance(row[field], _TYPES.get(field, str)):
      raise TypeError(f"{field} of type {type(row[field]).__name__}")
  if "image" in row:
    raise TypeError("an image among the fields")
  packed = held if isinstance(held, list) else [held]
  if whole and not all(isinstance(one, bytes) for one in packed):
    raise TypeError("images that are no bytes")
  if not whole and not (type(held) is int and 0 <= held <= _MOST_IMAGES):
    raise TypeError("no number of images")


def listed(image: Shown) -> list[Any]:
  """Return the images of a row (None, one, or a list of several) as a list."""
  if image is None:
    return []
  return list(image) if isinstance(image, list) else [image]


def placeholders(count: int) -> bool | list[bool] | None:
  """Return placeholders for `count` undecoded images."""
  return [True] * count if count > 1 else count == 1 or None


def given_id(record: Record, default: str) -> str:
  """Return the id of a record as text, `default` if it has none."""
  found = record.get("id")
  if found is None:
    return default
  if isinstance(found, bool) or not isinstance(found, (str, int)):
    raise InputError(f"id: must be text or a number, not {found!r}")
  return _utf8(str(found), "id")


@contextlib.contextmanager
def located(name: str) -> Iterator[None]:
  """Prefix errors with the row's name."""
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
