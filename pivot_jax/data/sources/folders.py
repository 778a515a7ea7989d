"""Folders of images: one folder a class, or pictures beside label maps.

`ImageFolder` has classify rows, `SegmentFolder` segment rows. `label_gap` looks
for numbers of label maps that stand apart, as 255 beside few classes: such a
number usually marks pixels of no class (borders in VOC), and counts as a class
unless it is ignored. Only numbers are looked at, not their meaning.
"""

import os
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from pivot_jax import texts
from pivot_jax.data import images, rows
from pivot_jax.data.sources import records
from pivot_jax.errors import InputError

# Maps that are read before a run; the probe itself looks at all.
LOOKED_AT = 32
# Numbers of pixels of no class in maps of 8 and of 16 bits.
_MARKS = (255, 65535)


class _Folder:
  """Rows whose fields are files below a root, one or two of them."""

  kind: str

  def __init__(
    self,
    root: pathlib.Path,
    image_spec: images.ImageSpec,
    files: list[tuple[str, ...]],
  ):
    self.root = root
    self._pictures = images.Pictures(root, image_spec)
    self._files = files

  def __len__(self) -> int:
    return len(self._files)

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the bytes of the row's image, then of its label map."""
    with records.located(self.name(index)):
      return tuple(map(self._pictures.read_bytes, self._paths(index)))

  def check_row(self, index: int) -> None:
    """Raise for a file that is not in place."""
    with records.located(self.name(index)):
      for path in self._paths(index):
        images.resolve(self.root, path)

  def stamp(self) -> str:
    """Return "": nothing tells the contents of so many files."""
    return ""

  def name(self, index: int) -> str:
    """Return ROOT#INDEX."""
    return f"{self.root}#{index}"

  def _paths(self, index: int) -> tuple[str, ...]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    return self._files[index]


class ImageFolder(_Folder):
  """Classify rows from PATH/{train,val}/CLASS/*.

  Labels count `classes`, train's folders by name; val must have the same, and
  there are two at least. Names are compared as texts, whatever their bytes.
  """

  kind = "classify"

  def __init__(
    self,
    path: str | os.PathLike,
    split: str,
    image_spec: images.ImageSpec = images.AS_THEY_ARE,
  ):
    root = pathlib.Path(path) / split
    train = pathlib.Path(path) / "train"
    self.classes = tuple(_subfolders(train))
    if len(self.classes) < 2:
      only = "".join(self.classes)
      raise InputError(
        f"{train}: there is one class, {only!r}, and nothing to tell"
        f" it from; a folder of images for each class is needed, {train}/CLASS/*"
      )
    found = _subfolders(root)
    if tuple(found) != self.classes:
      differ = sorted(set(found) ^ set(self.classes))
      raise InputError(f"{root}: classes differ from train's: {differ}")
    files, self._labels = [], []
    for label, name in enumerate(found.values()):
      inside = [(f"{name}/{file}",) for file in _image_files(root / name)]
      files += inside
      self._labels += [label] * len(inside)
    super().__init__(root, image_spec, files)

  def __getitem__(self, index: int) -> rows.Row:
    row = self.text(index)
    with records.located(self.name(index)):
      return row | {"image": self._pictures.read(row["image"])}

  def text(self, index: int) -> rows.Row:
    """Return the row with its image's path in place of the pixels."""
    (path,) = self._paths(index)
    return {"id": path, "image": path, "label": self._labels[index]}


class SegmentFolder(_Folder):
  """Segment rows from PATH/{train,val}/{images,labels}, matched by stem.

  Labels are the indices of grey or palette PNG files, as they are. Stems are
  compared as texts, whatever their bytes.
  """

  kind = "segment"

  def __init__(
    self,
    path: str | os.PathLike,
    split: str,
    image_spec: images.ImageSpec = images.AS_THEY_ARE,
  ):
    root = pathlib.Path(path) / split
    pictures = _by_stem(root / "images")
    labels = _by_stem(root / "labels")
    lone = sorted(set(pictures) ^ set(labels))
    if lone:
      raise InputError(
        f"{root}: {len(lone)} names are not in both images and labels:"
        f" {', '.join(lone[:5])}"
      )
    self._stems = sorted(pictures)
    super().__init__(
      root,
      image_spec,
      [(f"images/{pictures[s]}", f"labels/{labels[s]}") for s in self._stems],
    )

  def __getitem__(self, index: int) -> rows.Row:
    row = self.text(index)
    with records.located(self.name(index)):
      image, labels = self._read(row["image"], row["labels"])
    return row | {"image": image, "labels": labels}

  def text(self, index: int) -> rows.Row:
    """Return the row with its files' paths in place of the pixels."""
    picture, labels = self._paths(index)
    return {"id": self._stems[index], "image": picture, "labels": labels}

  def _read(self, picture: str, labels: str) -> tuple[np.ndarray, np.ndarray]:
    image = self._pictures.read_native(picture)
    path = images.resolve(self.root, labels)
    most = self._pictures.spec.max_pixels
    read = images.read_labels(path, max_pixels=most)
    return self._pictures.fit_labeled(image, read, name=str(path))


def label_gap(labels: Iterable[int], ignore: int | str) -> str:
  """Describe what is odd about the labels of some maps, "" if nothing is.

  Odd is a label 255 or 65535 without the one before it, and a gap of more
  than ten numbers that is wider than the labels below it are many. `ignore` is
  a label, or -1 or "none".
  """
  found = sorted({*map(int, labels)} - {ignore})
  for count, (low, high) in enumerate(zip(found, found[1:]), 1):
    missing = high - low - 1
    if missing > max(10, count) or (missing and high in _MARKS):
      above = found[count:]
      said = f"labels {_span(found[:count])} and {_span(above)}"
      if len(above) > 1:
        return f"{said}: number the classes from 0 without a gap"
      return (
        f"{said}: is {high} to be ignored? --config.files.segment_ignore={high}"
        "; if it is a class, number the classes from 0 without a gap"
      )
  return ""


def sampled_label_gap(source: rows.Source, ignore: int | str) -> str:
  """Return `label_gap` of at most `LOOKED_AT` maps of a source, and how many."""
  places = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int))
  found: set[int] = set()
  for index in places.tolist():
    found |= {*np.unique(source[index]["labels"]).tolist()}
  odd = label_gap(found, ignore)
  return odd and f"in {len(places)} of {len(source)} label maps: {odd}"


def _span(labels: list[int]) -> str:
  """Return the lowest and the highest label, or the one that there is."""
  if len(labels) == 1:
    return str(labels[0])
  return f"{labels[0]} to {labels[-1]}"


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
