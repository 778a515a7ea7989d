"""Pictures, rows and commands for tests of the checker."""

import json
import pathlib
import struct
import zlib

from PIL import Image

from pivot_jax.data.tools import check as command
from pivot_jax.data.tools import faults

PAIR = {
  "id": "p",
  "image": "a.png",
  "question": "<image>\nhow many",
  "chosen": "one",
  "rejected": "two",
}
TALK = [
  {"from": "human", "value": "<image>\nhow many"},
  {"from": "gpt", "value": "one"},
]
TWO = ["a.png", "b.jpg"]
TWO_ASKED = "<image><image> which"


def pictures(tmp_path: pathlib.Path) -> pathlib.Path:
  """Return a folder of pictures, good and bad."""
  root = tmp_path / "images"
  (root / "inside").mkdir(parents=True)
  Image.new("RGB", (6, 4)).save(root / "a.png")
  picture = Image.effect_noise((50, 40), 60)
  picture.save(root / "b.jpg")
  cut = (root / "b.jpg").read_bytes()[:400]
  (root / "cut.jpg").write_bytes(cut)
  (root / "empty.png").write_bytes(b"")
  (root / "page.png").write_text("<html></html>")
  (root / "large.png").write_bytes(png(10_000, 10_000, b"\0" * 10))
  (root / "header.png").write_bytes(png(10_000, 10_000, None))
  Image.new("RGB", (6, 4)).save(tmp_path / "out.png")
  (root / "link.png").symlink_to(tmp_path / "out.png")
  return tmp_path


def png(width: int, height: int, pixels: bytes | None) -> bytes:
  """Return a PNG that says so large a size; `pixels` None: its header alone."""

  def chunk(name, data):
    crc = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + crc

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  found = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
  if pixels is None:
    return found
  return found + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def lines(path: pathlib.Path, rows) -> pathlib.Path:
  """Write rows as JSON lines; return the path."""
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def check(folder: pathlib.Path, *paths, options=()) -> int:
  """Run the command on files, in `out`; return its status."""
  given = [f"--images={folder / 'images'}", "--tokenizer=package:toy"]
  names = [str(path) for path in paths]
  return command.main([*names, *given, f"--out={folder / 'out'}", *options])


def bad(folder: pathlib.Path) -> list[dict]:
  """Return the faults that were written."""
  text = (folder / "out" / "bad.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def report(folder: pathlib.Path) -> dict:
  """Return the summary that was written."""
  return json.loads((folder / "out" / "check.json").read_text())


def kinds(folder: pathlib.Path, rows, *, options=()) -> list[str | None]:
  """Return the kind of fault of each row, None of a good one."""
  path = lines(folder / "rows.jsonl", rows)
  check(folder, path, options=options)
  found: list[str | None] = [None] * len(rows)
  for fault in bad(folder):
    assert fault["file"] == str(path)
    assert fault["name"] == f"{path}:{fault['row'] + 1}"
    assert fault["remedy"] == faults.KINDS[fault["kind"]].remedy
    assert found[fault["row"]] is None
    found[fault["row"]] = fault["kind"]
  return found
