"""Files and folders as random-access sequences of rows; the strict reader.

A source has `len`, `[i]` and `name(i)`, the place of a row for messages. Its
rows are plain dicts whose image is uint8 [H, W, 3], a list of several, or None
for a text-only row, at the file's own size unless the source was given an
`image_size`; several are padded to squares first, as in the paper's code
(paper.md 1.3). What is wrong raises an `InputError` that names file, row and
field; nothing is skipped. It knows no template: what an answer may contain is
`chat.py`'s.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from pivot_jax import texts
from pivot_jax.data import images
from pivot_jax.data.sources import json_index, records
from pivot_jax.errors import InputError

Row = dict[str, Any]


@runtime_checkable
class Source(Protocol):
  """What every data set of texts offers; `kind` says what its rows hold."""

  kind: str

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Row: ...

  def text(self, index: int) -> Row:
    """Return the row without pixels; `image` says only how many there are."""
    ...

  def name(self, index: int) -> str: ...

  def check_row(self, index: int) -> None:
    """Raise for a wrong field, or an image that is not in place."""
    ...

  def stamp(self) -> str:
    """Return what tells its texts and their order; "" if that is not known."""
    ...

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the bytes of the row's image files, undecoded."""
    ...


def check(source: Source, *, max_bad: float = 0.0) -> list[tuple[int, str]]:
  """Read every row, images included; returns the bad ones and why.

  Args:
    max_bad: the share of rows that may be bad, as 0.001 for one in a thousand.

  Raises:
    InputError: no rows, or more bad ones than allowed, the first five named.
  """
  if not len(source):
    raise InputError("a data source has no rows")
  bad = []
  for index in range(len(source)):
    try:
      source[index]
    except InputError as error:
      bad.append((index, str(error)))
  if len(bad) > max_bad * len(source):
    first = "; ".join(message for _, message in bad[:5])
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise InputError(
      f"{len(bad)} of {len(source)} rows are bad, allowed is a share of"
      f" {max_bad:g}: {first}{more}"
    )
  return bad


class _Records:
  """Records of a JSON list (`.json`) or of JSON lines (`.jsonl`).

  Neither is held in memory. Ids that occur again become `id#2`, `id#3`; a row
  without one is called after its file and index. `image_root` is the file's own
  folder unless given. Lines that are no records are an error unless `flawed`;
  then reading one of them is.
  """

  kind: str
  unique_ids = False  # Whether a second use of an id is an error.

  def __init__(
    self,
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    *,
    image_size: int | None = None,
    resample: str = "bicubic",
    max_pixels: int = images.MAX_PIXELS,
    decoder: str = "pil",
    flawed: bool = False,
  ):
    self.path = pathlib.Path(path)
    self._pictures = images.Pictures(
      self.path.parent if image_root is None else image_root,
      image_size=image_size,
      resample=resample,
      max_pixels=max_pixels,
      decoder=decoder,
    )
    self._file = json_index.File(self.path)
    if self._file.flaws and not flawed:
      index, why = self._file.flaws[0]
      raise InputError(f"{self.name(index)}: {why}")
    again = self._file.again()
    if self.unique_ids and len(again) and not flawed:
      index = int(again[0])
      given = self._file.given_id(index)
      raise InputError(
        f"{self.name(index)}: id: {given!r} is also the id of"
        f" {self.name(self._first(given))}; an evaluation needs each id once"
      )

  def __len__(self) -> int:
    return len(self._file)

  def __getitem__(self, index: int) -> Row:
    row = self.text(index)
    with records.located(self.name(index)):
      row["image"] = self._pictures.read_row(row["image"])
    return row

  def text(self, index: int) -> Row:
    """Return the row with its images' paths in place of their pixels."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    with records.located(self.name(index)):
      record = self._file.record(index)
      image = records.image_paths(record)
      row: Row = {"id": self._file.id(record, index), "image": image}
      return row | self._fields(record)

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the bytes of the row's image files."""
    paths = records.listed(self.text(index)["image"])
    with records.located(self.name(index)):
      return tuple(self._pictures.read_bytes(path) for path in paths)

  def check_row(self, index: int) -> None:
    """Raise for a wrong field, or an image that is not in place."""
    for path in records.listed(self.text(index)["image"]):
      with records.located(self.name(index)):
        images.resolve(self._pictures.root, path)

  def stamp(self) -> str:
    """Return what tells the file's content."""
    return json_index.stamp(self.path)

  def name(self, index: int) -> str:
    """Return `file:line` of a line, `file#index` of a list's record."""
    return self._file.name(index)

  def _fields(self, record: Mapping[str, Any]) -> Row:
    raise NotImplementedError

  def _first(self, given: str) -> int:
    return next(i for i in range(len(self)) if self._file.given_id(i) == given)


class LlavaJson(_Records):
  """Conversation rows: LLaVA records with `conversations` (paper.md 4.1)."""

  kind = "conversation"

  def _fields(self, record):
    return {"conversations": records.turns(record)}


class JsonLines(_Records):
  """Preference rows: MMPR's question, chosen, rejected (paper.md 4.5).

  The question may be called `prompt`, as in the paper's own files; two
  different texts in both are an error.
  """

  kind = "preference"

  def _fields(self, record):
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

  def _fields(self, record):
    if "conversations" in record:
      question, answer = records.question_and_answer(records.turns(record))
    else:
      question = records.question(record)
      answer = records.text(record, "answer")
    row = {"question": question, "answer": answer}
    for field in ("category", "kind"):
      given = field in record
      row[field] = records.text(record, field) if given else self.path.stem
    return row


class ImageFolder:
  """Classify rows from FOLDER/{train,val}/CLASS/*.

  Labels count `classes`, train's folders by name; val must have the same, and
  there are two at least. Names are compared as texts, whatever their bytes.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    split: str,
    *,
    image_size: int | None = None,
    resample: str = "bicubic",
    max_pixels: int = images.MAX_PIXELS,
    decoder: str = "pil",
  ):
    self.root = pathlib.Path(folder) / split
    train = pathlib.Path(folder) / "train"
    self.classes = tuple(_subfolders(train))
    if len(self.classes) < 2:
      raise InputError(
        f"{train}: there is one class, {self.classes[0]!r}, and nothing to tell"
        f" it from; a folder of images for each class is needed, {train}/CLASS/*"
      )
    found = _subfolders(self.root)
    if tuple(found) != self.classes:
      differ = sorted(set(found) ^ set(self.classes))
      raise InputError(f"{self.root}: classes differ from train's: {differ}")
    self._pictures = images.Pictures(
      self.root,
      image_size=image_size,
      resample=resample,
      max_pixels=max_pixels,
      decoder=decoder,
    )
    self._files = [
      (f"{name}/{file}", label)
      for label, name in enumerate(found.values())
      for file in _image_files(self.root / name)
    ]

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Row:
    if not 0 <= index < len(self):
      raise IndexError(index)
    relative, label = self._files[index]
    with records.located(self.name(index)):
      image = self._pictures.read(relative)
    return {"id": relative, "image": image, "label": label}

  def text(self, index: int) -> Row:
    """Return the row with its image's path in place of the pixels."""
    relative, label = self._files[index]
    return {"id": relative, "image": relative, "label": label}

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the bytes of the row's image file."""
    with records.located(self.name(index)):
      return (self._pictures.read_bytes(self._files[index][0]),)

  def name(self, index: int) -> str:
    return f"{self.root}#{index}"


class SegmentFolder:
  """Segment rows from FOLDER/{train,val}/{images,labels}, matched by stem.

  Labels are the indices of grey or palette PNG files, as they are. Stems are
  compared as texts, whatever their bytes.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    split: str,
    *,
    image_size: int | None = None,
    resample: str = "bicubic",
    max_pixels: int = images.MAX_PIXELS,
    decoder: str = "pil",
  ):
    self.root = pathlib.Path(folder) / split
    self._pictures = images.Pictures(
      self.root,
      image_size=image_size,
      resample=resample,
      max_pixels=max_pixels,
      decoder=decoder,
    )
    pictures = _by_stem(self.root / "images")
    labels = _by_stem(self.root / "labels")
    lone = sorted(set(pictures) ^ set(labels))
    if lone:
      raise InputError(
        f"{self.root}: {len(lone)} names are not in both images and labels:"
        f" {', '.join(lone[:5])}"
      )
    self._files = [
      (stem, f"images/{pictures[stem]}", f"labels/{labels[stem]}")
      for stem in sorted(pictures)
    ]

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Row:
    if not 0 <= index < len(self):
      raise IndexError(index)
    stem, picture, label = self._files[index]
    with records.located(self.name(index)):
      image, labels = self._read(picture, label)
    return {
      "id": stem,
      "image": self._pictures.fit(image),
      "labels": self._pictures.fit_labels(labels),
    }

  def text(self, index: int) -> Row:
    """Return the row with its files' paths in place of the pixels."""
    stem, picture, label = self._files[index]
    return {"id": stem, "image": picture, "labels": label}

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the bytes of the row's picture and of its label map."""
    with records.located(self.name(index)):
      return tuple(map(self._pictures.read_bytes, self._files[index][1:]))

  def name(self, index: int) -> str:
    return f"{self.root}#{index}"

  def _read(self, picture: str, label: str):
    image = self._pictures.read_native(picture)
    path = images.resolve(self.root, label)
    labels = images.read_labels(path, max_pixels=self._pictures.max_pixels)
    if labels.shape != image.shape[:2]:
      raise InputError(
        f"{path}: the label map is {labels.shape[1]}x{labels.shape[0]} pixels,"
        f" its image {image.shape[1]}x{image.shape[0]}"
      )
    return image, labels


def _subfolders(folder: pathlib.Path) -> dict[str, str]:
  """Return folders by their names in canonical form, sorted by these."""
  names = [path.name for path in _visible(folder) if path.is_dir()]
  if not names:
    raise InputError(f"{folder}: no folder of images a class in it")
  return _by_text(folder, {name: name for name in names})


def _image_files(folder: pathlib.Path) -> list[str]:
  """Return the sorted names of the images in a folder, which must be all."""
  names = sorted(p.name for p in _visible(folder))
  other = [n for n in names if not n.lower().endswith(images.SUFFIXES)]
  if other:
    raise InputError(f"{folder}: {other[0]} is not an image; remove it")
  if not names:
    raise InputError(f"{folder}: no images in it")
  return names


def _by_stem(folder: pathlib.Path) -> dict[str, str]:
  """Return image files by their stems in canonical form, sorted by these."""
  names = _image_files(folder)
  return _by_text(folder, {name: pathlib.Path(name).stem for name in names})


def _by_text(folder: pathlib.Path, called: Mapping[str, str]) -> dict[str, str]:
  """Return {canonical form of what an entry is called: its name on disk}."""
  found: dict[str, str] = {}
  for name in sorted(called):
    other = found.setdefault(texts.canonical(called[name]), name)
    if other != name:
      raise InputError(f"{folder}: {other} and {name} have one name; keep one")
  return dict(sorted(found.items()))


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
  if not folder.is_dir():
    raise InputError(f"{folder}: no such folder")
  return [path for path in folder.iterdir() if path.name[0] != "."]
