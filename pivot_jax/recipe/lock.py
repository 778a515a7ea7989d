"""The lock of a work folder: two runs of one would mix.

On one machine a file lock (flock) holds it, which ends with its process. Where
several processes run together, or the file system has no such locks, `owner.json`
says whose the folder is: its beat is renewed, and one that stopped is taken over.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pivot_jax import files, output, processes
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

# Seconds between beats, and after which an owner without one is gone.
BEAT, GONE = 60.0, 600.0
OWNER = "owner.json"
# What file systems answer that have no such locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
  """Hold the work folder; of several processes the first does.

  Raises:
    InputError: another run has it.
  """
  place = files.open_own(workdir / "lock", os.O_RDWR)
  with open(place, "r+b") as file:
    locked = _flock(file.fileno(), workdir)
    _check_owner(workdir, locked=locked)
    # Under another name (a hard link) it may be somebody's file.
    if os.fstat(place).st_nlink == 1:
      file.truncate()
      file.write(str(os.getpid()).encode())
      file.flush()
    if locked and processes.count() == 1:
      (workdir / OWNER).unlink(missing_ok=True)
      yield
      return
    with _owning(workdir):
      yield


def _flock(place: int, workdir: pathlib.Path) -> bool:
  """Take the file lock; return whether the file system has any."""
  try:
    fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    # Of several, a lost host may hold it on a shared disk for minutes.
    owned = processes.count() > 1 and (workdir / OWNER).exists()
    if error.errno in _NO_LOCKS or owned:
      return False
    raise InputError(
      f"{workdir} is in use by another process: wait for it or use another "
      "--workdir"
    ) from error
  return True


def _check_owner(workdir: pathlib.Path, *, locked: bool) -> None:
  """Raise InputError if another run has the folder and may live."""
  path = workdir / OWNER
  if not path.exists():
    return
  owner = _read(path)
  age = time.time() - owner["beat"]
  # With the lock in our hands, none on this machine has it.
  here = owner["host"] == socket.gethostname()
  dead = here and (locked or not _lives(owner["pid"], owner["born"]))
  # A launcher runs a job once at a time, wherever it starts it again.
  same = bool(owner["run"]) and owner["run"] == run_name() and not here
  if dead or same or age > GONE:
    return
  raise InputError(
    f"{workdir} is in use by process {owner['pid']} on {owner['host']}, which "
    f"was there {max(0.0, age):.0f} s ago: wait for it (it counts as gone after "
    f"{GONE:.0f} s), delete {path} if it has ended, or use another --workdir"
  )


def _read(path: pathlib.Path) -> dict[str, Any]:
  """Return owner.json; raise InputError if a run did not write it."""
  found = files.read_object(path)
  kinds = {"host": str, "pid": int, "born": str, "beat": float, "run": str}
  for name, kind in kinds.items():
    if not isinstance(found.get(name), kind):
      raise InputError(
        f"{path}: no run wrote it ({name} is no {kind.__name__}): move it away "
        "or use another --workdir"
      )
  return found


def run_name(environment: Mapping[str, str] = os.environ) -> str:
  """Return what a launcher calls this job, the same when it starts it again."""
  job, step = (environment.get(f"SLURM_{x}_ID", "") for x in ("JOB", "STEP"))
  return environment.get("PIVOT_RUN") or (f"{job}.{step}" if job else "")


def _lives(pid: int, born: str) -> bool:
  """Return whether a process of this machine is there, and no other's number."""
  try:
    os.kill(pid, 0)
  except OSError as error:
    return error.errno == errno.EPERM
  return _born(pid) == born and pid != os.getpid()


def _born(pid: int) -> str:
  """Return when a process began, in the machine's ticks; "" if unknown."""
  try:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
  except OSError:
    return ""
  return text.rpartition(")")[2].split()[19]


@contextlib.contextmanager
def _owning(workdir: pathlib.Path) -> Iterator[None]:
  """Keep owner.json fresh; it goes with the run."""
  path, ended = workdir / OWNER, threading.Event()
  said = {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "born": _born(os.getpid()),
    "run": run_name(),
    "started": time.time(),
  }

  def write() -> None:
    files.write_text(path, json.dumps(said | {"beat": time.time()}) + "\n")

  def renew() -> None:
    while not ended.wait(BEAT):
      try:
        _check_ours(path, said)
        write()
      except OSError as error:
        LOG.warning("%s: not renewed (%s), tried again", path, error)

  def release() -> None:
    ended.set()
    thread.join(BEAT / 10)
    path.unlink(missing_ok=True)

  write()
  thread = threading.Thread(target=renew, name="owner", daemon=True)
  processes.at_end(release)
  thread.start()
  try:
    yield
  finally:
    release()


def _check_ours(path: pathlib.Path, said: Mapping[str, Any]) -> None:
  """End the run if another one took the folder over, as it stood still."""
  if path.exists() and _read(path)["pid"] != said["pid"]:
    message = f"error: {path}: another run took the work folder over"
    if processes.count() > 1:
      processes.fail(message, processes.EXIT_LOST)
    output.complain(message)
    os._exit(processes.EXIT_LOST)
