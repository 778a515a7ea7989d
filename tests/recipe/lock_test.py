"""The owner of a work folder, where file locks do not tell."""

import errno
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from pivot_jax import processes
from pivot_jax.errors import InputError
from pivot_jax.recipe import lock


@pytest.fixture
def no_flock(monkeypatch):
  """Take the file locks away, as a mounted bucket has none."""

  def refuse(*_):
    raise OSError(errno.ENOTSUP, "no locks here")

  monkeypatch.setattr(lock.fcntl, "flock", refuse)


def owner(folder, **fields):
  """Write the owner's record of a run elsewhere, seen a second ago."""
  said = dict(host="other", pid=1, born="7", run="", beat=time.time() - 1.0)
  (folder / lock.OWNER).write_text(json.dumps(said | fields))


def test_the_owner_is_written_and_goes_with_the_run(tmp_path, no_flock):
  with lock.hold(tmp_path):
    said = json.loads((tmp_path / lock.OWNER).read_text())
    assert said["host"] == socket.gethostname()
    assert said["pid"] == os.getpid()
  assert not (tmp_path / lock.OWNER).exists()


def test_a_file_lock_needs_no_owner(tmp_path):
  with lock.hold(tmp_path):
    assert not (tmp_path / lock.OWNER).exists()


@pytest.mark.parametrize("flock", [True, False])
def test_a_fresh_owner_elsewhere_is_named_and_refused(tmp_path, flock, request):
  if not flock:
    request.getfixturevalue("no_flock")
  owner(tmp_path)
  with pytest.raises(InputError, match="on other"), lock.hold(tmp_path):
    pass
  assert (tmp_path / lock.OWNER).exists()


def test_an_owner_without_a_beat_for_ten_minutes_is_gone(tmp_path, no_flock):
  owner(tmp_path, beat=time.time() - lock.GONE - 1)
  with lock.hold(tmp_path):
    said = json.loads((tmp_path / lock.OWNER).read_text())
    assert said["pid"] == os.getpid()


def test_the_same_job_on_another_host_takes_its_folder_over(
  tmp_path, no_flock, monkeypatch
):
  owner(tmp_path, run="pivot")
  monkeypatch.setenv("PIVOT_RUN", "another")
  with pytest.raises(InputError, match="in use"), lock.hold(tmp_path):
    pass
  monkeypatch.setenv("PIVOT_RUN", "pivot")
  with lock.hold(tmp_path):
    pass


def test_an_owner_on_this_machine_that_ended_is_gone(tmp_path, no_flock):
  ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
    capture_output=True, text=True, check=True)  # fmt: skip
  owner(tmp_path, host=socket.gethostname(), pid=int(ended.stdout))
  with lock.hold(tmp_path):
    pass


def test_an_owner_on_this_machine_that_lives_is_refused(tmp_path, no_flock):
  running = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(60)"]
  )
  try:
    here = dict(host=socket.gethostname(), pid=running.pid)
    owner(tmp_path, **here, born=lock._born(running.pid))
    with pytest.raises(InputError, match=str(running.pid)):
      with lock.hold(tmp_path):
        pass
    # Another process has the number now.
    owner(tmp_path, **here, born="1")
    with lock.hold(tmp_path):
      pass
  finally:
    running.kill()
    running.wait()


def test_what_no_run_wrote_is_refused(tmp_path, no_flock):
  (tmp_path / lock.OWNER).write_text('{"host": "mine"}')
  with pytest.raises(InputError, match="no run wrote it"), lock.hold(tmp_path):
    pass


def test_several_processes_have_an_owner_beside_the_file_lock(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(processes, "count", lambda: 2)
  with lock.hold(tmp_path):
    assert (tmp_path / lock.OWNER).exists()
