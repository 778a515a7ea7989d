"""Hugging Face's parquet files as rows, their images inside.

`Parquet` reads at random, and for that a row group (100 rows or more) at a
time: to train in random order, `python -m pivot_jax.data convert` them first.
Which columns it knows, and what it makes of them, is in its docstring.
"""

import os
import pathlib
import re
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from pivot_jax import texts
from pivot_jax.data import images
from pivot_jax.data.sources import (
  json_index,
  parquet_files,
  records,
)
from pivot_jax.errors import InputError

# The columns that may hold the id; the first that is there counts.
IDS = ("question_id", "questionId", "id", "index")
_NUMBERED = re.compile(r"image_(\d+)")

Row = dict[str, Any]


class Parquet:
  """Rows of one .parquet file, or of a folder of shards in order of name.

  The columns tell the kind:
    conversation: `conversations`, a list of struct<from, value> or struct<role,
      content>, as lmms-lab publishes LLaVA-OneVision-Data and LLaVA-NeXT-Data.
    preference: `chosen`, `rejected`, and `question` or `prompt`; a row may have
      both if they are equal.
    eval: `question` or `prompt`, and `answer` or `answers`, as lmms-lab
      publishes MME, MMBench, ScienceQA, textvqa, DocVQA, SEED-Bench, MMMU and
      others. The answer is text. A whole number becomes text (ScienceQA's is a
      place in `choices`); of a list (textvqa, DocVQA) the answer that occurs
      most counts and of those the earliest. A list of struct<answer, ...>
      (VQAv2) counts as that of its answers. `category` and `kind` are the set's name where there
      is no such column. The row's `columns` has all columns of text, numbers,
      truth values and lists of those, as a prompt may need options and hints
      and a score all answers.
    classify: `image`, and a whole number `label`.

  Images are struct<bytes, path>, one or a list, in `image` or in `images`, or
  one each in `image_1`, `image_2` and so on (MMMU); rows without any are text
  alone, and an error if another column looks like pictures. The id is the first
  of `IDS` that is a column; used again it becomes `id#2` (MME asks twice about
  an image), and a row without one is called after its file and row. `name` is
  FILE:ROW, counted from 0 in the file.

  Attributes:
    path: of the file, the folder, or folder and pattern.
    kind: "conversation", "preference", "eval" or "classify".
  """

  def __init__(
    self,
    path: str | os.PathLike,
    image_spec: images.ImageSpec = images.AS_THEY_ARE,
  ):
    """Open the files; only their footers are read.

    Args:
      path: a file, a folder, or a folder and a pattern as the cards of data
        sets name the shards of a split: `FOLDER/train-*`.

    Raises:
      InputError: as `parquet_files.Files`, or columns that make no rows.
    """
    self.path = pathlib.Path(path)
    self._pictures = images.Pictures(self.path, image_spec)
    self._files = parquet_files.Files(self.path)
    names = self._files.schema.names
    where = self._files.paths[0]
    self.kind = _kind(names, where)
    self._images = _image_columns(self._files.schema, where)
    if self.kind == "eval" and not self._images and "imageId" in names:
      raise InputError(
        f"{where}: imageId names pictures that are in other files; join them"
        " into a column image"
      )
    self._id = next((name for name in IDS if name in names), None)
    self._answer = ""
    if self.kind == "eval":
      self._answer = _answer_column(self._files.schema, where)
    self._fields = _field_columns(self._files.schema, self.kind, self._answer)
    _check_unread(self._files.schema, self._images, where)
    self._others = _other_texts(self._files.schema, self._images, self._answer)
    columns = {*self._fields, *self._others}
    columns |= set() if self._id is None else {self._id}
    column = parquet_files.Column
    self._texts = (
      *(column(n, "answer" * (n == self._answer)) for n in sorted(columns)),
      *(column(name, "path") for name in self._images),
    )
    self._pixels = tuple(map(column, self._images))
    self._uses: np.ndarray | None = None
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Row:
    row = self.text(index)
    files = self.encoded(index)
    with records.located(self.name(index)):
      return row | {"image": self._pictures.decode_row(files)}

  def text(self, index: int) -> Row:
    """Return the row with True in the place of each image."""
    with records.located(self.name(index)):
      record = self._files.record(index, self._texts)
      count = len(_structs(record, self._images))
      if not count:
        records.check_unread({name: record[name] for name in self._others})
      row: Row = {
        "id": self._row_id(record, index),
        "image": records.placeholders(count),
      }
      return row | self._row_fields(record)

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the bytes of the row's images, as the file has them."""
    with records.located(self.name(index)):
      if not self._images:
        return ()
      record = self._files.record(index, self._pixels)
      found = _structs(record, self._images)
      for name, struct in found:
        if not struct["bytes"]:
          raise InputError(
            f"{name}: no bytes, only the path {struct.get('path')!r}; get the"
            " files that have the images inside",
            kind="missing_image",
          )
      return tuple(struct["bytes"] for _, struct in found)

  def check_row(self, index: int) -> None:
    """Raise for a wrong field; its images are inside."""
    self.text(index)

  @property
  def paths(self) -> list[pathlib.Path]:
    """The files that hold the rows."""
    return list(self._files.paths)

  def stamp(self) -> str:
    """Return a digest of the files' contents."""
    return " ".join(map(json_index.stamp, self._files.paths))

  def name(self, index: int) -> str:
    """Return FILE:ROW, counted from 0 in the file."""
    return str(self._files.place(index))

  def __reduce__(self):
    # Locks do not travel to other processes; what took a pass does.
    return _reopened, (self.path, self._pictures.spec, self._uses_of_ids())

  def _row_id(self, record: Mapping[str, Any], index: int) -> str:
    default = self._files.place(index).id
    uses = self._uses_of_ids()
    if uses is None or self._id is None:
      return default
    given = records.given_id({"id": record[self._id]}, default)
    return f"{given}#{uses[index]}" if uses[index] else given

  def _uses_of_ids(self) -> np.ndarray | None:
    """Return int32 [N], see `parquet_files.uses`; None without a column."""
    with self._lock:
      if self._uses is None and self._id is not None:
        self._uses = parquet_files.uses(self._files, self._id)
      return self._uses

  def _row_fields(self, record: Mapping[str, Any]) -> Row:
    if self.kind == "conversation":
      return {"conversations": _turns(record)}
    if self.kind == "classify":
      return {"label": _label(record["label"])}
    row = {"question": records.question(record)}
    if self.kind == "preference":
      for field in ("chosen", "rejected"):
        row[field] = records.text(record, field)
      return row
    columns = {name: record[name] for name in self._fields}
    columns[self._answer] = _plain_answers(record[self._answer])
    row["answer"] = _answer(columns, self._answer)
    for field in ("category", "kind"):
      given = record.get(field) is not None
      row[field] = records.text(record, field) if given else self._set_name()
    return row | {"columns": columns}

  def _set_name(self) -> str:
    """Return the set's name: the file's, or that of the folder of shards."""
    if self.path.is_file():
      return self.path.stem
    folder = (self.path if self.path.is_dir() else self.path.parent).resolve()
    return folder.parent.name if folder.name == "data" else folder.name


def _reopened(
  path: pathlib.Path, image_spec: images.ImageSpec, uses: np.ndarray | None
) -> Parquet:
  source = Parquet(path, image_spec)
  source._uses = uses
  return source


def _kind(names: list[str], where: pathlib.Path) -> str:
  found = set(names)
  if "conversations" in found:
    return "conversation"
  asked = bool(found.intersection(records.QUESTIONS))
  if {"chosen", "rejected"} <= found and asked:
    return "preference"
  if asked and {"answer", "answers"} & found:
    return "eval"
  if {"image", "label"} <= found:
    return "classify"
  raise InputError(
    f"{where}: the columns {', '.join(names)} make no rows: needed are"
    " conversations; or question, chosen and rejected; or question and answer;"
    " or image and label"
  )


def _image_columns(schema: Any, where: pathlib.Path) -> tuple[str, ...]:
  """Return the columns that hold images, which must have bytes."""
  numbered = [name for name in schema.names if _NUMBERED.fullmatch(name)]
  numbered.sort(key=lambda name: int(name.removeprefix("image_")))
  ways = [("image",), ("images",), tuple(numbered)]
  ways = [way for way in ways if way and way[0] in schema.names]
  if len(ways) > 1:
    raise InputError(
      f"{where}: images in {ways[0][0]} and in {ways[1][0]}; keep one",
      kind="schema",
    )
  columns = ways[0] if ways else ()
  for name in columns:
    found = schema.field(name).type
    one = found.value_type if parquet_files.is_list(found) else found
    if not _is_image(one):
      raise InputError(
        f"{where}: {name}: must be struct<bytes, path> or a list of such, not"
        f" {found}",
        kind="schema",
      )
  return columns


def _check_unread(
  schema: Any, images: tuple[str, ...], where: pathlib.Path
) -> None:
  """Raise for a column of files that looks like pictures and is not read.

  In a set with pictures, it looks so by its name.
  """
  types = parquet_files.pyarrow().types
  for field in schema:
    kind = field.type
    one = kind.value_type if parquet_files.is_list(kind) else kind
    held = types.is_binary(one) or types.is_large_binary(one) or _is_image(one)
    if field.name in images or types.is_null(one) or not held:
      continue
    if not images or records.names_picture(field.name):
      with records.located(str(where)):
        raise records.unread(field.name)


def _other_texts(
  schema: Any, images: tuple[str, ...], answer: str
) -> tuple[str, ...]:
  """Return the columns whose texts may name pictures that nothing reads."""
  read = {*images, answer, "conversations", "chosen", "rejected"}
  return tuple(
    field.name
    for field in schema
    if field.name not in read and _is_text(field.type)
  )


def _is_text(found: Any) -> bool:
  """Return whether a column has texts, lists of them, or structs with some."""
  types = parquet_files.pyarrow().types
  if parquet_files.is_list(found) or types.is_dictionary(found):
    return _is_text(found.value_type)
  if types.is_struct(found):
    # Those with bytes are pictures, or what is shown beside them.
    return not _is_image(found) and any(_is_text(one.type) for one in found)
  return types.is_string(found) or types.is_large_string(found)


def _is_image(found: Any) -> bool:
  types = parquet_files.pyarrow().types
  if types.is_null(found):
    return True
  if not types.is_struct(found):
    return False
  kept = {field.name: field.type for field in found}
  data = kept.get("bytes")
  return data is not None and (
    types.is_binary(data) or types.is_large_binary(data) or types.is_null(data)
  )


def _field_columns(schema: Any, kind: str, answer: str) -> tuple[str, ...]:
  """Return the columns whose values make the fields of a row."""
  if kind == "conversation":
    return ("conversations",)
  if kind == "classify":
    return ("label",)
  if kind == "preference":
    asked = (name for name in records.QUESTIONS if name in schema.names)
    return (*asked, "chosen", "rejected")
  return tuple(
    field.name
    for field in schema
    if field.name == answer or _is_plain(field.type)
  )


def _answer_column(schema: Any, where: pathlib.Path) -> str:
  """Return the column of answers, which can be read as those of questions."""
  for name in records.QUESTIONS:
    if name in schema.names and not _is_plain(schema.field(name).type):
      asked = schema.field(name).type
      raise InputError(f"{where}: {name}: must be text, not {asked}")
  named = [name for name in ("answer", "answers") if name in schema.names]
  for name in named:
    found = schema.field(name).type
    if _is_plain(found) or _has_answers(found):
      return name
  raise InputError(
    f"{where}: {named[0]}: must be text, a whole number, a list of text, or a"
    f" list of struct<answer>, not {schema.field(named[0]).type}"
  )


def _has_answers(found: Any) -> bool:
  """Return whether a column's values are lists of structs that have an answer."""
  types = parquet_files.pyarrow().types
  if not parquet_files.is_list(found) or not types.is_struct(found.value_type):
    return False
  return any(
    field.name == "answer" and _is_plain(field.type)
    for field in found.value_type
  )


def _is_plain(found: Any) -> bool:
  """Return whether a column holds text, numbers, truth values, or lists."""
  types = parquet_files.pyarrow().types
  if parquet_files.is_list(found) or types.is_dictionary(found):
    return _is_plain(found.value_type)
  tests = (
    types.is_string, types.is_large_string, types.is_integer,
    types.is_floating, types.is_boolean, types.is_null,
  )  # fmt: skip
  return any(test(found) for test in tests)


def _structs(
  record: Mapping[str, Any], columns: tuple[str, ...]
) -> list[tuple[str, dict[str, Any]]]:
  """Return the images of a row, each with what messages call it."""
  found = []
  for name in columns:
    value = record[name]
    if not isinstance(value, list):
      found += [] if value is None else [(name, value)]
      continue
    for index, one in enumerate(value):
      if one is None:
        raise InputError(f"{name}[{index}]: is null in a list of images")
      found.append((f"{name}[{index}]", one))
  return found


def _turns(record: Mapping[str, Any]) -> list[dict[str, str]]:
  found = record["conversations"]
  if isinstance(found, list):
    # Arrow gives every turn the keys of all, those that it lacks as null.
    found = [
      {key: value for key, value in turn.items() if value is not None}
      if isinstance(turn, dict)
      else turn
      for turn in found
    ]
  return records.turns({"conversations": found})


def _label(found: Any) -> int:
  # True and False are whole numbers to Python.
  if isinstance(found, bool) or not isinstance(found, int) or found < 0:
    raise InputError(f"label: must be a number of 0 or more, not {found!r}")
  return found


def _plain_answers(found: Any) -> Any:
  """Return answers as they are, or those of the structs that hold them."""
  if not isinstance(found, list):
    return found
  return [one["answer"] if isinstance(one, dict) else one for one in found]


def _answer(record: Mapping[str, Any], field: str) -> str:
  found = record[field]
  if found is None or found == []:
    raise InputError(f"{field}: is empty; this split has no answers to score")
  if isinstance(found, list):
    said = [records.text({field: one}, field) for one in found]
    forms = [texts.canonical(one) for one in said]
    return max(said, key=lambda one: forms.count(texts.canonical(one)))
  if isinstance(found, int) and not isinstance(found, bool):
    return str(found)
  return records.text(record, field)
