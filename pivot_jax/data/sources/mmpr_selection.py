"""Choose the rows of MMPR that make up a training set, and write them as lists.

`select_official` is the released script's algorithm as described in paper.md
4.5, quirks included; it was not checked against the released files.
`select_fixed` mends the quirks. Both choose each row once at most, whatever its
entry's `repeat_time`. Either makes the sets of 4.6 (`new_fraction`)
and 4.7 (`only`), too.

Rows are shuffled by number, which gives the order that shuffling the rows would
give, and of the text only what is walked over is read. A set is written once,
as a list for SFT and one for DPO with the same rows in the same order; training
reads these as it reads any other file.
"""

import bisect
import collections
import dataclasses
import functools
import json
import mmap
import os
import pathlib
import posixpath
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from pivot_jax import files, texts
from pivot_jax.data import images, tokenizer
from pivot_jax.data.rows import View
from pivot_jax.data.sources import json_index, mmpr, records
from pivot_jax.errors import InputError

Row = mmpr.Row
Count = Callable[[str], int]
# Why a row is refused, "" if it is not.
Refuse = Callable[[Row], str]

# The paper's set that most of its runs train on.
SIZE, SEED = 20_000, 777
# Prompt and answer together, as text: the released script's limit.
MAX_TOKENS = 1500
PREFIX = "MMPR-v1.2"  # What the released script calls the data's folder.
# A chosen answer of more words, or with these tags, is new to a model that was
# trained on the one-image mixture (paper.md 4.6).
NEW_WORDS = 100
TAGS = re.compile(r"</?(?:think|review)>")
ONLY = ("", "under30", "nothink")
# Of the paper, what its sets ask of chosen answers (4.5 to 4.7). A larger set
# holds the smaller ones of its name, and begins with them unless it has a share
# of new answers.
SETS = ("official", "new_0", "new_50", "new_80", "under30", "nothink")
_NEW = re.compile(r"new_(\d+(?:\.\d+)?)")

_LISTED = re.compile(rb'"image"\s*:\s*\[')


@dataclasses.dataclass(frozen=True)
class Selection:
  """Rows of MMPR in the order of their choice, and how many were refused.

  Attributes:
    indices: rows of `source`.
    refused: how many of the rows that were walked over, by reason.
    seed: of the order.
  """

  source: mmpr.Mmpr
  indices: Int64[np.ndarray, "N"]
  refused: Mapping[str, int]
  seed: int

  @property
  def image_root(self) -> pathlib.Path:
    """The folder that the image paths of the written lists begin in."""
    root = pathlib.Path(os.path.abspath(self.source.root))
    return root.parent if root.name == PREFIX else root

  @property
  def rows(self) -> tuple[tuple[int, int], ...]:
    """The rows as (entry of `meta.json`, row of its file), both from 0."""
    return tuple(map(self.source.place, self.indices.tolist()))

  def open(self) -> View:
    """Return the rows as a source."""
    return View(self.source, self.indices)


def select_official(
  meta: str | os.PathLike,
  datasets: str | os.PathLike | None,
  count_tokens: Count,
  *,
  size: int = SIZE,
  seed: int = SEED,
  new_fraction: float | None = None,
  only: str = "",
  image_root: str | os.PathLike | None = None,
) -> Selection:
  """Choose rows as the released script is said to do (paper.md 4.5).

  A file is read up to its first row with a list of images. The rows are
  shuffled by `random.Random(seed)` and walked in that order; one is refused
  if its image is missing, if `<image>` is in an answer, or if question and
  chosen answer have more than `MAX_TOKENS` tokens. The rejected answer may be
  of any length. A `.gif` is taken for the `.jpg` of that name.

  Args:
    datasets: the folder with MMPR-v1.2/{root}/{image}; None: see `image_root`.
    count_tokens: the number of tokens of a text, by the Qwen2.5 tokenizer.
    size: rows to choose.
    new_fraction: the share of them whose chosen answer `is_new`, the others'
      not being so; None takes them as they come.
    only: "under30" takes chosen answers under 30 words, "nothink" those under
      60 words without `TAGS`.
    image_root: see `mmpr.Mmpr`.

  Raises:
    InputError: a row on the way that has no `image`, or one whose suffix is not
      .jpg, .jpeg, .png or .gif in lower case: there the script stops. Or too
      few rows.
  """
  if datasets is not None:
    image_root = pathlib.Path(datasets) / PREFIX
  source = mmpr.Mmpr(meta, image_root, as_released=True, repeated=False)
  _check_roots(source)
  return _walk(
    source,
    [_rows_before_a_list(part.file) for part in source.parts],
    _Wish(size, seed, new_fraction, only),
    functools.partial(_refused_as_released, source.root, count_tokens),
  )


def select_fixed(
  meta: str | os.PathLike,
  image_root: str | os.PathLike | None,
  count_tokens: Count,
  *,
  size: int = SIZE,
  seed: int = SEED,
  new_fraction: float | None = None,
  only: str = "",
  text_only: bool = False,
  several: bool = False,
) -> Selection:
  """Choose rows as `select_official`, without its quirks.

  Every file is read to its end. A row is refused by itself, whatever is wrong
  with it, and both of its answers must be within `MAX_TOKENS`. Answers that
  training would refuse (empty, equal, with special tokens) are refused here.
  Any image that can be decoded will do.

  Args:
    image_root: see `mmpr.Mmpr`.
    text_only: take rows without an image, too.
    several: take rows of several images, too, which have a tag for each.

  Raises:
    InputError: too few rows.
  """
  source = mmpr.Mmpr(meta, image_root, repeated=False, flawed=True)
  if not text_only:
    _check_roots(source)
  return _walk(
    source,
    [len(part.file) for part in source.parts],
    _Wish(size, seed, new_fraction, only),
    functools.partial(
      _refused, source.root, count_tokens, text_only=text_only, several=several
    ),
    forgiving=True,
  )


def asked_of(name: str) -> dict[str, Any]:
  """Return the arguments `new_fraction` and `only` of a set by its name.

  Args:
    name: one of `SETS`, or new_N with another percentage.
  """
  if name == "official":
    return {}
  if name in ONLY[1:]:
    return {"only": name}
  share = _NEW.fullmatch(name)
  if not share or float(share[1]) > 100:
    raise InputError(
      f"--set={name}: choose one of {', '.join(SETS)}, or new_N, N percent of"
      " whose answers are new"
    )
  return {"new_fraction": float(share[1]) / 100}


def check_target(folder: str | os.PathLike) -> pathlib.Path:
  """Return a folder to write; raise unless it is named and new or empty."""
  path = files.local_path(folder, "--to")
  files.check_named(path)
  if path.is_dir() and not any(path.iterdir()):
    return path
  if path.exists() or path.is_symlink():
    raise InputError(f"{path}: exists and is not empty; give a new folder")
  return path


def write(
  selection: Selection, folder: str | os.PathLike, how: Mapping[str, Any]
) -> tuple[pathlib.Path, pathlib.Path]:
  """Write the lists of SFT and of DPO, row for row alike; return their paths.

  sft_mmpr_{size}_{seed}.json has LLaVA records of question and chosen answer,
  dpo_mmpr_{size}_{seed}.json records of id, prompt, chosen, rejected, image. An
  image is MMPR-v1.2/{root}/{image}, or {root}/{image} where the images lie in a
  folder of another name, and the question opens with it. selection.json holds
  `how`, the files' stamp, `image_root`, and how many rows were refused.

  Raises:
    InputError: the folder is not empty, or cannot be written.
  """
  folder = check_target(folder)
  source, size = selection.open(), len(selection.indices)
  root = selection.image_root
  inside = os.path.relpath(os.path.abspath(selection.source.root), root)
  names = [
    f"{kind}_mmpr_{size}_{selection.seed}.json" for kind in ("sft", "dpo")
  ]
  told = dict(how) | {
    "rows": size,
    "seed": selection.seed,
    "refused": dict(selection.refused),
    "image_root": str(root),
    "stamp": selection.source.stamp(),
    "versions": files.versions(),
  }
  try:
    with files.writing_folder(folder) as aside:
      for name, make in zip(names, (_sft_record, _dpo_record)):
        rows = (source.text(index) for index in range(size))
        _write_list(aside / name, (make(row, inside) for row in rows))
      files.write_json(aside / "selection.json", told)
  except OSError as error:
    raise InputError(f"{folder}: cannot be written: {error}") from None
  return folder / names[0], folder / names[1]


def is_new(answer: str) -> bool:
  """Return whether an answer is over `NEW_WORDS` words or has `TAGS`."""
  return len(answer.split()) > NEW_WORDS or bool(TAGS.search(answer))


def prompt(row: Row) -> str:
  """Return the question with its image before it, or where it says."""
  question = row["question"]
  if tokenizer.IMAGE in question:
    return question
  return f"{tokenizer.IMAGE}\n" * len(records.listed(row["image"])) + question


class _Wish(NamedTuple):
  """The rows that a set is to hold; see `select_official`."""

  size: int
  seed: int
  new_fraction: float | None
  only: str

  def places(self) -> dict[bool | None, int]:
    """Return how many rows are wanted: new ones, others; or of any kind."""
    if self.size < 1:
      raise InputError(f"size={self.size}: give at least 1")
    if self.only not in ONLY:
      raise InputError(f"only={self.only!r}: choose one of {ONLY}")
    if self.new_fraction is None:
      return {None: self.size}
    if not 0 <= self.new_fraction <= 1:
      raise InputError(
        f"new_fraction={self.new_fraction}: give one in 0 .. 1, or None"
      )
    if self.only:
      raise InputError("give new_fraction or only, not both")
    new = round(self.size * self.new_fraction)
    return {True: new, False: self.size - new}


def _walk(
  source: mmpr.Mmpr,
  kept: Sequence[int],
  wish: _Wish,
  refuse: Refuse,
  *,
  forgiving: bool = False,
) -> Selection:
  """Take rows in the seeded order until the wish is met.

  Args:
    kept: how many rows of each file there are to choose from.
    forgiving: whether a row that cannot be read is refused, and no error.
  """
  left = wish.places()
  ends = np.cumsum(kept).tolist()
  order = list(range(ends[-1]))
  random.Random(wish.seed).shuffle(order)
  chosen: list[int] = []
  refused = collections.Counter()
  for position in order:
    if len(chosen) == wish.size:
      break
    entry = bisect.bisect_right(ends, position)
    index = source.parts[entry].begin + position - ends[entry] + kept[entry]
    reason = _judge(source, index, wish, left, refuse, forgiving)
    if reason:
      refused[reason] += 1
    else:
      chosen.append(index)
  if len(chosen) < wish.size:
    why = ", ".join(f"{many} {why}" for why, many in sorted(refused.items()))
    raise InputError(
      f"{source.path}: only {len(chosen)} of {wish.size} rows fit the set;"
      f" refused: {why or 'none'}"
    )
  return Selection(
    source, np.asarray(chosen, np.int64), dict(refused), wish.seed
  )


def _judge(
  source: mmpr.Mmpr,
  index: int,
  wish: _Wish,
  left: dict[bool | None, int],
  refuse: Refuse,
  forgiving: bool,
) -> str:
  """Return why a row is refused, or take its place and return ""."""
  try:
    row = source.text(index)
  except InputError:
    if forgiving:
      return "cannot be read"
    raise
  kind = None if None in left else is_new(row["chosen"])
  reason = _unlike(row["chosen"], wish.only)
  if not reason and not left[kind]:
    reason = "enough of its kind"
  if not reason:
    with records.located(source.name(index)):
      reason = refuse(row)
  if not reason:
    left[kind] -= 1
  return reason


def _unlike(answer: str, only: str) -> str:
  words = len(answer.split())
  if only == "under30" and words >= 30:
    return "30 words or more"
  if only == "nothink" and TAGS.search(answer):
    return "thinks aloud"
  if only == "nothink" and words >= 60:
    return "60 words or more"
  return ""


def _refused_as_released(root: pathlib.Path, count: Count, row: Row) -> str:
  image = row["image"]
  # The script reads no key `images`, so that a list there ends no file.
  if not isinstance(image, str):
    raise InputError("no image: the released script stops here; pass --fixed")
  # By case: `.JPG` is another suffix.
  if posixpath.splitext(image)[1] not in (".jpg", ".jpeg", ".png"):
    raise InputError(
      f"image: the released script stops at {image!r}; pass --fixed"
    )
  if not (root / image).is_file():
    return "image missing"
  if tokenizer.IMAGE in row["chosen"] or tokenizer.IMAGE in row["rejected"]:
    return "<image> in an answer"
  if count(f"{prompt(row)} {row['chosen']}") > MAX_TOKENS:
    return "too long"
  return ""


def _refused(
  root: pathlib.Path,
  count: Count,
  row: Row,
  *,
  text_only: bool,
  several: bool,
) -> str:
  paths = records.listed(row["image"])
  if not paths and not text_only:
    return "no image"
  if len(paths) > 1 and not several:
    return "several images"
  tags = row["question"].count(tokenizer.IMAGE)
  # As in `chat.py`: one image needs no tag, several need one each.
  if tags != len(paths) and (tags or len(paths) > 1):
    return "other number of <image> than of images"
  for path in paths:
    if not path.lower().endswith(images.SUFFIXES):
      return "unknown kind of image"
    try:
      images.resolve(root, path)
    except InputError:
      return "image missing"
  answers = (row["chosen"], row["rejected"])
  for answer in answers:
    if not answer.strip():
      return "empty answer"
    if any(name in answer for name in (tokenizer.IMAGE, *tokenizer.SPECIALS)):
      return "special token in an answer"
  if texts.canonical(answers[0]) == texts.canonical(answers[1]):
    return "equal answers"
  if any(count(f"{prompt(row)} {one}") > MAX_TOKENS for one in answers):
    return "too long"
  return ""


def _check_roots(source: mmpr.Mmpr) -> None:
  """Raise if no row can have its image, before millions are looked at."""
  roots = [part.root for part in source.parts]
  if not any((source.root / root).is_dir() for root in roots):
    raise InputError(
      f"{source.root}: has no folder {roots[0]}, nor any other root of"
      f" {source.path}; give the folder that they are in"
    )


def _rows_before_a_list(file: json_index.File) -> int:
  """Return how many rows come before the first with a list of images."""
  if not len(file):
    return 0
  with (
    file.path.open("rb") as lines,
    mmap.mmap(lines.fileno(), 0, access=mmap.ACCESS_READ) as data,
  ):
    line, begin = 0, 0
    while found := _LISTED.search(data, begin):
      place = found.start()
      while -1 < (end := data.find(b"\n", begin)) < place:
        line, begin = line + 1, end + 1
      # Something deeper in a row may be called so: the row has the say.
      if isinstance(file.record(line).get("image"), list):
        return line
      line, begin = line + 1, end + 1
      if end == -1:
        break
  return len(file)


def _write_list(path: pathlib.Path, found: Iterable[Mapping[str, Any]]) -> None:
  """Write records as a JSON list, one a line."""
  with path.open("w", encoding="utf-8") as file:
    separator = "[\n"
    for record in found:
      file.write(separator + json.dumps(record, ensure_ascii=False))
      separator = ",\n"
    file.write("\n]\n")


def _sft_record(row: Row, inside: str) -> dict[str, Any]:
  turns = (("human", prompt(row)), ("gpt", row["chosen"]))
  return {
    "id": row["id"],
    **_image(row, inside),
    "conversations": [{"from": role, "value": text} for role, text in turns],
    "data_source": row["data_source"],
  }


def _dpo_record(row: Row, inside: str) -> dict[str, Any]:
  return {
    "id": row["id"],
    "prompt": prompt(row),
    "chosen": row["chosen"],
    "rejected": row["rejected"],
    **_image(row, inside),
  }


def _image(row: Row, inside: str) -> dict[str, Any]:
  paths = [
    posixpath.join(inside, path) if inside != "." else path
    for path in records.listed(row["image"])
  ]
  if not paths:
    return {}
  return {"image": paths if len(paths) > 1 else paths[0]}
