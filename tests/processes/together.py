"""Starts several processes on this machine, for tests."""

import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[2]
# Seconds after which a process is taken to hang, and killed.
LONGEST = 120
# Of jax, seconds without a sign of life after which a process is lost.
HEARTBEAT = "5"
# What a script does first and last.
_START = "from pivot_jax import processes\nprocesses.start()\n"
_FINISH = "\nprocesses.finish()\n"


@dataclasses.dataclass(frozen=True)
class Ended:
  """The end of a process."""

  code: int
  out: str
  err: str
  seconds: float

  def last(self) -> str:
    """Return the last line that the project wrote, not gloo or jax."""
    lines = [x for x in self.err.splitlines() if x and not x.startswith("[")]
    return lines[-1] if lines else ""


def free_port() -> int:
  """Return a port that nobody listens on."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


class Together:
  """Processes of one run, the same words for each, or one's own."""

  def __init__(
    self,
    words: Sequence[str] | Sequence[Sequence[str]],
    *,
    count: int = 2,
    devices: int = 1,
    given: Mapping[str, str] | None = None,
    each: Sequence[Mapping[str, str]] | None = None,
    triple: bool = True,
    folders: Sequence[pathlib.Path] | None = None,
  ):
    """Start them.

    Args:
      words: of the command, after the interpreter; a list of lists differs by
        process.
      count: how many there are.
      devices: of each, virtual ones.
      given: variables of all.
      each: variables by process.
      triple: whether they are told address, count and index.
      folders: where each runs.
    """
    self.began = time.monotonic()
    self.address = f"127.0.0.1:{free_port()}"
    own = words if not isinstance(words[0], str) else [words] * count
    self.running = [
      subprocess.Popen(
        [sys.executable, *own[index]],
        env=self._environment(index, count, devices, triple)
        | dict(given or {})
        | dict(each[index] if each else {}),
        cwd=folders[index] if folders else ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for index in range(count)
    ]
    self._said = [_Reader(process) for process in self.running]

  def _environment(self, index, count, devices, triple):
    told = {
      "JAX_COORDINATOR_ADDRESS": self.address,
      "JAX_NUM_PROCESSES": str(count),
      "JAX_PROCESS_ID": str(index),
    }
    device = f"--xla_force_host_platform_device_count={devices}"
    return (
      os.environ
      | (told if triple and count > 1 else {})
      | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": device if devices > 1 else "",
        "PIVOT_HEARTBEAT": HEARTBEAT,
        "PYTHONPATH": str(ROOT),
      }
    )

  def wait_for(self, text: str, *, process: int = 0, seconds: float = 60):
    """Wait until a process has written a text; fail if it does not."""
    until = time.monotonic() + seconds
    while text not in self.said(process):
      if time.monotonic() > until or self.running[process].poll() is not None:
        self.kill()
        said = self.said(process)
        raise AssertionError(f"process {process} never said {text!r}: {said}")
      time.sleep(0.02)

  def said(self, process: int) -> str:
    """Return what a process has written so far."""
    return self._said[process].text()

  def signal(self, process: int, number: int = signal.SIGTERM) -> None:
    """Send a signal to a process."""
    self.running[process].send_signal(number)

  def kill(self) -> None:
    """Kill those that still run."""
    for process, said in zip(self.running, self._said):
      if process.poll() is None:
        process.kill()
      process.wait()
      said.join()

  def end(self, seconds: float = LONGEST) -> list[Ended]:
    """Return how each ended; kill what hangs, which is an error."""
    until = time.monotonic() + seconds
    found = []
    try:
      for process, said in zip(self.running, self._said):
        code = process.wait(max(1.0, until - time.monotonic()))
        said.join()
        taken = time.monotonic() - self.began
        found.append(Ended(code, said.out, said.err, taken))
    except subprocess.TimeoutExpired:
      self.kill()
      told = "\n--\n".join(said.text()[-3000:] for said in self._said)
      raise AssertionError(f"hung for {seconds} s:\n{told}") from None
    return found


class _Reader:
  """Reads what a process writes, so that it never waits for us."""

  def __init__(self, process: subprocess.Popen):
    self.out, self.err = "", ""
    self._threads = [
      threading.Thread(target=self._read, args=(process.stdout, "out")),
      threading.Thread(target=self._read, args=(process.stderr, "err")),
    ]
    for thread in self._threads:
      thread.start()

  def _read(self, stream, name):
    with stream:
      for line in stream:
        setattr(self, name, vars(self)[name] + line)

  def text(self) -> str:
    return self.out + self.err

  def join(self) -> None:
    for thread in self._threads:
      thread.join()


def run(words: Sequence[str], **how) -> list[Ended]:
  """Return how processes end that are left alone."""
  return Together(words, **how).end()


def main_words(
  workdir: pathlib.Path,
  *words: str,
  config: str = "tests/processes/micro.py",
) -> list[str]:
  """Return the words of a run of the recipe of these tests."""
  return [
    *("-m", "pivot_jax.main", f"--config={config}", f"--workdir={workdir}"),
    *words,
  ]


def script(
  text: str, count: int, *arguments: str, devices: int = 1
) -> list[Ended]:
  """Return how processes end that have joined and run a script."""
  words = ["-c", _START + text + _FINISH, *arguments]
  return run(words, count=count, devices=devices)


def outputs(ended: Sequence[Ended]) -> list[str]:
  """Return what processes wrote; fail unless all of them came to their end.

  What Gloo says of its connections is left out.
  """
  for index, one in enumerate(ended):
    assert one.code == 0, f"process {index}: {one.code}\n{one.err[-3000:]}"
  return [re.sub(r"^\[Gloo\].*\n", "", one.out, flags=re.M) for one in ended]
