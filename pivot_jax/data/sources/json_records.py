"""JSON files of records as sources: conversations, pairs, questions.

Images are read at their file's own size unless the source has an `ImageSpec`
with a size; several of a row are padded to squares first, as in the paper's
code (paper.md 1.3). The texts of an answer are `chat.py`'s business.
"""

import os
import pathlib

from pivot_jax.data import images, rows
from pivot_jax.data.sources import json_index, records
from pivot_jax.errors import InputError


class _Records:
  """Records of a JSON list (`.json`) or of JSON lines (`.jsonl`).

  Neither is held in memory. Ids that occur again become `id#2`, `id#3`; a row
  without one is called after its file and index. `image_root` is the file's own
  folder if None. Lines that are no records are an error unless `flawed`; then
  reading one of them is.
  """

  kind: str
  unique_ids = False  # Whether a second use of an id is an error.

  def __init__(
    self,
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    image_spec: images.ImageSpec = images.AS_THEY_ARE,
    *,
    flawed: bool = False,
  ):
    self.path = pathlib.Path(path)
    self._pictures = images.Pictures(
      self.path.parent if image_root is None else image_root, image_spec
    )
    self._file = json_index.File(self.path)
    if self._file.flaws and not flawed:
      index, why = self._file.flaws[0]
      raise InputError(f"{self.name(index)}: {why}")
    again = self._file.again()
    if self.unique_ids and len(again) and not flawed:
      index = int(again[0])
      twice = self._file.given_id(index)
      raise InputError(
        f"{self.name(index)}: id: {twice!r} is also the id of"
        f" {self.name(self._first(twice))}; an evaluation needs each id once"
      )

  def __len__(self) -> int:
    return len(self._file)

  def __getitem__(self, index: int) -> rows.Row:
    row = self.text(index)
    with records.located(self.name(index)):
      row["image"] = self._pictures.read_row(row["image"])
    return row

  def text(self, index: int) -> rows.Row:
    """Return the row with its images' paths in place of their pixels."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    with records.located(self.name(index)):
      record = self._file.record(index)
      image = records.image_paths(record)
      row: rows.Row = {"id": self._file.id(record, index), "image": image}
      return row | self._fields(record)

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the bytes of the row's image files."""
    paths = records.listed(self.text(index)["image"])
    with records.located(self.name(index)):
      return self._pictures.read_files(paths)

  def check_row(self, index: int) -> None:
    """Raise for a wrong field, or an image that is not in place."""
    for path in records.listed(self.text(index)["image"]):
      with records.located(self.name(index)):
        images.resolve(self._pictures.root, path)

  def stamp(self) -> str:
    """Return the size, time and CRC of the file."""
    return json_index.stamp(self.path)

  def name(self, index: int) -> str:
    """Return `file:line` of a line, `file#index` of a list's record."""
    return self._file.name(index)

  def _fields(self, record: records.Record) -> rows.Row:
    raise NotImplementedError

  def _first(self, name: str) -> int:
    return next(i for i in range(len(self)) if self._file.given_id(i) == name)


class LlavaJson(_Records):
  """Conversation rows: LLaVA records with `conversations` (paper.md 4.1)."""

  kind = "conversation"

  def _fields(self, record: records.Record) -> rows.Row:
    return {"conversations": records.turns(record)}


class JsonLines(_Records):
  """Preference rows: MMPR's question, chosen, rejected (paper.md 4.5).

  The question may be called `prompt`, as in the paper's own files; two
  different texts in both are an error.
  """

  kind = "preference"

  def _fields(self, record: records.Record) -> rows.Row:
    return {
      "question": records.question(record),
      "chosen": records.text(record, "chosen"),
      "rejected": records.text(record, "rejected"),
    }


class EvalJson(_Records):
  """Evaluation rows: `question` and `answer`, or a LLaVA record of two turns.

  `category` and `kind` are the file's stem where a record has none.
  """

  kind = "eval"
  unique_ids = True

  def _fields(self, record: records.Record) -> rows.Row:
    if "conversations" in record:
      question, answer = records.question_and_answer(records.turns(record))
    else:
      question = records.question(record)
      answer = records.text(record, "answer")
    row = {"question": question, "answer": answer}
    for field in ("category", "kind"):
      there = field in record
      row[field] = records.text(record, field) if there else self.path.stem
    return row
