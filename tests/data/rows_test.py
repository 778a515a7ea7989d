"""Views of sources are indices, and names of rows are read back."""

import zlib

import numpy as np
import pytest

from pivot_jax.data import opener, rows
from pivot_jax.data.scenes import scenes


class _Stamped(scenes.Scenes):
  def stamp(self) -> str:
    return "inner"


def test_a_view_gives_the_rows_of_its_indices():
  source = scenes.Scenes(task="classify", size=5)
  view = rows.View(source, [3, 1])
  assert isinstance(view, rows.Source) and isinstance(source, rows.Source)
  assert len(view) == 2 and view.kind == "classify"
  for index, own in enumerate((3, 1)):
    assert view.name(index) == source.name(own)
    assert view.text(index) == source.text(own)
    assert view.encoded(index) == source.encoded(own)
    np.testing.assert_equal(view[index], source[own])
  for index in (-1, 2):
    with pytest.raises(IndexError):
      view.text(index)


def test_a_stamp_of_a_view_tells_which_rows_it_has():
  source = _Stamped(task="classify", size=5)
  crc = zlib.crc32(np.array([0, 2], np.int64).tobytes())
  for indices in ([0, 2], range(0, 4, 2), np.array([0, 2], np.int32)):
    assert rows.View(source, indices).stamp() == f"inner {crc:08x}"
  assert rows.View(scenes.Scenes(task="classify", size=5), [0]).stamp() == ""


def test_a_view_of_texts_has_no_images():
  view = opener.TextOnly(scenes.Scenes(task="chat", size=2))
  assert view[0] == view.text(0) and view[0]["image"] is None
  assert view.encoded(1) == ()


@pytest.mark.parametrize("name, place", [
  ("a/b.jsonl:7", ("a/b.jsonl", 6)),
  ("a/b.json#7", ("a/b.json", 7)),
  ("a:1/b.parquet:7", ("a:1/b.parquet", 7)),
])  # fmt: skip
def test_the_name_of_a_row_tells_its_file_and_place(name, place):
  assert rows.parse_name(name) == place


def test_the_name_of_a_scene_is_no_place():
  with pytest.raises(ValueError, match="scenes/chat"):
    rows.parse_name("scenes/chat/train/0/3")
