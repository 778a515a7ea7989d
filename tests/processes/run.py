"""Several processes of a script on this machine, joined by jax.distributed."""

import dataclasses
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[2]
_DEVICES = "--xla_force_host_platform_device_count"
# Seconds that all of them may take.
LIMIT = 120
# What is done before any script: join the others.
_START = "from pivot_jax import processes\nprocesses.start()\n"
_FINISH = "\nprocesses.finish()\n"


@dataclasses.dataclass(frozen=True)
class Ended:
  """A process that has ended, or was killed at the limit (-9)."""

  code: int
  out: str
  err: str


def free_port() -> int:
  """Return a port that nobody listens on."""
  with socket.socket() as listening:
    listening.bind(("127.0.0.1", 0))
    return listening.getsockname()[1]


def environment(
  count: int, *, devices: int = 1, more: Mapping[str, str] | None = None
) -> list[dict[str, str]]:
  """Return the variables of each of `count` processes that join one another."""
  flags = os.environ.get("XLA_FLAGS", "").split()
  kept = [flag for flag in flags if _DEVICES not in flag]
  shared = {
    "XLA_FLAGS": " ".join([*kept, f"{_DEVICES}={devices}"]),
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "PIVOT_HEARTBEAT": "10",
  }
  if count == 1:
    return [os.environ | shared | dict(more or {})]
  shared |= {
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
    "JAX_NUM_PROCESSES": str(count),
  }
  return [
    os.environ | shared | {"JAX_PROCESS_ID": str(index)} | dict(more or {})
    for index in range(count)
  ]


def run(
  command: Sequence[str],
  count: int,
  *,
  devices: int = 1,
  more: Mapping[str, str] | None = None,
) -> list[Ended]:
  """Run a command in `count` processes; return how each ended, by index."""
  with tempfile.TemporaryDirectory() as folder:
    running = []
    for index, variables in enumerate(
      environment(count, devices=devices, more=more)
    ):
      texts = [
        open(pathlib.Path(folder, f"{index}.{end}"), "w+", encoding="utf-8")
        for end in ("out", "err")
      ]
      process = subprocess.Popen(
        command, env=variables, cwd=folder, stdout=texts[0], stderr=texts[1]
      )
      running.append((process, texts))
    until = time.monotonic() + LIMIT
    return [_end(process, texts, until) for process, texts in running]


def _end(process, texts, until: float) -> Ended:
  try:
    code = process.wait(max(0.1, until - time.monotonic()))
  except subprocess.TimeoutExpired:
    process.kill()
    code = process.wait()
  found = []
  for text in texts:
    text.seek(0)
    found.append(text.read())
    text.close()
  return Ended(code, *found)


def script(
  text: str,
  count: int,
  *arguments: str,
  devices: int = 1,
  more: Mapping[str, str] | None = None,
) -> list[Ended]:
  """Run a script in `count` processes that have joined one another."""
  command = (sys.executable, "-c", _START + text + _FINISH, *arguments)
  return run(command, count, devices=devices, more=more)


def outputs(ended: Sequence[Ended]) -> list[str]:
  """Return what processes wrote; fail unless all of them came to their end.

  What Gloo says of its connections is left out.
  """
  for index, one in enumerate(ended):
    assert one.code == 0, f"process {index}: {one.code}\n{one.err[-3000:]}"
  return [re.sub(r"^\[Gloo\].*\n", "", one.out, flags=re.M) for one in ended]
