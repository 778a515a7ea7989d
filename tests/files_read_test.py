"""Foreign JSON files are read whole and finite, or refused by name."""

import json
import os

import pytest

from pivot_jax import files, texts
from pivot_jax.errors import InputError


@pytest.mark.parametrize(
  "content, why",
  [
    ('{"a": NaN}', "NaN"),
    ('{"a": -Infinity}', "Infinity"),
    ('{"a": 1e999}', "beyond float64"),
    ("[" * 200_000, "nested too deeply"),
    ('{"a": ' + "9" * 5000 + "}", "digits"),
    ("{", "not readable as JSON"),
  ],
)
def test_numbers_and_depth_are_bounded(tmp_path, content, why):
  path = tmp_path / "config.json"
  path.write_text(content)
  with pytest.raises(InputError, match=f"config.json.*{why}"):
    files.read_json(path)


def test_a_pipe_a_device_and_a_hole_are_refused(tmp_path):
  pipe, device, hole = (tmp_path / n for n in ("pipe", "device", "hole"))
  os.mkfifo(pipe)
  device.symlink_to("/dev/zero")
  with hole.open("wb") as file:
    file.truncate(20 * 2**30)
  for path, why in (
    (pipe, "no regular file"),
    (device, "no regular file"),
    (hole, "more than"),
    (tmp_path, "no regular file|directory"),
    (tmp_path / "absent", "No such file"),
  ):
    with pytest.raises(InputError, match=why):
      files.read_json(path)


def test_a_link_to_a_file_is_read(tmp_path):
  (tmp_path / "blob").write_text(json.dumps({"a": 1.5}))
  (tmp_path / "config.json").symlink_to("blob")
  assert files.read_object(tmp_path / "config.json") == {"a": 1.5}


def test_a_list_is_no_object(tmp_path):
  (tmp_path / "list.json").write_text("[]")
  with pytest.raises(InputError, match="no JSON object"):
    files.read_object(tmp_path / "list.json")


@pytest.mark.parametrize(
  "text, line",
  [
    ("\x1b[2Jred\r\n", "\\x1b[2Jred\\r\\n"),
    ("a\u202eb\u2028", "a\\u202eb\\u2028"),
    ("\ud800", "\\ud800"),
    ("Größe 東京", "Größe 東京"),
  ],
)
def test_shown_spells_what_a_terminal_obeys(text, line):
  assert texts.shown(text) == line


def test_shown_cuts_the_middle_of_a_long_text():
  line = texts.shown("a" * 5_000_000 + "end")
  assert len(line) < 2100
  assert line.endswith("end")
  assert "characters left out" in line
