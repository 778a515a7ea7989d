"""A folder of data files with known faults: the judge of a data checker.

`plant` writes four data files of `ROWS` rows and three files that are bad as a
whole, beside the folder `IMAGES` that their images are relative to, and returns
every fault. The rest is right, however odd it looks: byte order mark and CRLF,
a blank last line, a last line without its end, text-only rows, rows without an
`<image>` tag or id, ids that another file has too, links that stay inside,
pictures of all kinds. It knows no checker; what the words mean is `KINDS`.
"""

import dataclasses
import json
import pathlib

import numpy as np

from tests.data import planted_pictures, planted_rows, planted_ways

KINDS = {
  "schema": "The record is not an object, lacks a field (id, image, category"
  " and kind may be absent), has one of a wrong type (id must be text or an"
  " integer; image text, a list of texts or null), or its conversations are"
  " empty, have an unknown role (from/value or role/content; human or user,"
  " gpt or assistant), no question or no answer; row None: a .json file that"
  " is JSON but not a list.",
  "missing_image": "An image path inside the image folder at which there is no"
  " file (nothing, or a folder); in a list of images, one such is enough.",
  "undecodable_image": "An image file that is empty, no image (noise, a web"
  " page) or cut short.",
  "too_many_pixels": "An image whose header says more than 50e6 pixels, whether"
  " or not the pixels are there.",
  "outside_root": "An image path that leaves the image folder by .., by being"
  " absolute, by being a URL, or by a symbolic link.",
  "placeholders": "The questions have another number of <image> tags than the"
  " row has images (one image without any tag is right), or an answer has an"
  " <image> tag.",
  "empty_answer": "An answer (any of the gpt turns, chosen, rejected, answer)"
  " is empty or nothing but white space.",
  "equal_pair": "chosen and rejected are the same text, character for"
  " character.",
  "special_token": "An answer holds <|im_start|>, <|im_end|> or <|endoftext|>.",
  "too_long": "The row (prompt and any one answer) has more than 2048 tokens.",
  "duplicate_id": "An earlier row of the same file has the same id; each later"
  " use is a fault, the first is none. Other files may have the id too.",
  "lone_surrogate": "A text holds half a surrogate pair, spelled as a JSON"
  " escape.",
  "bad_json": "A line of a .jsonl file is not one JSON value; row None: a .json"
  " file is not JSON (one fault for the whole file, none for its rows).",
  "bad_utf8": "A line of a .jsonl file is not UTF-8; row None: a .json file is"
  " not UTF-8 (one fault for the whole file, none for its rows).",
}
IMAGES = "images"
ROWS = 100  # Of each file that is not bad as a whole.
# How many rows of each file have nothing wrong: all those no fault names.
CLEAN = {
  "conversations.json": 65,
  "turns.jsonl": 61,
  "pairs.jsonl": 57,
  "exam.jsonl": 64,
  "cut.json": 0,
  "wide.json": 0,
  "object.json": 0,
}


@dataclasses.dataclass(frozen=True)
class Fault:
  """One thing wrong: the `row`, from 0, of `file`; None for all of it."""

  file: str
  row: int | None
  kind: str


def plant(folder: pathlib.Path, seed: int = 0) -> tuple[Fault, ...]:
  """Writes the files into `folder`, new or empty; returns every fault.

  The bytes of every file and the faults depend on the seed alone.
  """
  rng = np.random.default_rng(seed)
  images = folder / IMAGES
  kit = planted_rows.Kit(images, rng)
  # Good pictures, but not in the image folder; one place has its name's start.
  for name in ("outside", "images_too"):
    (folder / name).mkdir()
    (folder / name / "real.png").write_bytes(planted_pictures.blank(8, 8))
  (images / "linked").symlink_to("../outside", target_is_directory=True)
  faults = []
  for number, form in enumerate(planted_rows.FORMS):
    faults += _plant_file(folder, form, number, kit)
  return (*faults, *_plant_whole(folder))


def _plant_file(
  folder, form: planted_rows.Form, number: int, kit: planted_rows.Kit
) -> list[Fault]:
  plans = planted_ways.plans(form, number, kit)
  last = ROWS - 1
  cut = form.file == "pairs.jsonl"
  places = np.arange(planted_rows.CLEAN_START, ROWS - cut)
  places = kit.rng.choice(places, len(plans), replace=False).tolist()
  at = dict(zip(places, plans))
  if cut:
    at[last] = planted_ways.Plan(
      "bad_json", {}, lambda line: line[: len(line) * 2 // 3]
    )
  rows = [
    planted_ways.faulty(form, row, at[row], kit)
    if row in at
    else planted_rows.clean(form, row, kit)
    for row in range(ROWS)
  ]
  if form.file.endswith(".json"):
    data = b"[\n" + b",\n".join(rows) + b"\n]\n"
  else:
    tail = b"" if cut else form.tail
    data = form.start + form.end.join(rows) + tail
  (folder / form.file).write_bytes(data)
  return [Fault(form.file, row, at[row].kind) for row in sorted(at)]


def _plant_whole(folder: pathlib.Path) -> list[Fault]:
  talk = planted_rows.llava([], "Who?", "Nobody.", "")
  records = [{"id": f"row-{i:03d}"} | talk for i in range(5)]
  text = json.dumps(records, indent=2)
  (folder / "cut.json").write_bytes(text[: len(text) * 2 // 3].encode())
  (folder / "wide.json").write_bytes(text.encode("utf-16"))
  (folder / "object.json").write_text(json.dumps({"rows": records}), "utf-8")
  return [
    Fault("cut.json", None, "bad_json"),
    Fault("wide.json", None, "bad_utf8"),
    Fault("object.json", None, "schema"),
  ]
