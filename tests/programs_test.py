"""The cache of compiled programs is this user's alone."""

import os
import stat

import pytest

from tests.fixtures import programs


def test_a_new_folder_is_private(tmp_path):
  before = os.umask(0)
  try:
    programs.private_folder(tmp_path / "cache")
  finally:
    os.umask(before)
  assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["link", "open to others"])
def test_a_folder_that_others_may_write_is_not_taken(tmp_path, kind):
  (tmp_path / "other").mkdir()
  if kind == "link":
    (tmp_path / "cache").symlink_to(tmp_path / "other")
  else:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
  with pytest.raises(RuntimeError, match="this user's alone"):
    programs.private_folder(tmp_path / "cache")
