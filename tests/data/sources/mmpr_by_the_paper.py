"""Selects post-training pairs from MMPR-v1.2 as the released script does.

This is a second, literal implementation to compare the package with, and
`make_copy` writes a small synthetic MMPR-v1.2 that holds every situation the
selection meets. Neither is meant for use: the quirks are kept, messages are not
for users, and all rows are held in memory.

The description leaves these points open; each is read as follows.

* `annotation` is relative to the folder of meta.json and includes its suffix.
  `root` is taken as it is. Other fields of an entry (`repeat_time`, `length`)
  are not used, so each file is read once.
* A list stops its file whatever its length, also a list of one image, and the
  row that holds it is dropped too.
* Order of steps for one row: join the path, rename .gif, abort on another
  suffix, prepend `<image>`, then the reasons to reject. So it is the .jpg that
  must exist, and an unknown suffix aborts even where the file is missing.
  Renaming changes the path that is written, never a file.
* Suffixes are compared by case: .JPG and .GIF abort.
* The path is joined while rows are walked, not while files are read: a row
  without an image aborts only if it is reached before `size` rows are kept.
  A missing `image` and a null one are the same, whatever `images` holds.
* `<image>` anywhere in the question counts, so nothing is prepended to it.
  "Occurs" means as a substring, in this case only.
* 1500 tokens pass, 1501 do not. The counted text holds `<image>` as text.
* The DPO prompt is the SFT question, with its `<image>`.
* `id` is not among the fields that are read, so it is the number of the
  accepted pair, from "0", the same in both lists; a string, as LLaVA's are.
* `data_source` is the name of the entry in meta.json.
* Nothing is deduplicated.
* If fewer than `size` rows pass, all that pass are returned.
"""

import json
import os
import pathlib
import random
from collections.abc import Callable, Collection

from PIL import Image

MAX_TOKENS = 1500

# What `make_copy` writes; `<image>` counts as one word in front of the words of
# the question, so the two at the limit hold for words as tokens only.
KEPT = (
  "without_placeholder",
  "placeholder_first",
  "placeholder_inside",
  "placeholder_last",
  "like_a_placeholder",
  "long_rejected",
  "at_the_limit",
  "gif_renamed",
  "duplicate",
)
DROPPED = (
  "missing_image",
  "missing_gif",
  "gif_without_jpg",
  "placeholder_in_chosen",
  "placeholder_in_rejected",
  "long_prompt",
  "long_chosen",
  "long_together",
  "over_the_limit",
)
CRASHING = (
  "other_suffix",
  "upper_case_suffix",
  "no_image",
  "null_image",
  "images_and_no_image",
)

# Name, root, annotation, and the share of the file before its list image (None:
# it has none). Neither names nor files are in alphabetical order.
_ENTRIES = (
  ("vqa_rules", "images/vqa", "annotations/z_vqa.jsonl", None),
  ("albums", "images/albums", "annotations/albums.jsonl", 0.5),
  ("captions", "images/captions", "annotations/more/captions.jsonl", None),
  ("albums_only", "images/albums", "annotations/first.jsonl", 0.0),
  ("charts", "images/vqa", "annotations/a_charts.jsonl", None),
)
_SUFFIXES = (".jpg", ".png", ".jpeg")
_IMAGES = 6  # per root, shared by the rows
_SITUATION_SHARE = 0.3  # of the rows beyond one of each situation


def select(
  meta: pathlib.Path,
  datasets: pathlib.Path,
  count_tokens: Callable[[str], int],
  *,
  size: int = 20000,
  seed: int = 777,
) -> tuple[list[dict], list[dict]]:
  """Return the SFT records and the DPO records, in lock-step.

  Raises:
    TypeError: A row that is reached has no image.
    ValueError: A row that is reached has an image of an unknown suffix.
  """
  rows = _read(meta)
  random.Random(seed).shuffle(rows)
  sft, dpo = [], []
  for name, root, row in rows:
    if len(sft) == size:
      break
    # Fails for a row without an image, as the script does.
    image = os.path.join("MMPR-v1.2", root, row.get("image"))
    stem, suffix = os.path.splitext(image)
    if suffix == ".gif":
      image, suffix = stem + ".jpg", ".jpg"
    if suffix not in (".jpg", ".jpeg", ".png"):
      raise ValueError(f"{image}: unknown suffix")
    question, chosen, rejected = row["question"], row["chosen"], row["rejected"]
    if "<image>" not in question:
      question = "<image>\n" + question
    if not os.path.exists(os.path.join(datasets, image)):
      continue
    if "<image>" in chosen or "<image>" in rejected:
      continue
    if count_tokens(f"{question} {chosen}") > MAX_TOKENS:
      continue
    number = str(len(sft))
    turns = [
      {"from": "human", "value": question},
      {"from": "gpt", "value": chosen},
    ]
    sft.append({
      "id": number, "image": image, "conversations": turns, "data_source": name
    })  # fmt: skip
    dpo.append({
      "id": number, "prompt": question, "chosen": chosen, "rejected": rejected,
      "image": image,
    })  # fmt: skip
  return sft, dpo


def _read(meta: pathlib.Path) -> list[tuple[str, str, dict]]:
  """Return (name, root, row) for each row before its file's list image."""
  rows = []
  entries = json.loads(meta.read_text("utf-8"))
  for name, entry in entries.items():
    with open(meta.parent / entry["annotation"], encoding="utf-8") as lines:
      for line in lines:
        row = json.loads(line)
        if isinstance(row.get("image"), list):
          break
        rows.append((name, entry["root"], row))
  return rows


def make_copy(
  folder: pathlib.Path,
  rows_per_file: int = 40,
  seed: int = 0,
  *,
  crashing: Collection[str] = (),
) -> pathlib.Path:
  """Write a synthetic folder/MMPR-v1.2 and return its meta.json.

  `folder` is what `select` calls `datasets`. Each of the five files has
  `rows_per_file` rows: one of each situation in KEPT and DROPPED, the others
  mostly plain, in random order. Two of the files have a row with several images
  besides: one is left half-way, of the other nothing is read. The `id` of a row
  is FILE-NUMBER-SITUATION; a duplicate is the copy of another row, id included.

  Args:
    crashing: Names in CRASHING; the first file gets one row more of each.
  """
  if unknown := set(crashing) - set(CRASHING):
    raise ValueError(f"crashing has {sorted(unknown)}; it knows {CRASHING}")
  if rows_per_file < len(KEPT + DROPPED):
    raise ValueError(f"rows_per_file must be {len(KEPT + DROPPED)} or more")
  rng = random.Random(seed)
  top = pathlib.Path(folder) / "MMPR-v1.2"
  meta = {}
  for name, root, annotation, stop in _ENTRIES:
    _write_images(rng, top / root)
    rows = _rows(rng, name, rows_per_file)
    if not meta:
      rows += [_row(rng, s, f"{name}-more-{s}") for s in sorted(crashing)]
      rng.shuffle(rows)
    if stop is not None:
      album = _row(rng, "album", f"{name}-album")
      rows.insert(int(stop * len(rows)), album)
    _write_lines(top / annotation, rows)
    meta[name] = {
      "root": root, "annotation": annotation, "data_augment": False,
      "repeat_time": 1 + len(meta) % 2, "length": len(rows),
    }  # fmt: skip
  (top / "meta.json").write_text(json.dumps(meta, indent=2), "utf-8")
  return top / "meta.json"


def _write_images(rng: random.Random, folder: pathlib.Path):
  names = [_image_name(index) for index in range(_IMAGES)]
  shouting = ("other.bmp", "upper.JPG")  # read in the crashing rows only
  for name in (*names, "renamed.jpg", "alone.gif", *shouting):
    size = rng.randint(4, 24), rng.randint(4, 24)
    picture = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _image_name(index: int) -> str:
  return f"part{index % 2}/{index:04d}{_SUFFIXES[index % len(_SUFFIXES)]}"


def _write_lines(path: pathlib.Path, rows: list[dict]):
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
  path.write_bytes("".join(lines).encode())


def _rows(rng: random.Random, name: str, count: int) -> list[dict]:
  situations = [s for s in KEPT + DROPPED if s != "duplicate"]
  wanted = list(situations)
  while len(wanted) < count - 1:
    special = rng.random() < _SITUATION_SHARE
    wanted.append(rng.choice(situations) if special else "without_placeholder")
  rows = [_row(rng, s, f"{name}-{i}-{s}") for i, s in enumerate(wanted)]
  rows.append(dict(rows[0]))  # the duplicate, of a row that is kept
  rng.shuffle(rows)
  return rows


def _row(rng: random.Random, situation: str, identifier: str) -> dict:
  row = {
    "id": identifier,
    "image": _image_name(rng.randrange(_IMAGES)),
    "question": _text(rng, rng.randint(3, 40)),
    "chosen": _text(rng, rng.randint(1, 120)),
    "rejected": _text(rng, rng.randint(1, 120)),
  }
  row.update(_differences(rng, situation, row))
  if situation in ("no_image", "images_and_no_image"):
    del row["image"]
  return row


def _differences(rng: random.Random, situation: str, row: dict) -> dict:
  """Return the fields of `row` that make it one of `situation`."""
  question, chosen = row["question"], row["chosen"]
  marked = f"{chosen}\n<image> {_text(rng, 5)}"
  simple = {
    "without_placeholder": {},
    "placeholder_first": {"question": f"<image>\n{question}"},
    "placeholder_inside": {"question": f"See <image> here.\n{question}"},
    "placeholder_last": {"question": f"{question}\n<image>"},
    "like_a_placeholder": {"chosen": f"{chosen} <Image> < image > <image"},
    "gif_renamed": {"image": "renamed.gif"},
    "missing_image": {"image": "part0/missing.png"},
    "missing_gif": {"image": "missing.gif"},
    "gif_without_jpg": {"image": "alone.gif"},
    "placeholder_in_chosen": {"chosen": marked},
    "placeholder_in_rejected": {"rejected": marked},
    "album": {"image": [_image_name(0), _image_name(1)]},
    "other_suffix": {"image": "other.bmp"},
    "upper_case_suffix": {"image": "upper.JPG"},
    "null_image": {"image": None},
    "no_image": {},
    "images_and_no_image": {"images": [_image_name(0)]},
  }
  if situation in simple:
    return simple[situation]
  asked, answered, refused = {
    "long_prompt": (rng.randint(1600, 2000), 10, 10),
    "long_chosen": (10, rng.randint(1600, 2000), 10),
    "long_together": (rng.randint(700, 900), 900, 10),
    "long_rejected": (10, 10, rng.randint(1600, 2000)),
    "at_the_limit": (500, MAX_TOKENS - 501, 10),
    "over_the_limit": (500, MAX_TOKENS - 500, 10),
  }[situation]
  return {
    "question": _text(rng, asked),
    "chosen": _text(rng, answered),
    "rejected": _text(rng, refused),
  }


def _text(rng: random.Random, words: int) -> str:
  """Return `words` random words; some not ASCII, some on new lines."""
  text = [_word(rng)]
  for _ in range(words - 1):
    # The line separator is white space, but ends no line of a JSON-lines file.
    space = rng.choices((" ", "\n", "\u2028"), weights=(90, 8, 2))[0]
    text += [space, _word(rng)]
  return "".join(text)


def _word(rng: random.Random) -> str:
  if rng.random() < 0.03:
    return rng.choice(
      ("café", "数える", "Ω≈3", '"quoted"', "back\\slash", "🙂")
    )
  return "".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8)))
