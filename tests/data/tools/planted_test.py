"""The planted faults are where they are said to be, and nowhere else.

Judged with json and PIL alone, by the words of `KINDS`.
"""

import collections
import json
import pathlib
import warnings

import pytest
from PIL import Image

from tests.fixtures import planted

MAX_PIXELS, MAX_TOKENS = 50_000_000, 2048
IMAGE_TOKENS = 729  # Of the largest encoder; no row may be near the limit.
TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
ASKS, ANSWERS = ("human", "user"), ("gpt", "assistant")
BROKEN = (OSError, SyntaxError)  # What PIL raises for files it cannot read.


@pytest.fixture(scope="module")
def planting(tmp_path_factory):
  folder = tmp_path_factory.mktemp("planted") / "set"
  return folder, planted.plant(folder)


def test_every_fault_is_in_its_place_and_the_rest_is_right(planting):
  folder, faults = planting
  expected = collections.defaultdict(set)
  for fault in faults:
    expected[fault.file, fault.row].add(fault.kind)
  found, rows = {}, collections.Counter()
  for path in folder.glob("*.json*"):
    for row, kinds in _judged(path, folder / planted.IMAGES):
      rows[path.name] += row is not None
      if kinds:
        found[path.name, row] = kinds
  assert found == expected
  assert all(len(kinds) == 1 for kinds in found.values())
  assert {kind for kinds in found.values() for kind in kinds} == {
    *planted.KINDS
  }
  faulty = collections.Counter(fault.file for fault in faults)
  for file, clean in planted.CLEAN.items():
    assert rows[file] == (planted.ROWS if clean else 0)
    assert clean == max(0, rows[file] - faulty[file])
  assert set(planted.CLEAN) == {path.name for path in folder.glob("*.json*")}


def test_each_kind_is_planted_more_than_once_and_only_once_a_row(planting):
  _, faults = planting
  counts = collections.Counter(fault.kind for fault in faults)
  assert min(counts.values()) >= 3
  assert len({(fault.file, fault.row) for fault in faults}) == len(faults)
  # The first rows tell a file's kind.
  assert all(fault.row is None or fault.row >= 3 for fault in faults)


def test_both_answers_of_a_pair_have_faults(planting):
  folder, faults = planting
  records, fields = _records(folder / "pairs.jsonl"), set()
  for fault in faults:
    if fault.file == "pairs.jsonl" and fault.kind in (
      "too_long",
      "empty_answer",
    ):
      texts = [records[fault.row][key] for key in ("chosen", "rejected")]
      fields |= {
        (fault.kind, key)
        for key, text in zip(("chosen", "rejected"), texts)
        if not text.strip() or len(text) > 8 * MAX_TOKENS
      }
  assert fields == {
    (kind, key)
    for kind in ("too_long", "empty_answer")
    for key in ("chosen", "rejected")
  }


def test_right_pictures_are_of_all_kinds(planting):
  folder, _ = planting
  modes, formats, rotated = set(), set(), 0
  for name in _right_images(*planting):
    with Image.open(folder / planted.IMAGES / name) as image:
      modes.add(image.mode)
      formats.add(image.format)
      rotated += image.getexif().get(0x0112) == 6
  assert modes >= {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"}
  assert formats == {"JPEG", "PNG", "GIF", "WEBP", "BMP"} and rotated


def test_files_have_the_odd_ends_that_are_right(planting):
  folder, _ = planting
  turns = (folder / "turns.jsonl").read_bytes()
  assert turns.startswith(b"\xef\xbb\xbf{") and turns.endswith(b"\r\n\r\n")
  assert turns.count(b"\r\n") == turns.count(b"\n") == planted.ROWS + 1
  for name in ("pairs.jsonl", "exam.jsonl"):
    data = (folder / name).read_bytes()
    assert data[-1:] != b"\n" and data.count(b"\n") == planted.ROWS - 1


def test_the_seed_alone_decides(planting, tmp_path):
  folder, faults = planting
  assert planted.plant(tmp_path / "again") == faults
  assert _contents(tmp_path / "again") == _contents(folder)
  others = planted.plant(tmp_path / "other", seed=1)
  assert others != faults and len(others) == len(faults)
  assert _contents(tmp_path / "other") != _contents(folder)


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
  files = [path for path in folder.rglob("*") if path.is_file()]
  return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def _right_images(folder, faults) -> set[str]:
  bad = {(fault.file, fault.row) for fault in faults}
  names = set()
  for path in folder.glob("*.json*"):
    for row, record in enumerate(_records(path)):
      if planted.CLEAN[path.name] and (path.name, row) not in bad:
        names |= set(_images(record))
  return names


def _records(path: pathlib.Path) -> list:
  """Return the records, or an error's kind in place of one."""
  data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
  if path.suffix == ".jsonl":
    return [_parsed(line) for line in data.rstrip(b"\r\n").split(b"\n")]
  records = _parsed(data)
  return records if isinstance(records, list) else [records]


def _parsed(data: bytes):
  try:
    return json.loads(data.decode("utf-8"))
  except UnicodeDecodeError:
    return Exception("bad_utf8")
  except (json.JSONDecodeError, RecursionError):
    return Exception("bad_json")


def _judged(path: pathlib.Path, images: pathlib.Path):
  """Yield (row, kinds) for each row, or one with row None for the file."""
  records, ids = _records(path), set()
  if len(records) == 1:
    wrong = isinstance(records[0], Exception)
    yield None, {str(records[0]) if wrong else "schema"}
    return
  for row, record in enumerate(records):
    if isinstance(record, Exception):
      yield row, {str(record)}
    elif _misshapen(record):
      yield row, {"schema"}
    else:
      again = record.get("id") in ids
      ids |= {record["id"]} if "id" in record else set()
      kinds = _text_kinds(record) | _image_kinds(record, images)
      yield row, kinds | ({"duplicate_id"} if again else set())


def _misshapen(record) -> bool:
  if not isinstance(record, dict):
    return True
  image = record.get("image") or []
  paths = image if isinstance(image, list) else [image]
  texts = [*paths, str(record["id"]) if _plain_id(record) else None]
  if "conversations" in record or not {"question"} & set(record):
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(type(t) is dict for t in turns):
      return True
    roles = [turn.get("from", turn.get("role")) for turn in turns]
    pairs = zip(roles[::2], roles[1::2])
    if not turns or len(roles) % 2:
      return True
    if not all(a in ASKS and b in ANSWERS for a, b in pairs):
      return True
    texts += [turn.get("value", turn.get("content")) for turn in turns]
  elif "chosen" in record or "rejected" in record:
    texts += [record.get(key) for key in ("question", "chosen", "rejected")]
  else:
    texts += [record.get(key) for key in ("question", "answer")]
  return not all(isinstance(text, str) for text in texts)


def _plain_id(record) -> bool:
  record.setdefault("id", f"none {id(record)}")
  return isinstance(record["id"], (str, int))


def _texts(record) -> tuple[list[str], list[str]]:
  """Return the questions and the answers."""
  if "conversations" in record:
    turns = record["conversations"]
    texts = [turn.get("value", turn.get("content")) for turn in turns]
    return texts[::2], texts[1::2]
  keys = ("chosen", "rejected", "answer")
  return [record["question"]], [record[key] for key in keys if key in record]


def _images(record) -> list[str]:
  image = record.get("image") or []
  return image if isinstance(image, list) else [image]


def _text_kinds(record) -> set[str]:
  asked, said = _texts(record)
  tags, images = "".join(asked).count("<image>"), len(_images(record))
  text = "".join([*asked, *said])
  # What a template may encode as one text: a pair's answers are apart.
  one = max(said, key=len) if "chosen" in record else "".join(said)
  # A token has a byte at least and, of random letters, never eight.
  is_long = len("".join([*asked, one])) > 8 * MAX_TOKENS
  most = len(text.encode("utf-8", "replace")) + images * IMAGE_TOKENS
  assert is_long or most < MAX_TOKENS - 100
  checks = {
    "placeholders": (tags != images and not (images == 1 and not tags))
    or any("<image>" in answer for answer in said),
    "empty_answer": any(not answer.strip() for answer in said),
    "equal_pair": "chosen" in record and len(set(said)) == 1,
    "special_token": any(token in text for token in TOKENS),
    "too_long": is_long,
    "lone_surrogate": any("\ud800" <= letter <= "\udfff" for letter in text),
  }
  return {kind for kind, found in checks.items() if found}


def _image_kinds(record, root: pathlib.Path) -> set[str]:
  return {kind for name in _images(record) if (kind := _judge(root, name))}


def _judge(root: pathlib.Path, name: str) -> str | None:
  path = root / name
  if "://" in name or not path.resolve().is_relative_to(root.resolve()):
    return "outside_root"
  if not path.is_file():
    return "missing_image"
  try:
    with warnings.catch_warnings(), Image.open(path) as image:
      warnings.simplefilter("error")
      if image.width * image.height > MAX_PIXELS:
        return "too_many_pixels"
      image.load()
  except Image.DecompressionBombError:
    return "too_many_pixels"
  except Image.DecompressionBombWarning:
    return "too_many_pixels"
  except BROKEN:
    return "undecodable_image"
  return None
