"""Makes small copies of data sets in the formats they are published in.

Folders, file names, keys, columns and types are the published ones; the texts
are random words and the images small noise. A function returns where the set is
and what its rows hold (`published_parts.Made`). Those of TensorFlow Datasets
are in `published_tfds.py`.
"""

import json
import pathlib

import numpy as np

from tests.data import published_evaluations
from tests.data import published_parts as parts


def make_llava_pretrain(folder, rows: int = 8, seed: int = 0) -> parts.Made:
  """LLaVA-Pretrain: one JSON list of captions, images in numbered folders."""
  rng = np.random.default_rng(seed)
  root = pathlib.Path(folder) / "LLaVA-Pretrain"
  records, made, files = [], [], []
  for index in range(rows):
    number = f"{index * 4051 % 10**9:09d}"
    name = f"{number[:5]}/{number}.jpg"
    files.append([parts.put(root / "images" / name, parts.picture(rng))])
    asked = parts.words(rng, 4, 8)
    value = rng.choice([f"{asked}\n<image>", f"<image>\n{asked}"]).item()
    conversation = [
      {"from": "human", "value": value},
      {"from": "gpt", "value": parts.words(rng, 5, 15)},
    ]
    records.append({"id": number, "image": name, "conversations": conversation})
    made.append({"id": number, "conversations": conversation})
  path = root / "blip_laion_cc_sbu_558k.json"
  path.write_text(json.dumps(records), encoding="utf-8")
  return parts.Made(path, root / "images", made, files)


def make_onevision(
  folder, rows: int = 12, seed: int = 0, *, name="ai2d(gpt4v)", shards: int = 2
) -> parts.Made:
  """A subset of LLaVA-OneVision-Data: parquet shards; every fifth is text."""
  rng = np.random.default_rng(seed)
  records, made, files = [], [], []
  for index in range(rows):
    with_image = index % 5 != 4
    files.append([parts.picture(rng)] if with_image else [])
    row = {
      "id": f"{name}_{index:06d}",
      "conversations": parts.turns(rng, with_image),
    }
    made.append(row)
    records.append(
      {
        "id": row["id"],
        # As published, some images have a path and some have none.
        "image": parts.struct(files[-1], f"{index}.jpg" if index % 2 else None),
        "conversations": row["conversations"],
        "data_source": name,
      }
    )
  path = pathlib.Path(folder) / "LLaVA-OneVision-Data" / name
  parts.write_shards(path, "train", records, shards, parts.CHAT_TYPES)
  return parts.Made(path, path, made, files)


def make_llava_next(
  folder, rows: int = 9, seed: int = 0, *, shards: int = 3
) -> parts.Made:
  """LLaVA-NeXT-Data: as OneVision's, in one folder `data`."""
  rng = np.random.default_rng(seed)
  records, made, files = [], [], []
  for index in range(rows):
    files.append([parts.picture(rng, "PNG" if index % 3 == 0 else "JPEG")])
    row = {
      "id": f"{index:012d}",
      "conversations": parts.turns(rng, True, pairs=3),
    }
    made.append(row)
    records.append(
      {
        "id": row["id"],
        "conversations": row["conversations"],
        "data_source": "coco/train2017",
        "image": parts.struct(files[-1], None),
      }
    )
  path = pathlib.Path(folder) / "LLaVA-NeXT-Data" / "data"
  types = {key: parts.CHAT_TYPES[key] for key in records[0]}
  parts.write_shards(path, "train", records, shards, types)
  return parts.Made(path, path, made, files)


def make_evaluation(
  folder, rows: int = 6, seed: int = 0, *, name: str = "MME"
) -> parts.Made:
  """An evaluation set of lmms-lab, one of `EVALUATIONS`, as one shard."""
  rng = np.random.default_rng(seed)
  split, make, types = published_evaluations.EVALUATIONS[name]
  records, made, files = [], [], []
  for index in range(rows):
    pictures, record, row = make(rng, index)
    files.append(pictures)
    records.append(record)
    made.append({"category": name, "kind": name} | row)
  path = pathlib.Path(folder) / name / "data"
  parts.write_shards(path, split, records, 1, types)
  return parts.Made(path, path, made, files)


def make_mmpr(folder, rows: int = 6, seed: int = 0) -> parts.Made:
  """MMPR-v1.2: meta.json, and JSON lines and images a source.

  `path` is meta.json; the rows are those of its sources in order.
  """
  rng = np.random.default_rng(seed)
  root = pathlib.Path(folder) / "MMPR-v1.2"
  meta, made, files = {}, [], []
  for number, name in enumerate(("ai2d_prefix_pair", "m3cot_correctness")):
    lines = []
    for index in range(rows):
      image = f"{name}/{index}.{'png' if number else 'jpg'}"
      data = parts.picture(rng, "PNG" if number else "JPEG")
      files.append([parts.put(root / "images" / image, data)])
      question = parts.words(rng, 3, 9)
      row = {
        "question": question if index % 3 else f"<image>\n{question}",
        "chosen": parts.words(rng, 5, 40),
        "rejected": parts.words(rng, 5, 40),
      }
      made.append(row)
      lines.append({"id": index, "image": image, **row})
    path = root / "annotations" / f"{name}.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    parts.put(path, text.encode())
    meta[name] = {
      "root": "images",
      "annotation": f"annotations/{name}.jsonl",
      "data_augment": False,
      "max_dynamic_patch": 12,
      "repeat_time": 1,
      "length": rows,
    }
  parts.put(root / "meta.json", json.dumps(meta, indent=2).encode())
  return parts.Made(root / "meta.json", root, made, files)


def make_onevision_mixture(folder, rows: int = 10, seed: int = 0) -> parts.Made:
  """A OneVision YAML of three JSON files: all, the first 30 %, every fifth.

  The rows are those of the files, before any is left out by a strategy.
  """
  rng = np.random.default_rng(seed)
  root = pathlib.Path(folder) / "onevision"
  lines, made, files = ["datasets:"], [], []
  for name, strategy in (
    ("llava_next_738k.json", "all"),
    ("sroie(33626).json", '"first:30%"'),
    ("magpie_pro(l3_80b_st).json", "first:2"),
  ):
    records = []
    for index in range(rows):
      image = f"{name.split('(')[0].removesuffix('.json')}/{index}.jpg"
      row = {"id": f"{name}-{index}", "conversations": parts.turns(rng, True)}
      files.append([parts.put(root / "images" / image, parts.picture(rng))])
      made.append(row)
      records.append(row | {"image": image})
    parts.put(root / name, json.dumps(records).encode())
    lines.append(f"  - json_path: {root / name}")
    lines.append(f"    sampling_strategy: {strategy}")
  path = root / "single_image.yaml"
  parts.put(path, ("\n".join(lines) + "\n").encode())
  return parts.Made(path, root / "images", made, files)


def make_image_folder(folder, rows: int = 4, seed: int = 0) -> parts.Made:
  """ImageNet's folders: train and val, a folder a WordNet id, `.JPEG` files.

  The rows, `rows` a class, are those of train.
  """
  rng = np.random.default_rng(seed)
  root = pathlib.Path(folder) / "imagenet"
  made, files = [], []
  for label, name in enumerate(("n01440764", "n01443537", "n02123045")):
    for index in range(rows):
      relative = f"{name}/{name}_{index}.JPEG"
      files.append([parts.put(root / "train" / relative, parts.picture(rng))])
      made.append({"id": relative, "label": label})
    for index in range(max(1, rows // 2)):
      relative = f"{name}/ILSVRC2012_val_{label * 100 + index:08d}.JPEG"
      parts.put(root / "val" / relative, parts.picture(rng))
  return parts.Made(root, root / "train", made, files)
