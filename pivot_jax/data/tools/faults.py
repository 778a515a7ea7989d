"""The faults that data can have, and the files and lines that tell of them.

`KINDS` is the vocabulary of `python -m pivot_jax.data check`. A row has at most
one fault; the rows themselves are looked at in `check_rows.py`.
"""

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pivot_jax.data import rows
from pivot_jax.data.tools import check_rows

_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
_TOP = 10  # Sizes of images that are named.
_BARS = 16  # Of a histogram.
_BAR = 30  # Characters of the longest bar.


class Kind(NamedTuple):
  """The meaning of a fault, and the remedy."""

  meaning: str
  remedy: str


KINDS = {
  "schema": Kind(
    "The record is no object, lacks a field (id, image, category and kind may be"
    " absent), has one of a wrong type (an id is text or an integer, an image"
    " text, a list of texts or null), has pictures under another key than image"
    " or images, or in both, or two different questions; or its conversations"
    " are empty, have an unknown role, no question or no answer. Of a whole"
    " file: it is JSON and no list, has no rows, or has a column of pictures"
    " that is not read.",
    "mend the field that is named: its type, or what it lacks",
  ),
  "missing_image": Kind(
    "An image path inside the image folder at which there is no file. In a list"
    " of images one such is enough.",
    "put the file there, correct the path, or give the folder by --images",
  ),
  "undecodable_image": Kind(
    "An image file that is empty, no image, cut short, overwritten, or slow to"
    " decode (a JPEG of more than 100 scans, ASCII PPM, too many chunks); or an"
    " image too elongated to be cropped as a stage of the config does.",
    "get the file again, or skip the row",
  ),
  "too_many_pixels": Kind(
    "An image whose header says more pixels than max_pixels (50 million),"
    " whether or not they are there.",
    "shrink the image, or skip the row",
  ),
  "outside_root": Kind(
    "An image path that leaves the image folder: by .., absolute, a URL, or a"
    " symbolic link.",
    "copy the image into the folder and name it by its path there",
  ),
  "placeholders": Kind(
    "The questions have another number of <image> tags than the row has images"
    " (one image needs no tag), or an answer has a tag.",
    "write one <image> into the questions for each image of the row",
  ),
  "empty_answer": Kind(
    "An answer is empty, or nothing but white space.",
    "write the answer, or skip the row",
  ),
  "equal_pair": Kind(
    "The chosen and the rejected answer are the same.",
    "skip the row: there is nothing to prefer",
  ),
  "special_token": Kind(
    "An answer holds <|im_start|>, <|im_end|> or <|endoftext|>.",
    "remove the token from the answer",
  ),
  "too_long": Kind(
    "The prompt with its images and an answer have more tokens than max_length,"
    " and the stages neither drop nor cut such rows.",
    "shorten the row, raise max_length, or train with long=drop",
  ),
  "duplicate_id": Kind(
    "An earlier row of the same file has the id. A fault in an evaluation"
    " alone; training calls the row ID#2, and bad= does not skip it.",
    "give each row of a file its own id",
  ),
  "lone_surrogate": Kind(
    "A text holds half a surrogate pair, spelled as a JSON escape.",
    "write the character that was cut, or remove the escape",
  ),
  "bad_json": Kind(
    "A line of a .jsonl file is not one JSON value. Of a whole file: a .json"
    " file is not JSON.",
    "write the line or the file again; a file of JSON lines ends in .jsonl",
  ),
  "bad_utf8": Kind(
    "A line of a .jsonl file is not UTF-8. Of a whole file: a .json file is not"
    " UTF-8.",
    "save the file as UTF-8",
  ),
  "unreadable": Kind(
    "Of a whole file or folder: it is of no known format, damaged, or lacks a"
    " part.",
    "mend what the reason says, or skip the file",
  ),
}


class Summary:
  """The findings of one file.

  max_bad: the share of its rows that may be bad. long: the policy for rows
  over max_length, "" if they are bad.
  """

  def __init__(self, path: str, *, max_bad: float = 0.0, long: str = ""):
    self.path = path
    self.max_bad, self.long = max_bad, long
    self.rows = 0
    self.bad: collections.Counter[str] = collections.Counter()
    self.notes: collections.Counter[str] = collections.Counter()
    self.unreadable = False
    self._first: dict[str, str] = {}
    self._tokens: collections.Counter[int] = collections.Counter()
    self._sizes: collections.Counter[check_rows.Size] = collections.Counter()

  def add(self, part: check_rows.Part) -> None:
    """Count the findings of some rows."""
    self.rows += part.rows
    for fault in part.faults:
      self._count(fault)
    self.notes["too_long"] += len(part.long)
    self._tokens.update(part.tokens)
    self._sizes.update(part.sizes)

  def add_unreadable(self, fault: check_rows.Fault) -> None:
    """Count a fault of the whole file."""
    self.unreadable = True
    self._count(fault)

  @property
  def bad_rows(self) -> int:
    return 0 if self.unreadable else self.bad.total()

  @property
  def is_allowed(self) -> bool:
    """True if it can be read, and no more of its rows are bad than may be."""
    return not self.unreadable and self.bad_rows <= self.max_bad * self.rows

  def as_json(self) -> dict[str, Any]:
    """Return the file's part of `check.json`."""
    return {
      "file": self.path,
      "readable": not self.unreadable,
      "rows": self.rows,
      "good": self.rows - self.bad_rows,
      "bad": _in_order(self.bad),
      "max_bad": self.max_bad,
      "notes": _in_order(self.notes),
      "long": self.long,
      "images": self._sizes.total(),
      "distinct_image_sizes": len(self._sizes),
      "image_sizes": [
        {"width": width, "height": height, "images": count}
        for (width, height), count in self._top()
      ],
      "tokens": lengths(self._tokens),
    }

  def lines(self) -> list[str]:
    """Return the file's part of the text on the terminal."""
    good = self.rows - self.bad_rows
    rows = "cannot be read" if self.unreadable else f"{self.rows} rows"
    said = [f"{self.path}: {rows}, {good} good"]
    for kind, count in self.bad.most_common():
      said += [
        f"  {count:>6} {kind}: {KINDS[kind].remedy}",
        f"         as {self._first[kind]}",
      ]
    said += self._noted()
    if self._sizes:
      sizes = ", ".join(
        f"{width}x{height} ({count})"
        for (width, height), count in self._top()[:3]
      )
      more = ", ..." if len(self._sizes) > 3 else ""
      said.append(
        f"  {self._sizes.total()} images of {len(self._sizes)} sizes: {sizes}"
        f"{more}"
      )
    return said + _drawn(lengths(self._tokens))

  def _noted(self) -> list[str]:
    """Return lines on rows that are not bad, and may be unexpected."""
    said = []
    if self.notes["too_long"]:
      said.append(
        f"  {self.notes['too_long']:>6} too_long: none of them bad, as the"
        f" stages have long={self.long}"
      )
    if self.notes["duplicate_id"]:
      said += [
        f"  {self.notes['duplicate_id']:>6} duplicate_id: none of them bad, as"
        " training calls them ID#2",
        f"         as {self._first['duplicate_id']}",
      ]
    return said

  def _count(self, fault: check_rows.Fault) -> None:
    counts = self.bad if fault.drop else self.notes
    counts[fault.kind] += 1
    where = "" if self.unreadable else f"{fault.name}: "
    self._first.setdefault(fault.kind, where + fault.why)

  def _top(self) -> list[tuple[check_rows.Size, int]]:
    ordered = sorted(self._sizes.items(), key=lambda one: (-one[1], one[0]))
    return ordered[:_TOP]


def lengths(counts: collections.Counter[int]) -> dict[str, Any] | None:
  """Return the distribution of lengths in tokens, None of no rows.

  A quantile q is the smallest length that a share q of the rows is not over.
  The bars of the histogram are equally wide, but for the last, which has all
  that are longer.
  """
  if not counts:
    return None
  rows = counts.total()
  total = sum(length * count for length, count in counts.items())
  quantiles = _quantiles(counts)
  return {
    "rows": rows,
    "total": total,
    "mean": round(total / rows, 2),
    "min": min(counts),
    "max": max(counts),
    "quantiles": quantiles,
    "histogram": _histogram(counts, high=quantiles["0.999"]),
  }


def _quantiles(counts: collections.Counter[int]) -> dict[str, int]:
  rows, below = counts.total(), 0
  wanted, found = list(_QUANTILES), {}
  for length in sorted(counts):
    below += counts[length]
    while wanted and below >= wanted[0] * rows:
      found[f"{wanted.pop(0):g}"] = length
  return found


def _histogram(counts: collections.Counter[int], high: int) -> list[Any]:
  """Return up to `_BARS` bars, from the shortest row to `high` tokens."""
  width = 1
  while high // width - min(counts) // width >= _BARS:
    width *= 2
  bars: collections.Counter[int] = collections.Counter()
  for length, count in counts.items():
    bars[min(length, high) // width] += count
  found = [
    {"from": bar * width, "to": bar * width + width - 1, "rows": bars[bar]}
    for bar in range(min(bars), max(bars) + 1)
  ]
  found[-1]["to"] = max(found[-1]["to"], max(counts))
  return found


def _drawn(found: dict[str, Any] | None) -> list[str]:
  """Return a distribution of lengths as lines of text."""
  if found is None:
    return []
  at = found["quantiles"]
  said = [
    f"  tokens a row: {found['min']} to {found['max']}, half up to {at['0.5']},"
    f" 90 % up to {at['0.9']}, 99 % up to {at['0.99']}"
  ]
  most = max(bar["rows"] for bar in found["histogram"])
  for bar in found["histogram"]:
    if not bar["rows"]:
      continue
    length = -(-_BAR * bar["rows"] // most)
    span = f"{bar['from']}-{bar['to']}"
    said.append(f"  {span:>15} {'#' * length:<{_BAR}} {bar['rows']}")
  return said


def line(fault: check_rows.Fault, row: bool = True) -> str:
  """Return a fault as a line of `bad.jsonl`; `row`: not of a whole file."""
  at = rows.parse_name(fault.name) if row else None
  said = {
    "file": at.file if at else fault.name,
    "row": at.row if at else None,
    "name": fault.name,
    "id": fault.id,
    "kind": fault.kind,
    "why": fault.why,
    "remedy": KINDS[fault.kind].remedy,
    "drop": fault.drop,
  }
  # Escaped, since names of files and ids need not be text in UTF-8.
  return json.dumps(said) + "\n"


def summary(
  files: Sequence[Summary],
  *,
  settings: dict[str, Any],
  skipped: Mapping[str, str],
) -> dict[str, Any]:
  """Return the content of `check.json`.

  `skipped`: why the sources of a name were not looked at.
  """
  bad: collections.Counter[str] = collections.Counter()
  notes: collections.Counter[str] = collections.Counter()
  for file in files:
    bad.update(file.bad)
    notes.update(file.notes)
  return {
    "settings": settings,
    "rows": sum(file.rows for file in files),
    "bad_rows": sum(file.bad_rows for file in files),
    "unreadable_files": sum(file.unreadable for file in files),
    "bad": _in_order(bad),
    "notes": _in_order(notes),
    "not_looked_at": dict(skipped),
    "files": [file.as_json() for file in files],
  }


def _in_order(counts: collections.Counter[str]) -> dict[str, int]:
  return {kind: counts[kind] for kind in KINDS if counts[kind]}
