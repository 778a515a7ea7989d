"""Makes small copies of TensorFlow Datasets' sets, in format array_record.

Their own package writes them; see `published.py` for the rest.
"""

import io
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from tests.data import published_parts as parts


def make_imagenet2012(
  folder, rows: int = 7, seed: int = 0, *, label: int | None = None
) -> parts.Made:
  """TensorFlow Datasets' imagenet2012, format array_record.

  `path` is data_dir; the rows are those of train, and validation has as many.
  Labels are random unless given; the published test split has -1.
  """
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(encoding_format="jpeg"),
      "label": tfds.features.ClassLabel(num_classes=1000),
      "file_name": tfds.features.Text(),
    }
  )
  rng = np.random.default_rng(seed)
  splits, made, files = {}, [], []
  for split in ("validation", "train"):
    files = [[parts.picture(rng)] for _ in range(rows)]
    made = [
      {
        "id": f"n{i:08d}_{i}.JPEG",
        "label": int(rng.integers(1000)) if label is None else label,
      }
      for i in range(rows)
    ]
    splits[split] = [
      {
        "image": io.BytesIO(one[0]),
        "label": row["label"],
        "file_name": row["id"],
      }
      for one, row in zip(files, made)
    ]
  path = pathlib.Path(folder)
  _write_tfds(path, "imagenet2012", "5.1.0", features, splits)
  return parts.Made(path, path, made, files)


def make_scene_parse150(
  folder, rows: int = 5, seed: int = 0, *, grey: bool = False
) -> parts.Made:
  """TensorFlow Datasets' scene_parse150, format array_record.

  Annotations are RGB as published (red the category, green the instance), or
  grey if asked for. `path` is data_dir; the rows are those of train, each with
  its `labels`, int32 [H, W].
  """
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(encoding_format="jpeg"),
      "annotation": tfds.features.Image(encoding_format="png"),
    }
  )
  rng = np.random.default_rng(seed)
  splits, made, files = {}, [], []
  for split in ("test", "train"):
    files, made = [], []
    for index in range(rows):
      pixels = rng.integers(0, 256, (9 + index, 12, 3), np.uint8)
      masks = rng.integers(0, 101, pixels.shape, np.uint8)
      annotation = parts.encode(masks[:, :, 0] if grey else masks, "PNG")
      files.append([parts.encode(pixels, "JPEG"), annotation])
      labels = masks[:, :, 0].astype(np.int32)
      made.append({"id": f"train-{index}", "labels": labels})
    splits[split] = [
      {"image": io.BytesIO(one[0]), "annotation": io.BytesIO(one[1])}
      for one in files
    ]
  path = pathlib.Path(folder)
  _write_tfds(path, "scene_parse150", "1.0.0", features, splits)
  return parts.Made(path, path, made, files)


def _write_tfds(data_dir, name, version, features, splits, per_shard=3) -> None:
  """Writes what `tfds build --file_format=array_record` leaves behind."""
  folder = data_dir / name / version
  folder.mkdir(parents=True)
  core = tfds.core
  info = core.DatasetInfo(
    builder=core.DatasetIdentity(
      name=name,
      version=core.Version(version),
      data_dir=str(folder),
      module_name=f"tensorflow_datasets.datasets.{name}.{name}_dataset_builder",
    ),
    features=features,
  )
  info.set_file_format("array_record")
  told = []
  for split, rows in splits.items():
    template = core.ShardedFileTemplate(
      data_dir=folder,
      dataset_name=name,
      split=split,
      filetype_suffix="array_record",
    )
    parted = [rows[k : k + per_shard] for k in range(0, len(rows), per_shard)]
    size = 0
    for number, part in enumerate(parted):
      file = template.sharded_filepath(
        shard_index=number, num_shards=len(parted)
      )
      writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
      for row in part:
        record = features.serialize_example(features.encode_example(row))
        size += len(record)
        writer.write(record)
      writer.close()
    told.append(
      core.SplitInfo(
        name=split,
        shard_lengths=[len(part) for part in parted],
        num_bytes=size,
        filename_template=template,
      )
    )
  info.set_splits(core.SplitDict(told))
  info.write_to_directory(folder)
