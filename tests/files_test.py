"""Files and folders that are whole or not there."""

import os
import pathlib
import stat

import numpy as np
import pytest

from pivot_jax import files
from pivot_jax.errors import InputError


def names(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("old")
  with files.writing(path) as aside:
    aside.write_text("half")
    assert path.read_text() == "old"
    assert aside.parent == tmp_path and files.is_left_over(aside, "a.txt")
    assert not files.is_left_over(aside, "b.txt")
  assert path.read_text() == "half"
  assert names(tmp_path) == ["a.txt"]


def test_a_failed_file_leaves_the_old_one_and_nothing_else(tmp_path):
  path = tmp_path / "a.json"
  files.write_json(path, {"a": 1})
  with pytest.raises(KeyboardInterrupt), files.writing(path) as aside:
    aside.write_text("{")
    raise KeyboardInterrupt
  with pytest.raises(TypeError, match="set"):
    files.write_json(path, {"a": {1}})
  assert files.read_json(path) == {"a": 1}
  assert names(tmp_path) == ["a.json"]


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
  target, link = tmp_path / "target", tmp_path / "link"
  target.write_text("mine")
  link.symlink_to(target)
  files.write_text(link, "new")
  assert target.read_text() == "mine"
  assert link.read_text() == "new" and not link.is_symlink()


def test_two_writers_of_a_file_do_not_share_a_name(tmp_path):
  path = tmp_path / "a"
  with files.writing(path) as one, files.writing(path) as other:
    one.write_text("1")
    other.write_text("2")
  assert path.read_text() == "1"  # The last to finish.
  assert names(tmp_path) == ["a"]


def test_files_and_folders_have_the_rights_of_any_other(tmp_path):
  before = os.umask(0o027)
  try:
    files.write_text(tmp_path / "a", "")
    with files.writing_folder(tmp_path / "b"):
      pass
  finally:
    os.umask(before)
  assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
  assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o750


def test_keys_are_sorted_unless_their_order_is_wanted(tmp_path):
  path = tmp_path / "a.json"
  files.write_json(path, {"b": 1, "a": pathlib.Path("x")})
  assert path.read_text() == '{\n  "a": "x",\n  "b": 1\n}\n'
  files.write_json(path, {"b": 1, "a": 2}, sort_keys=False)
  assert path.read_text() == '{\n  "b": 1,\n  "a": 2\n}\n'


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path):
  path = tmp_path / "deep" / "out"
  with files.writing_folder(path) as folder:
    (folder / "a").write_text("a")
    assert not path.exists()
  assert names(path) == ["a"]
  assert names(path.parent) == ["out"]


def test_a_failed_folder_leaves_nothing(tmp_path):
  path = tmp_path / "out"
  with pytest.raises(KeyboardInterrupt), files.writing_folder(path) as folder:
    (folder / "a").write_text("a")
    raise KeyboardInterrupt
  assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_folder_replaces_nothing_that_is_there(kind, tmp_path):
  path, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
  elsewhere.mkdir()
  if kind == "file":
    path.write_text("mine")
  elif kind == "link":
    path.symlink_to(elsewhere)
  else:
    path.mkdir()
    (path / "mine").write_text("mine")
  with (
    pytest.raises(InputError, match="out: cannot be written"),
    files.writing_folder(path) as folder,
  ):
    (folder / "a").write_text("a")
  assert names(tmp_path) == ["elsewhere", "out"]
  assert names(elsewhere) == []
  assert kind != "folder" or names(path) == ["mine"]


@pytest.mark.parametrize("name", [".", "/", "..", "out/.."])
def test_a_folder_without_a_name_is_refused(name):
  with (
    pytest.raises(InputError, match="has no name"),
    files.writing_folder(pathlib.Path(name)),
  ):
    pass


def test_a_folder_below_a_file_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(InputError, match="cannot be written"),
    files.writing_folder(tmp_path / "file" / "out"),
  ):
    pass


def test_nothing_is_appended_through_a_link(tmp_path):
  target, link = tmp_path / "target", tmp_path / "link"
  target.write_text("mine")
  link.symlink_to(target)
  with pytest.raises(InputError, match="link: .*symbolic link"):
    files.append_text(link, "more")
  assert target.read_text() == "mine"
  files.append_text(tmp_path / "new", "one\n")
  files.append_text(tmp_path / "new", "two\n")
  assert (tmp_path / "new").read_text() == "one\ntwo\n"


def test_nothing_is_appended_to_a_file_of_two_names(tmp_path):
  target = tmp_path / "target"
  target.write_text("mine")
  (tmp_path / "metrics.jsonl").hardlink_to(target)
  with pytest.raises(InputError, match="metrics.jsonl: is a hard link"):
    files.append_text(tmp_path / "metrics.jsonl", "more")
  assert target.read_text() == "mine"


def test_a_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(InputError, match="pipe: cannot be written"):
    files.append_text(tmp_path / "pipe", "more")


def test_a_link_is_no_folder_to_write_into(tmp_path):
  (tmp_path / "target").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "target")
  with pytest.raises(InputError, match="link: is a symbolic link"):
    files.make_folder(tmp_path / "link")
  files.make_folder(tmp_path / "a" / "b")
  files.make_folder(tmp_path / "a" / "b")


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_are_written_as_numpy_does_and_not_through_a_link(
  tmp_path, compressed
):
  arrays = {"a": np.arange(3), "b": np.ones((2, 2), np.float32)}
  target, link = tmp_path / "target", tmp_path / "link"
  target.write_text("mine")
  link.symlink_to(target)
  files.save_arrays(link, arrays, compressed=compressed)
  assert target.read_text() == "mine"
  with np.load(link) as found:
    assert {k: found[k].tolist() for k in found} == {
      k: v.tolist() for k, v in arrays.items()
    }


@pytest.mark.parametrize(
  "value", [float("nan"), np.float32("inf"), -np.float64("inf")]
)
def test_a_number_that_could_not_be_read_back_is_not_written(tmp_path, value):
  path = tmp_path / "done.json"
  content = {"metrics": {"loss": 1.0, "runs": [{"se": value}]}}
  with pytest.raises(
    InputError, match=r"done.json: metrics.runs\[0\].se would"
  ):
    files.write_json(path, content)
  assert names(tmp_path) == []
