"""Makes MMPR's layout on disk, small: a `meta.json`, annotations, images."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

IMAGES = ("x.png", "y.jpg", "z.webp")


def row(image: Any = "x.png", **fields: Any) -> dict[str, Any]:
  """Return a record; `image` None leaves that field out."""
  made = dict(question="what ?", chosen="a cat", rejected="a dog") | fields
  return made if image is None else made | dict(image=image)


def numbered(count: int, **fields: Any) -> list[dict[str, Any]]:
  """Return records that ask "what 0 ?", "what 1 ?" and so on."""
  return [row(question=f"what {i} ?", **fields) for i in range(count)]


def write(
  folder: pathlib.Path,
  files: Mapping[str, Sequence[Any]],
  annotation: str = "annotations/{}.jsonl",
  **entry: Any,
) -> pathlib.Path:
  """Write {name: records, or lines as they are}; return the `meta.json`.

  Each entry has its folder images/0, images/1 and so on, with `IMAGES` in it.

  Args:
    annotation: the path that `meta.json` gives for annotations/{number}.jsonl.
    entry: further fields of each entry, or others than are right.
  """
  base = folder / "MMPR-v1.2"
  (base / "annotations").mkdir(parents=True)
  meta = {}
  for number, (name, rows) in enumerate(files.items()):
    lines = [one if isinstance(one, str) else json.dumps(one) for one in rows]
    text = "".join(line + "\n" for line in lines)
    (base / f"annotations/{number}.jsonl").write_text(text)
    root = f"images/{number}"
    (base / root).mkdir(parents=True)
    for image in IMAGES:
      pixels = np.full((2, 3, 3), number, np.uint8)
      Image.fromarray(pixels).save(base / root / image)
    meta[name] = dict(root=root, annotation=annotation.format(number)) | entry
  (base / "meta.json").write_text(json.dumps(meta))
  return base / "meta.json"


def words(text: str) -> int:
  """Counts words, a stand-in for tokens that a reader can check by hand."""
  return len(text.split())
