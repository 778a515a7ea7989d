"""Chooses the rows of MMPR that make up a training set of the paper.

`select_official` is the released script's algorithm as described in paper.md
4.5, quirks included; it was not checked against the released files.
`select_fixed` mends the quirks. Both choose each row once at most, whatever its
entry's `repeat_time`. Either makes the sets of 4.6 (`new_fraction`)
and 4.7 (`only`), too.

Rows are shuffled by number, which gives the order that shuffling the rows would
give, and of the text only what is walked over is read.
"""

import bisect
import collections
import dataclasses
import functools
import mmap
import os
import pathlib
import posixpath
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from pivot_jax import texts
from pivot_jax.data import images, tokenizer
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
  def rows(self) -> tuple[tuple[int, int], ...]:
    """The rows as (entry of `meta.json`, row of its file), both from 0."""
    return tuple(map(self.source.place, self.indices.tolist()))

  def open(self) -> mmpr.Selected:
    """Return the rows as a source."""
    return mmpr.Selected(self.source, self.indices)


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
    InputError: a row on the way that has no image, or one whose suffix is not
      .jpg, .jpeg, .png or .gif in lower case: there the script stops. Or too
      few rows.
  """
  if datasets is not None:
    image_root = pathlib.Path(datasets) / PREFIX
  source = mmpr.Mmpr(meta, image_root, gif_as_jpg=True, repeated=False)
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
  """What a set is to hold; see `select_official`."""

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
      f"{source.path}: only {len(chosen)} of {wish.size} rows can be had;"
      f" refused are: {why or 'none'}"
    )
  return Selection(
    source, np.asarray(chosen, np.int64), dict(refused), wish.seed
  )


def _judge(source, index, wish, left, refuse, forgiving) -> str:
  """Return why a row is refused, or takes its place and returns ""."""
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
  # A list under the key `images` ends no file, and the script reads no such key.
  if not isinstance(image, str):
    raise InputError("no image: the released script stops here; choose 'fixed'")
  # By case: `.JPG` is another suffix.
  if posixpath.splitext(image)[1] not in (".jpg", ".jpeg", ".png"):
    raise InputError(
      f"image: the released script stops at {image!r}; choose 'fixed'"
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
