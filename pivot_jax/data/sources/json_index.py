"""Random access to the records of a JSON file of any size.

One pass finds where each record lies and whether an earlier one has its id.
Afterwards only three numbers a record are known, and those of a large file are
kept in a cache folder and memory-mapped, so that opening it again takes no
pass. A record is read from the file when it is asked for.

A file is UTF-8 (a byte order mark is accepted) and holds JSON objects, as one
list (`.json`) or one a line (`.jsonl`).
"""

import array
import codecs
import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import weakref
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import tqdm

from pivot_jax import files, output, texts
from pivot_jax.data.sources import records
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

# Files of at least so many bytes are indexed once and for all.
CACHED = 2**25
# A record or line may have as many bytes; a longer one is taken for a broken
# file. A file of as many flaws is one, too.
LONGEST = 2**26
FLAWS = 2**20
_BLOCK = 2**24
_VERSION = 2
_LARGEST_FLAWS = 2**28  # Bytes of a kept list of flaws.
_BLANK = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode


class Flaw(NamedTuple):
  """The index of what is not a valid record, and the reason."""

  index: int
  why: str


class File:
  """The records of one JSON file by their index.

  Attributes:
    flaws: records that are no JSON object or have an id that is none, and lines
      that are no JSON or no UTF-8; reading one of them raises.
  """

  def __init__(self, path: str | os.PathLike):
    """Open a file, and index it unless that has been done.

    Raises:
      InputError: no such file, or a list that is no valid JSON.
    """
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise InputError(f"{self.path}: no such file")
    self._lines = self.path.suffix == ".jsonl"
    self._table, self.flaws = _index(self.path)
    self._open()

  def _open(self) -> None:
    # Positioned reads share no state, so threads may use it at once.
    self._file = os.open(self.path, os.O_RDONLY)
    weakref.finalize(self, os.close, self._file)

  def __getstate__(self) -> dict[str, Any]:
    state = {k: v for k, v in self.__dict__.items() if k != "_file"}
    # A mapped index would be written out and held by every process.
    if isinstance(self._table, np.memmap):
      state["_table"] = self._table.filename
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    if not isinstance(self._table, np.ndarray):
      self._table = np.load(self._table, mmap_mode="r")
    self._open()

  def __len__(self) -> int:
    return self._table.shape[1]

  def name(self, index: int) -> str:
    """Return `file:line` of a line, `file#index` of a list's record."""
    if self._lines:
      return f"{self.path}:{index + 1}"
    return f"{self.path}#{index}"

  def record(self, index: int) -> records.Record:
    """Return a record; its error names no row."""
    return records.parse(self._bytes(index))

  def given_id(self, index: int) -> str:
    """Return the id that a record has, or is called by without one."""
    return records.given_id(self.record(index), self._default_id(index))

  def id(self, record: records.Record, index: int) -> str:
    """Return the id of the record at an index, `#2` after a second use."""
    given = records.given_id(record, self._default_id(index))
    use = int(self._table[2, index])
    return f"{given}#{use}" if use else given

  def again(self) -> np.ndarray:
    """Return the indices of the records whose id an earlier one has."""
    return np.flatnonzero(self._table[2])

  def _default_id(self, index: int) -> str:
    return f"{self.path.stem}-{index}"

  def _bytes(self, index: int) -> bytes:
    begin, end = map(int, self._table[:2, index])
    parts = []
    while begin < end:
      part = os.pread(self._file, end - begin, begin)
      if not part:
        raise InputError("the file was cut while it was being read")
      parts.append(part)
      begin += len(part)
    return b"".join(parts)


def _index(path: pathlib.Path) -> tuple[np.ndarray, tuple[Flaw, ...]]:
  """Return int64 [3, N], begin, end and use of each id, and the flaws.

  A kept index that is not sound is made again.
  """
  size = path.stat().st_size
  if size < CACHED:
    return _build(path, size)
  cached = _cache(path)
  if os.path.lexists(cached):
    try:
      return _kept(cached, path, size)
    # Whatever the file holds, numpy and the checks raise one of these.
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
      LOG.warning(
        "%s: the kept index is not sound and made again (%s)", cached, error
      )
  table, flaws = _build(path, size)
  if not files.writes:
    return table, flaws
  said = {"crc": _crc(table, flaws), "flaws": flaws}
  with keeping(cached) as file:
    files.write_text(cached.with_suffix(".json"), json.dumps(said))
    np.save(file, table)
  return np.load(cached, mmap_mode="r"), flaws


def _kept(
  cached: pathlib.Path, path: pathlib.Path, size: int
) -> tuple[np.ndarray, tuple[Flaw, ...]]:
  """Return what `_index` does from its cache; raise if that is not sound."""
  beside = cached.with_suffix(".json")
  said = files.read_object(beside, largest=_LARGEST_FLAWS)
  flaws = tuple(Flaw(*one) for one in said["flaws"])
  if not cached.is_file():
    raise ValueError("no regular file")
  # Not `np.load`, which opens archives as well.
  table = np.lib.format.open_memmap(cached, mode="r")
  if table.dtype != np.int64 or table.ndim != 2 or len(table) != 3:
    raise ValueError(f"a table of {table.dtype}, {table.shape}")
  _check_places(table, path, size)
  if _crc(table, flaws) != said["crc"]:
    raise ValueError("another CRC")
  # Mapped anew, so that no page of what was looked at counts as held.
  return np.load(cached, mmap_mode="r"), flaws


def _check_places(table: np.ndarray, path: pathlib.Path, size: int) -> None:
  """Raise unless records lie in order and cover the file to its end."""
  begins, ends = table[:2]
  lines = path.suffix == ".jsonl"
  first, last = (int(begins[0]), int(ends[-1])) if len(begins) else (0, 0)
  gaps = begins[1:] - ends[:-1]
  ordered = first >= 0 and last <= size and (table[2] >= 0).all()
  if not ordered or not (begins < ends).all() or (gaps < (not lines)).any():
    raise ValueError("places that are no order of the file")
  if lines and (first or gaps.any()):
    raise ValueError("lines that are left out")
  around = ("[", "]") if len(begins) else ("", "[]")
  if lines:
    around = ("", "")
  for begin, end, expected in zip((0, last), (first, size), around):
    if _unblank(path, begin, end) != expected.encode():
      raise ValueError("records that are left out")


def _unblank(path: pathlib.Path, begin: int, end: int) -> bytes:
  """Return the first bytes of a part of a file that are not blank."""
  found = b""
  with path.open("rb") as file:
    file.seek(begin)
    while begin < end and len(found) < 9:
      data = file.read(min(_BLOCK, end - begin))
      if not data:
        break
      if not begin:
        data = data.removeprefix(codecs.BOM_UTF8)
      begin = file.tell()
      found += b"".join(data.split())[:9]
  return found


def _crc(table: np.ndarray, flaws: tuple[Flaw, ...]) -> int:
  crc = zlib.crc32(np.ascontiguousarray(table).data)
  return zlib.crc32(json.dumps(flaws).encode(), crc)


def cache_folder() -> pathlib.Path:
  """Return where indices are kept: $PIVOT_JAX_CACHE or ~/.cache/pivot_jax."""
  given = os.environ.get("PIVOT_JAX_CACHE")
  home = pathlib.Path.home() / ".cache" / "pivot_jax"
  return pathlib.Path(given) if given else home


@contextlib.contextmanager
def keeping(place: pathlib.Path) -> Iterator[BinaryIO]:
  """Give a file to write, which becomes one of the cache when it is done."""
  try:
    place.parent.mkdir(parents=True, exist_ok=True)
    with files.writing(place) as aside, aside.open("wb") as file:
      yield file
  except OSError as error:
    raise InputError(
      f"{place}: cannot be written ({error}); set PIVOT_JAX_CACHE to another"
      " folder"
    ) from error


def stamp(path: pathlib.Path) -> str:
  """Return a digest of a file's content: size, time, and CRC of its ends."""
  state = path.stat()
  with path.open("rb") as file:
    crc = zlib.crc32(file.read(2**16))
    file.seek(max(0, state.st_size - 2**16))
    crc = zlib.crc32(file.read(), crc)
  return f"{state.st_size}-{state.st_mtime_ns}-{crc:08x}"


def _cache(path: pathlib.Path) -> pathlib.Path:
  place = zlib.crc32(str(path.resolve()).encode())
  name = f"{path.stem[:40]}-{place:08x}-{stamp(path)}-v{_VERSION}.npy"
  return cache_folder() / "index" / name


class _Found(NamedTuple):
  """A record, or a line without one and why."""

  begin: int
  end: int
  record: Any
  why: str = ""


def _build(path: pathlib.Path, size: int):
  """Read a file through; return what `_index` does."""
  places, hashes = array.array("q"), array.array("q")
  flaws = []
  scan = _lines if path.suffix == ".jsonl" else _list
  bar = tqdm.tqdm(
    total=size,
    desc=output.label("indexing", path.name),
    unit="B",
    unit_scale=True,
    disable=None if size >= CACHED else True,
  )
  with bar:
    for index, one in enumerate(scan(path)):
      places.extend((one.begin, one.end))
      name = default = f"{path.stem}-{index}"
      why = one.why
      if not why:
        try:
          name = records.given_id(records.as_object(one.record), default)
        except InputError as error:
          why = str(error)
      hashes.append(hash(name))
      if why:
        flaws.append(Flaw(index, texts.shown(why)))
        if len(flaws) > FLAWS:
          raise InputError(
            f"{path}: more than {FLAWS} of its lines or elements are no"
            f" records, the first is {flaws[0].index + 1}: {flaws[0].why}",
            kind="schema",
          )
      if not index % 4096:
        bar.update(one.end - bar.n)
    bar.update(size - bar.n)
  table = np.zeros((3, len(hashes)), np.int64)
  table[:2] = np.frombuffer(places, np.int64).reshape(-1, 2).T
  _number(path, table, np.frombuffer(hashes, np.int64))
  return table, tuple(flaws)


def _number(path, table, hashes) -> None:
  """Write which use of its id each record is: 0 for the first, then 2, ..."""
  order = np.argsort(hashes, kind="stable")
  ordered = hashes[order]
  edges = np.flatnonzero(np.diff(ordered)) + 1
  bounds = np.r_[0, edges, len(ordered)]
  with path.open("rb") as file:
    for group in np.flatnonzero(np.diff(bounds) > 1):
      uses: dict[str, int] = {}
      for index in order[bounds[group] : bounds[group + 1]].tolist():
        # Other ids may have one hash, so that each is looked at.
        begin, end = map(int, table[:2, index])
        file.seek(begin)
        try:
          record = records.parse(file.read(end - begin))
          name = records.given_id(record, f"{path.stem}-{index}")
        except InputError:
          continue
        if name not in uses:
          uses[name] = 1
          continue
        uses[name] += 1
        while _holds(ordered, hash(f"{name}#{uses[name]}")):
          uses[name] += 1
        table[2, index] = uses[name]


def _holds(ordered: np.ndarray, value: int) -> bool:
  place = int(np.searchsorted(ordered, value))
  return place < len(ordered) and int(ordered[place]) == value


def _lines(path: pathlib.Path) -> Iterator[_Found]:
  """Find lines; blank ones at the end do not count."""
  blank: list[_Found] = []
  begin = index = 0
  with path.open("rb") as file:
    # A hole in a file is a line of any length.
    for line in iter(functools.partial(file.readline, LONGEST + 1), b""):
      index += 1
      end = begin + len(line)
      if len(line) > LONGEST:
        raise InputError(
          f"{path}:{index}: the line has more than {LONGEST} bytes",
          kind="bad_json",
        )
      if not line.removeprefix(codecs.BOM_UTF8).strip():
        # More of them are flaws of too many lines, or stand at the end.
        if len(blank) <= FLAWS:
          blank.append(_Found(begin, end, None, "the line is blank; remove it"))
      else:
        yield from blank
        blank = []
        try:
          yield _Found(begin, end, records.parse(line))
        except InputError as error:
          yield _Found(begin, end, None, str(error))
      begin = end


def _list(path: pathlib.Path) -> Iterator[_Found]:
  """Find the elements of a list, a block of the file at a time."""
  text = _Text(path)
  with text.file:
    text.expect("[", "must be a JSON list; name a file of JSON lines .jsonl")
    if text.peek() == "]":
      text.expect("]", "")
    else:
      while True:
        yield text.element()
        if text.peek() != ",":
          break
        text.expect(",", "")
      text.expect("]", "must be a JSON list; expected ',' or ']'")
    if text.peek():
      text.fail("has text after the end of its list")


class _Text:
  """The bytes of a file as characters, one for each, with a place in them.

  Where records begin and end shows in the ASCII characters alone, so a byte
  stands for itself here; that the bytes are UTF-8 is checked beside.
  """

  def __init__(self, path: pathlib.Path):
    self.file = path.open("rb")
    self._path, self._text, self._at = path, "", 0
    self._before = 0  # Bytes of the file before the text.
    self._newlines = 0  # In those.
    self._utf8 = codecs.getincrementaldecoder("utf-8")()
    if self.file.read(3) != codecs.BOM_UTF8:
      self.file.seek(0)
    else:
      self._before = 3

  def peek(self) -> str:
    """Return the next character that is not blank, "" at the end."""
    while True:
      blank = _BLANK.match(self._text, self._at)
      assert blank  # No character is a match, too.
      self._at = blank.end()
      if self._at < len(self._text):
        return self._text[self._at]
      if not self._read():
        return ""

  def expect(self, character: str, otherwise: str) -> None:
    """Pass over a character."""
    if self.peek() != character:
      self.fail(otherwise)
    self._at += 1

  def element(self) -> _Found:
    """Pass over a JSON value."""
    self.peek()
    while True:
      try:
        record, end = _decode(self._text, self._at)
      except (ValueError, RecursionError) as error:
        if len(self._text) - self._at < LONGEST and self._read():
          continue
        self._fail_at(error)
      # A number may go on in the next block; a record ends with its brace.
      if end == len(self._text) and self._read():
        continue
      break
    begin, self._at = self._at, end
    if end - begin > LONGEST:
      self.fail(f"the record has more than {LONGEST} bytes", begin)
    found = _Found(self._before + begin, self._before + end, record)
    if isinstance(record, dict) and not str(record.get("id", "")).isascii():
      data = self._text[begin:end].encode("latin-1")
      return found._replace(record=records.parse(data))
    return found

  def fail(
    self, why: str, at: int | None = None, kind: str = "bad_json"
  ) -> NoReturn:
    """Raise an InputError that names the line."""
    at = self._at if at is None else at
    line = self._newlines + self._text.count("\n", 0, at) + 1
    raise InputError(f"{self._path}:{line}: {why}", kind=kind)

  def _fail_at(self, error: Exception) -> NoReturn:
    if not isinstance(error, json.JSONDecodeError):
      self.fail(f"JSON that cannot be read: {error}")
    column = error.pos - self._text.rfind("\n", 0, error.pos)
    self.fail(f"invalid JSON at column {column}: {error.msg}", error.pos)

  def _read(self) -> bool:
    """Take another block of the file; return whether there was one."""
    data = self.file.read(_BLOCK)
    self._newlines += self._text.count("\n", 0, self._at)
    self._before += self._at
    kept = self._text[self._at :]
    self._text, self._at = kept + data.decode("latin-1"), 0
    try:
      self._utf8.decode(data, final=not data)
    except UnicodeDecodeError as error:
      at = max(0, len(kept) + error.start)
      byte = at - self._text.rfind("\n", 0, at)
      self.fail(f"invalid UTF-8 at byte {byte} of the line", at, "bad_utf8")
    return bool(data)
