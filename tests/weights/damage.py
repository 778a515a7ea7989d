"""Damage to the folders that Orbax writes."""

import pathlib

import pytest

# Orbax leaves its other reads unawaited where one of them fails.
BROKEN_READ = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


def data_file(folder: pathlib.Path) -> pathlib.Path:
  files = [path for path in folder.rglob("*") if path.is_file()]
  inside = [path for path in files if path.parent.name == "d"]
  return max(inside, key=lambda path: path.stat().st_size)


def flip(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0xFF
  path.write_bytes(content)
