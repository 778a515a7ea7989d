"""Mixtures of LLaVA files, as LLaVA-OneVision writes them down in YAML.

  datasets:
  - json_path: OneVisionData/sroie/sroie_data_33626.json
    sampling_strategy: first:10%    # all, first:N, end:N, random:N; N or p%
    expected: 33626                 # rows of the file, if known (ours)
    epochs: 2                       # how often its rows come (ours)

A `Mixture` is one source: the chosen rows of each file, one file after the
other. Of the rows only their numbers are held.
"""

import bisect
import fractions
import logging
import math
import os
import pathlib
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pivot_jax import files, texts
from pivot_jax.data import images, rows
from pivot_jax.data.sources import json_records, records
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

_KEYS = {"json_path", "sampling_strategy", "expected", "epochs", "weight"}
# Python reads no number of 5,000 digits.
_STRATEGY = re.compile(
  r"(first|end|random):([0-9]{1,15}|[0-9]{1,15}(?:\.[0-9]{1,15})?%)"
)
LARGEST = 2**20  # Bytes of a mixture's file.
EPOCHS = 1000  # Times that the rows of an entry may come.


class Entry(NamedTuple):
  """One file of a mixture.

  Attributes:
    expected: the rows that the file is known to have, None if that is not.
    epochs: how often each chosen row comes.
    weight: the share of the mixture, relative to the other entries'.
  """

  json_path: str
  strategy: str = "all"
  expected: int | None = None
  epochs: int = 1
  weight: float | None = None

  @property
  def name(self) -> str:
    """The file's name without its suffix, which opens the ids of its rows."""
    return pathlib.PurePosixPath(self.json_path).stem

  def count(self, rows: int) -> int:
    """Return how many rows of that many are chosen, p% being rounded up."""
    if self.strategy == "all":
      return rows
    number = self.strategy.partition(":")[2]
    if number.endswith("%"):
      return math.ceil(fractions.Fraction(number[:-1]) * rows / 100)
    return int(number)


class Line(NamedTuple):
  """A line of `describe`: rows of the file, and rows of the mixture from it."""

  name: str
  rows: int
  taken: int
  expected: int | None

  def __str__(self) -> str:
    expected = "" if self.expected is None else f", {self.expected} expected"
    return f"{self.name}: {self.taken} rows of {self.rows}{expected}"


def read(path: str | os.PathLike) -> tuple[Entry, ...]:
  """Return the entries of a mixture's YAML file; open none of their files.

  Raises:
    InputError: no such file, no YAML, or an entry that is none.
  """
  path = pathlib.Path(path)
  file = files.input_path(path)
  if not os.path.lexists(file):
    raise InputError(f"{path}: no such file")
  found = _yaml(file)
  listed = found.get("datasets") if isinstance(found, dict) else None
  if not isinstance(listed, list) or not listed:
    raise InputError(f"{path}: datasets: must be a list of entries")
  entries = tuple(
    _entry(one, f"{path}: datasets[{index}]")
    for index, one in enumerate(listed)
  )
  weighted = [entry.weight is not None for entry in entries]
  if any(weighted) and not all(weighted):
    lacking = entries[weighted.index(False)].json_path
    raise InputError(f"{path}: {lacking}: weight: give all entries one or none")
  return entries


class Mixture(rows.Derived):
  """The conversations of a mixture as one source.

  Ids are FILE/ID after the file's name without suffix; where that name is used
  again, by further epochs or another entry, FILE#2/ID and so on.
  """

  kind = "conversation"

  def __init__(
    self,
    path: str | os.PathLike,
    root: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    image_spec: images.ImageSpec = images.AS_THEY_ARE,
    *,
    seed: int = 0,
    strict: bool = True,
    flawed: bool = False,
  ):
    """Open the files of a mixture; indexes those never seen before.

    Args:
      root: the folder that each `json_path` is relative to; the YAML file's own
        if None.
      image_root: the folder that all images are relative to; `root` if None.
      seed: of `random:N` and of the parts of epochs that weights ask for.
      strict: whether another number of rows than expected is an error, or a
        line in the log.
      flawed: lines that are no records are an error only when they are read.

    Raises:
      InputError: all files that are not there, or all of another length; or
        a seed under 0.
    """
    self.path = pathlib.Path(path)
    if seed < 0:
      raise InputError(f"{self.path}: seed={seed}: give 0 or more")
    self.entries = read(self.path)
    if root is None and str(self.path).startswith(files.RECIPES):
      raise InputError(f"{self.path}: give root, the folder of its files")
    root = self.path.parent if root is None else pathlib.Path(root)
    _check_there(self.path, root, self.entries)
    self._files = [
      json_records.LlavaJson(
        root / entry.json_path,
        root if image_root is None else image_root,
        image_spec,
        flawed=flawed,
      )
      for entry in self.entries
    ]
    _check_lengths(self.path, root, self.entries, self._files, strict=strict)
    self._parts = _parts(self.path, self.entries, self._files, seed)
    self._ends = np.cumsum([len(part) for part in self._parts]).tolist()

  def __len__(self) -> int:
    return self._ends[-1]

  def at(self, index: int) -> tuple[rows.Source, int]:
    """Return the part that holds a row, and the row's index there."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    place = bisect.bisect_right(self._ends, index)
    part = self._parts[place]
    return part, index - self._ends[place] + len(part)

  @property
  def paths(self) -> list[pathlib.Path]:
    """The files that hold the rows, in the order of the entries."""
    return [file.path for file in self._files]

  def stamp(self) -> str:
    """Return the files' stamps with a CRC32 of the rows taken of them."""
    crc = 0
    for part in self._parts:
      crc = zlib.crc32(f"{part.entry} {part.title}".encode(), crc)
      crc = zlib.crc32(np.asarray(part.indices, np.int64).tobytes(), crc)
    return " ".join([*(file.stamp() for file in self._files), f"{crc:08x}"])

  def taken(self, entry: int) -> int:
    """Return how many rows of the mixture come from an entry."""
    return sum(len(part) for part in self._parts if part.entry == entry)

  def available(self, entry: int) -> int:
    """Return how many rows the file of an entry has."""
    return len(self._files[entry])


def describe(mixture: Mixture) -> tuple[Line, ...]:
  """Return what a mixture takes of each of its files."""
  return tuple(
    Line(entry.name, mixture.available(i), mixture.taken(i), entry.expected)
    for i, entry in enumerate(mixture.entries)
  )


def log(mixture: Mixture) -> None:
  """Log the rows that a mixture takes of each of several files."""
  if len(mixture.entries) > 1:
    for line in describe(mixture):
      LOG.info("%s: %s", mixture.path, line)


class _Part(rows.View):
  """Rows of one file that come one after the other, their ids prefixed.

  Attributes:
    entry: the number of the file's entry.
    title: the prefix of the ids.
  """

  def __init__(
    self, source: rows.Source, numbers: np.ndarray, *, entry: int, title: str
  ):
    super().__init__(source, numbers)
    self.entry, self.title = entry, title

  def __getitem__(self, index: int) -> rows.Row:
    return self._titled(super().__getitem__(index))

  def text(self, index: int) -> rows.Row:
    return self._titled(super().text(index))

  def _titled(self, row: rows.Row) -> rows.Row:
    return row | {"id": f"{self.title}/{row['id']}"}


def _yaml(path: pathlib.Path) -> Any:
  """Return the content of a YAML file whose aliases are texts or numbers."""
  # Only where a mixture is read: sources of other formats do without.
  import yaml

  class Loader(yaml.SafeLoader):
    def compose_node(self, parent, index):
      alias = self.check_event(yaml.AliasEvent)
      node = super().compose_node(parent, index)
      # Of lists of aliases of lists, 1 kB spells out 10^9 elements.
      if alias and node and not isinstance(node, yaml.ScalarNode):
        line = node.start_mark.line + 1
        raise yaml.YAMLError(
          f"an alias of the list or mapping of line {line}; write it out"
        )
      return node

  data = files.read_bytes(path, largest=LARGEST)
  try:
    return yaml.load(data, Loader)
  # The last four are PyYAML's for a tag that does not fit its text (!!int "").
  except (
    yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError,
    TypeError, OverflowError,
  ) as error:  # fmt: skip
    said = " ".join(str(error).split()) or type(error).__name__
    raise InputError(f"{path}: not valid YAML: {said}") from None


def _entry(found: Any, where: str) -> Entry:
  """Return a checked entry of the YAML file."""
  if not isinstance(found, Mapping) or "json_path" not in found:
    raise InputError(f"{where}: must have the key json_path")
  unknown = sorted(map(str, set(found) - _KEYS))
  if unknown:
    raise InputError(
      f"{where}: {unknown[0]}: unknown; keys are {sorted(_KEYS)}"
    )
  with records.located(where):
    path = records.text(found, "json_path")
  if not path.endswith((".json", ".jsonl")):
    raise InputError(f"{where}: json_path: must name a .json or .jsonl file")
  strategy = found.get("sampling_strategy", "all")
  known = isinstance(strategy, str) and _STRATEGY.fullmatch(strategy)
  if strategy != "all" and not known:
    raise InputError(
      f"{where}: sampling_strategy: {_shown(strategy)} is none of all, first:N,"
      " end:N, random:N, where N is a number or p%"
    )
  _check_number(found, "expected", where, of=int)
  _check_number(found, "epochs", where, of=int, most=EPOCHS)
  _check_number(found, "weight", where, of=(int, float))
  if "epochs" in found and "weight" in found:
    raise InputError(f"{where}: give epochs or weight, not both")
  return Entry(
    path,
    strategy,
    found.get("expected"),
    found.get("epochs", 1),
    found.get("weight"),
  )


def _check_number(
  found: Mapping[str, Any],
  key: str,
  where: str,
  *,
  of: type | tuple[type, ...],
  most: int = 2**63 - 1,
) -> None:
  if key not in found:
    return
  value = found[key]
  number = isinstance(value, of) and not isinstance(value, bool)
  if not number or not 0 < value <= most:
    raise InputError(
      f"{where}: {key}: {_shown(value)} is no number over 0 and up to {most}"
    )


def _shown(value: Any) -> str:
  return texts.shown(repr(value), longest=80)


def _check_there(
  path: pathlib.Path, root: pathlib.Path, entries: Sequence[Entry]
) -> None:
  """Raise unless the entries are files, all links followed, below `root`."""
  missing = [e for e in entries if not os.path.isfile(root / e.json_path)]
  if missing:
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    first = ", ".join(entry.json_path for entry in missing[:3])
    raise InputError(
      f"{path}: {len(missing)} of {len(entries)} files are not in {root}:"
      f" {first}{more}"
    )
  for entry in entries:
    if not files.is_inside(root / entry.json_path, root):
      raise InputError(
        f"{path}: json_path: {entry.json_path} is not below {root}; move the"
        " file there, or name a folder that holds it as `root` of the source"
        " (--root of `data convert`)"
      )


def _check_lengths(
  path: pathlib.Path,
  root: pathlib.Path,
  entries: Sequence[Entry],
  files: Sequence[rows.Source],
  *,
  strict: bool,
) -> None:
  wrong = [
    f"{root / entry.json_path}: {len(file)} rows, expected {entry.expected}"
    for entry, file in zip(entries, files)
    if entry.expected not in (None, len(file))
  ]
  if wrong and strict:
    more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    raise InputError(
      f"{path}: {'; '.join(wrong[:5])}{more}: mend `expected`, or set"
      " strict=False to go on"
    )
  for one in wrong:
    LOG.warning("%s", one)


def _parts(
  path: pathlib.Path,
  entries: Sequence[Entry],
  files: Sequence[rows.Source],
  seed: int,
) -> list[_Part]:
  """Return the rows of every epoch of every entry, in the mixture's order."""
  rngs = [_rng(seed, entry, i) for i, entry in enumerate(entries)]
  chosen = [
    _choose(path, entry, len(file), rng)
    for entry, file, rng in zip(entries, files, rngs)
  ]
  parts, uses = [], {}
  for i, total in enumerate(_totals(path, entries, chosen)):
    if total > EPOCHS * len(chosen[i]):
      raise InputError(
        f"{path}: {entries[i].json_path}: weight: {len(chosen[i])} rows would"
        f" come more than {EPOCHS} times; lower it"
      )
    for first in range(0, total, max(1, len(chosen[i]))):
      numbers = chosen[i]
      if total - first < len(numbers):
        numbers = _some(numbers, total - first, rngs[i])
      title = _unused(uses, entries[i].name)
      parts.append(_Part(files[i], numbers, entry=i, title=title))
  if not parts:
    raise InputError(f"{path}: the mixture is empty")
  return parts


def _choose(
  path: pathlib.Path, entry: Entry, size: int, rng: np.random.Generator
) -> np.ndarray:
  """Return the rows that an entry's strategy takes of a file, in its order."""
  count = entry.count(size)
  if count > size:
    raise InputError(
      f"{path}: {entry.json_path}: {entry.strategy} of {size} rows cannot be"
    )
  every = np.arange(size, dtype=np.int32)
  if entry.strategy.startswith("random"):
    return _some(every, count, rng)
  if entry.strategy.startswith("end"):
    return every[size - count :]
  return every[:count]


def _some(
  numbers: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
  return np.sort(rng.choice(numbers, count, replace=False))


def _totals(
  path: pathlib.Path, entries: Sequence[Entry], chosen: Sequence[np.ndarray]
) -> list[int]:
  """Return how many rows each entry gives, epochs or weights counted in.

  With weights the mixture is as long as without, and shared out by weight;
  of what is left over by rounding, entries in front get one row more.
  """
  lengths = [len(numbers) for numbers in chosen]
  if entries[0].weight is None:
    return [e.epochs * length for e, length in zip(entries, lengths)]
  if 0 in lengths:
    empty = entries[lengths.index(0)].json_path
    raise InputError(f"{path}: {empty}: has a weight and no rows")
  weights = [fractions.Fraction(entry.weight or 0) for entry in entries]
  share = fractions.Fraction(sum(lengths)) / sum(weights)
  totals = [math.floor(weight * share) for weight in weights]
  for i in range(sum(lengths) - sum(totals)):
    totals[i] += 1
  return totals


def _rng(seed: int, entry: Entry, place: int) -> np.random.Generator:
  return np.random.default_rng([seed, zlib.crc32(entry.name.encode()), place])


def _unused(uses: dict[str, int], name: str) -> str:
  """Return `name`, `name#2` and so on, none of them twice."""
  number = uses.get(name, 0) + 1
  numbered = name
  while number > 1 and (numbered := f"{name}#{number}") in uses:
    number += 1
  uses[name] = number
  uses.setdefault(numbered, 1)
  return numbered
