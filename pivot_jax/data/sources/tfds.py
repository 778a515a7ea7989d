"""TensorFlow Datasets' ImageNet and ADE20K as rows, without TensorFlow.

tensorflow_datasets 4.9.10 imports and reads sets in the format `array_record`
in an environment that has no TensorFlow; to prepare one in that format it does
need TensorFlow, once and anywhere:

    tfds build imagenet2012 --file_format=array_record

Images are taken undecoded (`tfds.decode.SkipDecoding`), so that their pixels
are those of every other source.
"""

import os
import pathlib
from typing import Any

import numpy as np

from pivot_jax import files, texts
from pivot_jax.data import images, rows
from pivot_jax.data.sources import array_record, records
from pivot_jax.errors import InputError

_FOLDER = "~/tensorflow_datasets"  # Where tfds itself looks.
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Byte 25 of a PNG: how its samples make colours.
_GREY, _RGB = 0, 2

_BYTES = {"image", "annotation", "file_name"}
_NEEDED = {
  "classify": {"image", "label"},
  "segment": {"image", "annotation"},
}


class Tfds:
  """Rows of a prepared TensorFlow Datasets split, read through its data source.

  The features tell the kind:
    classify: `image` and `label`, as in `imagenet2012`; the id is `file_name`.
    segment: `image` and `annotation`, as in `scene_parse150`.

  The annotations of `scene_parse150` are not the 150 classes of the scene
  parsing benchmark (paper.md 5.2): its builder takes `annotations_instance`,
  RGB images whose red is one of 100 categories of things and whose green counts
  the instances. They are refused unless `instances` says that these categories
  are wanted. A set of the same name with grey 8-bit annotations has labels as
  they are.

  Attributes:
    path: the folder of the version that is read.
    kind: "classify" or "segment".
  """

  def __init__(
    self,
    name: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    image_spec: images.ImageSpec = images.AS_THEY_ARE,
    *,
    instances: bool = False,
  ):
    """Open a split; no record is read.

    Args:
      name: as tfds has it; `imagenet2012:5.1.0` names a version, otherwise it
        is the latest there is.
      split: as tfds has it, `train[:10%]` included.
      data_dir: the folder of the sets, by default $TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      instances: takes the red of RGB annotations for the labels.

    Raises:
      InputError: tensorflow_datasets is not installed, the set is not there,
        not in the format array_record, in part, or of other features.
    """
    self._named = (name, split, data_dir, image_spec)
    self._split, self._instances = split, instances
    tfds = _package()
    self.path = _find(name, data_dir)
    self._pictures = images.Pictures(self.path, image_spec)
    builder = _builder(tfds, self.path)
    found = builder.info.features
    named = isinstance(found, tfds.features.FeaturesDict)
    features = set(found) if named else set()
    kinds = (kind for kind, needed in _NEEDED.items() if needed <= features)
    self.kind = next(kinds, "")
    if not self.kind:
      raise InputError(
        f"{self.path}: has the features {', '.join(sorted(features))}; needed"
        " are image and label, or image and annotation"
      )
    self._records = _opened(tfds, builder, split, self.kind)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> rows.Row:
    record = self._record(index)
    with records.located(self.name(index)):
      if self.kind == "classify":
        image = self._pictures.decode(record["image"], name="image")
        return self._row(record, index, image)
      labels = self._labels(record["annotation"])
      whole = self._pictures.decode_native(record["image"], name="image")
      image, labels = self._pictures.fit_labeled(
        whole, labels, name="annotation"
      )
      return self._row(record, index, image) | {"labels": labels}

  def text(self, index: int) -> rows.Row:
    """Return the row with True in the place of its pixels."""
    record = self._record(index)
    with records.located(self.name(index)):
      return self._row(record, index, True)

  def encoded(self, index: int) -> tuple[bytes, ...]:
    """Return the bytes of the row's image, and of its annotation."""
    record = self._record(index)
    if self.kind == "classify":
      return (record["image"],)
    return record["image"], record["annotation"]

  def check_row(self, index: int) -> None:
    """Raise for a wrong field; its images are inside."""
    self.text(index)

  def stamp(self) -> str:
    """Return "": the package tells no contents."""
    return ""

  def name(self, index: int) -> str:
    """Return FOLDER/SPLIT:ROW, counted from 0."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    return f"{self.path}/{self._split}:{index}"

  def __reduce__(self):
    return _reopened, (self._named, self._instances)

  def _record(self, index: int) -> dict[str, Any]:
    with records.located(self.name(index)):
      try:
        record = self._records[index]
      except (RuntimeError, KeyError, ValueError, TypeError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"cannot be read: {why}") from None
      # What is left of a damaged record lacks a field, and tells no one.
      for name in sorted(_BYTES & (_NEEDED[self.kind] | {"file_name"})):
        if not isinstance(record.get(name, b""), bytes):
          raise InputError(f"{name}: is empty; the file is damaged")
      return record

  def _row(self, record: dict[str, Any], index: int, image: Any) -> rows.Row:
    file = record.get("file_name")
    name = f"{self._split}-{index}"
    if file is not None:
      # A name that is no UTF-8 stays one of a row.
      name = file.decode("utf-8", "backslashreplace")
    row: rows.Row = {"id": name, "image": image}
    if self.kind == "segment":
      return row | {"labels": True}
    if record["label"] < 0:
      raise InputError("label: is -1; this split has no labels")
    return row | {"label": int(record["label"])}

  def _labels(self, data: bytes) -> np.ndarray:
    """Return int32 [H, W] of an annotation."""
    is_png = data.startswith(_SIGNATURE) and len(data) > 25
    depth, colour = (data[24], data[25]) if is_png else (0, 0)
    if depth != 8 or colour not in (_GREY, _RGB):
      raise InputError("annotation: must be a grey or RGB PNG of 8 bits")
    if colour == _RGB and not self._instances:
      raise InputError(
        "annotation: RGB, so its red is one of 100 categories of things, not of"
        " the 150 classes; take an image folder of ADEChallengeData2016, or"
        " instances=True for these"
      )
    if colour == _GREY and self._instances:
      raise InputError("annotation: grey, but instances=True is for RGB")
    pixels = images.decode(
      data, name="annotation", max_pixels=self._pictures.spec.max_pixels
    )
    return pixels[:, :, 0].astype(np.int32)


def _reopened(named: tuple, instances: bool) -> Tfds:
  return Tfds(*named, instances=instances)


def _package() -> Any:
  try:
    import tensorflow_datasets
  except ImportError as error:
    raise InputError(
      'TensorFlow Datasets need their package: pip install "pivot_jax[tfds]"'
    ) from error
  return tensorflow_datasets


def _builder(tfds: Any, path: pathlib.Path) -> Any:
  # The package reports a file that is no JSON in its own ways, and waits at a
  # pipe.
  for name in ("dataset_info.json", "features.json"):
    if os.path.lexists(path / name):
      files.read_object(path / name)
  try:
    return tfds.builder_from_directory(path)
  # Of fields of other types the package and protobuf say so in any way.
  except Exception as error:  # noqa: BLE001
    why = texts.shown(" ".join(str(error).split()), longest=300)
    raise InputError(f"{path}: cannot be opened: {why}") from None


def _opened(tfds: Any, builder: Any, split: str, kind: str) -> Any:
  """Return a split's data source, which gives images undecoded."""
  path = builder.data_path
  skipped = _NEEDED[kind] - {"label"}
  decoders = {name: tfds.decode.SkipDecoding() for name in skipped}
  try:
    found = builder.as_data_source(split, decoders=decoders)
    files = builder.info.splits[split].filepaths
  except NotImplementedError:
    raise InputError(
      f"{path}: is in the format {builder.info.file_format.value}, which cannot"
      " be read at random; prepare it by tfds build --file_format=array_record"
    ) from None
  except Exception as error:  # noqa: BLE001
    why = texts.shown(" ".join(str(error).split()), longest=300)
    raise InputError(f"{path}: split {split!r}: {why}") from None
  missing = [str(file) for file in files if not file.exists()]
  if missing:
    raise InputError(
      f"{path}: {len(missing)} shards of {split} are missing, the first is"
      f" {pathlib.Path(missing[0]).name}"
    )
  # A part, as train[:10%], is of a split that has shards.
  known = builder.info.splits.get(split.partition("[")[0])
  if known is not None:
    _check_counts(known)
  return found


def _check_counts(split: Any) -> None:
  """Raise for a shard that has not as many records as dataset_info.json says."""
  for file, said in zip(split.filepaths, split.shard_lengths, strict=True):
    held = array_record.count(pathlib.Path(file))
    if held != said:
      raise InputError(
        f"{file}: holds {held} records, dataset_info.json says {said}: the set"
        " is damaged; prepare it again"
      )


def _find(name: str, data_dir: str | os.PathLike | None) -> pathlib.Path:
  """Return the folder of a set's version."""
  sets = data_dir or os.environ.get("TFDS_DATA_DIR") or _FOLDER
  name, _, version = name.partition(":")
  folder = pathlib.Path(sets).expanduser() / name
  found = sorted(
    (path.parent for path in folder.glob("*/dataset_info.json")),
    key=lambda path: [int(p) for p in path.name.split(".") if p.isdecimal()],
  )
  if version:
    found = [path for path in found if path.name == version]
  if not found:
    raise InputError(
      f"{folder / version}: no prepared set (dataset_info.json) there; make it"
      f" by tfds build {name} --file_format=array_record, or give data_dir"
    )
  return found[-1]
