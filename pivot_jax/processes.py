"""The other processes of a run: join, agree, wait, stop and fail with them.

What runs with others knows them from here. `start` joins them before a
device is touched; after it, what is written is written by the first process
alone (`first`), what is decided by what the first sees (`decide`), and what one
process knows of its share goes to all (`gather`, `exchange`). With one process
each of these does nothing but give its argument back.

Small things go by the key-value store of jax's coordination service, which has
time-outs and needs no device; arrays by a collective.
"""

import collections
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from pivot_jax import (
  cluster,
  command_line,
  coordination,
  files,
  output,
  watchdog,
)
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

# Values that JSON can hold.
Json = str | float | Sequence | Mapping | None
EXIT_LOST = watchdog.EXIT_LOST
# As Python has them: of an error that nobody expected, and of Ctrl-C.
EXIT_ERROR, EXIT_INTERRUPTED = 1, 130
# Words of jax's errors where another process is gone.
_LOST = (
  *("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED"),
  *("Connection closed", "Connection reset", "Gloo", "NCCL"),
)
# Seconds: to join, for an answer of the first, and without a sign of life.
_JOIN, _ANSWER, _HEARTBEAT = 300, 300, 100
# More than that is allowed where a first update compiles, or weights move.
SLOW = 1800.0


class LostPeerError(Exception):
  """Another process did not come; the same command on all of them goes on."""


@dataclasses.dataclass
class _Peers:
  """The place of this process among others."""

  index: int
  count: int
  host: str
  address: str
  # How often each name was used: the same in all, so that it makes keys.
  used: collections.Counter
  stops: int = 0


_peers = _Peers(0, 1, socket.gethostname(), "", collections.Counter())
_watch: watchdog.Watch | None = None


def index() -> int:
  """Return the number of this process, from 0."""
  return _peers.index


def count() -> int:
  """Return how many processes run together."""
  return _peers.count


def first() -> bool:
  """Return whether this process writes files and decides."""
  return _peers.index == 0


def start(spec: str = "auto") -> tuple[int, int]:
  """Join the other processes, before any device is touched.

  Args:
    spec: "auto" (as `cluster.find`), "none", or ADDRESS:PORT,COUNT,INDEX.

  Returns:
    (index, count).

  Raises:
    InputError: nobody answers, or what the processes were given differs.
  """
  variables = cluster.environment()
  found = join(spec)
  if found is None:
    if "PIVOT_DEVICES" in variables:
      cluster.check_devices(variables, jax.device_count())
    return 0, 1
  _compare_variables(variables)
  _check_devices(variables, found.sign)
  return _peers.index, _peers.count


def join(spec: str) -> cluster.Joining | None:
  """Join without comparing anything; of a process that goes on to `fail`.

  Returns how, None where this is one process.
  """
  global _peers, _watch
  found = cluster.find(spec, cluster.environment())
  if found is None:
    return None
  _initialize(found)
  state = coordination.state()
  _peers = _Peers(
    state.process_id,
    state.num_processes,
    socket.gethostname(),
    state.coordinator_address or "",
    collections.Counter(),
  )
  _watch = watchdog.Watch(
    _peers.index,
    _peers.count,
    _peers.host,
    patience=cluster.seconds(
      cluster.environment(), "PIVOT_HEARTBEAT", _HEARTBEAT
    ),
  )
  files.writes = first()
  sys.excepthook = _end_by
  return found


def _initialize(found: cluster.Joining) -> None:
  # On a CPU, collectives of several programs at a time fill the pool of threads
  # that others of them need to come.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  variables = cluster.environment()
  heartbeat = cluster.seconds(variables, "PIVOT_HEARTBEAT", _HEARTBEAT)
  patience = cluster.seconds(variables, "PIVOT_JOIN", _JOIN)
  _check_port(found)
  # jax's own answer to nobody is an abort.
  late = threading.Timer(patience, _nobody_came, (found, patience))
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
      found.address,
      found.count,
      found.index,
      local_device_ids=found.local_devices,
      initialization_timeout=patience + 60,
      heartbeat_timeout_seconds=heartbeat,
      shutdown_timeout_seconds=60,
    )
  # jax raises the first where it finds nothing, the second where it cannot join.
  except (ValueError, RuntimeError) as error:
    said = " ".join(str(error).split())
    # Of a run that ends just now, or of another one at this address.
    if "ABORTED" in said or "ALREADY_EXISTS" in said:
      raise LostPeerError(
        f"{found.address or 'process 0'} is of another start ({said[:200]})"
      ) from error
    raise InputError(
      f"{found.sign}: the processes cannot join ({said[:300]})"
    ) from error
  finally:
    late.cancel()


def _check_port(found: cluster.Joining) -> None:
  """Raise InputError if the port is taken where the others are awaited."""
  if found.index != 0 or not found.address:
    return
  port = int(found.address.rpartition(":")[2])
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(("", port))
    except OSError as error:
      raise InputError(
        f"port {port} of {found.address} cannot be opened ({error.strerror}): "
        "give another one to all processes"
      ) from error


def _nobody_came(found: cluster.Joining, seconds: int) -> None:
  """End the process: the others did not come (PIVOT_JOIN)."""
  if found.index == 0:
    said = f"not all of {found.count} processes came to {found.address}"
    advice = "are all of them running, with this address and this count?"
  else:
    said = f"no answer from {found.address or 'process 0'}"
    advice = "is process 0 running, is the port open?"
  output.complain(f"error: {said} in {seconds} s: {advice}")
  watchdog.release()
  os._exit(command_line.EXIT_INPUT)


def _compare_variables(variables: Mapping[str, str]) -> None:
  """Check what launchers gave, before libtpu waits for what is not there."""
  cluster.check(variables, count=_peers.count, index=_peers.index)
  shared = cluster.given(variables, cluster.SHARED)
  agree("environment", shared | {"processes": str(_peers.count)})
  own = cluster.given(variables, cluster.OWN)
  everyone = exchange("environment", [_peers.host, own])
  cluster.check_slices([shared | given for _, given in everyone])
  if first():
    _show_given("all processes", shared)
    for number, (host, given) in enumerate(everyone):
      _show_given(f"process {number} ({host})", given)


def _show_given(who: str, given: Mapping[str, str]) -> None:
  said = " ".join(f"{name}={value}" for name, value in given.items())
  LOG.info("%s: given %s", who, said or "nothing")


def _check_devices(variables: Mapping[str, str], sign: str) -> None:
  """Touch the devices, in all; the first says what was joined."""
  local, total = jax.local_device_count(), jax.device_count()
  if jax.process_index() != _peers.index:
    raise InputError(
      f"{sign}: the devices number this process {jax.process_index()}, the "
      f"launcher {_peers.index}: start the processes in the order of the hosts"
    )
  device = jax.devices()[0].device_kind
  agree("devices", {"local devices": str(local), "kind": device})
  cluster.check_devices(variables, total)
  if first():
    LOG.info(
      "process 0 of %d, %d of %d %s, coordinator %s (%s)",
      *(_peers.count, local, total, device, _peers.address, sign),
    )


def _key(name: str) -> str:
  """Return a key that no other use of the name has; equal in all processes."""
  _peers.used[name] += 1
  return f"pivot/{name}/{_peers.used[name]}"


def exchange(name: str, value: Json, seconds: float = SLOW) -> list[Any]:
  """Return the values of all processes, which JSON can hold, by index.

  Each use of a `name` is one that all processes come to, in the same order.

  Raises:
    LostPeerError: after `seconds`, naming the processes that are missing.
  """
  if count() == 1:
    return [json.loads(json.dumps(value))]
  key = _key(name)
  coordination.put(f"{key}/{index()}", json.dumps(value))
  assert _watch is not None
  with _watch.exchanging(name):
    if first():
      coordination.put(f"{key}/all", json.dumps(_collect(key, name, seconds)))
      if _peers.used[name] > 1:
        # All have read what was exchanged before, as they came to this.
        coordination.delete(f"pivot/{name}/{_peers.used[name] - 1}/")
    found = coordination.get(f"{key}/all", seconds + _ANSWER)
  if found is None:
    raise LostPeerError(f"process 0 did not answer in {seconds:.0f} s")
  return json.loads(found)


def _collect(key: str, name: str, seconds: float) -> list[Any]:
  """Return what all have put under a key; of the first process."""
  until = time.monotonic() + seconds
  texts = [
    coordination.get(f"{key}/{one}", until - time.monotonic())
    for one in range(count())
  ]
  missing = [str(one) for one, text in enumerate(texts) if text is None]
  if missing:
    raise LostPeerError(
      f"process {', '.join(missing)} did not come to {name} in {seconds:.0f} s"
    )
  return [json.loads(text) for text in texts if text is not None]


def barrier(name: str, seconds: float = SLOW) -> None:
  """Wait for all processes.

  Raises:
    LostPeerError: after `seconds`, naming the processes that are missing.
  """
  if _watch is not None:
    with _watch.waiting(f"waiting for the others ({name})", seconds):
      exchange(name, "", seconds)


def agree(name: str, values: Mapping[str, str], seconds: float = SLOW) -> None:
  """Raise InputError, in all processes, unless all give the same values.

  The error names the first values that differ, and whose they are.
  """
  if count() == 1:
    return
  own = json.dumps(dict(values), sort_keys=True)
  digest = hashlib.sha256(own.encode()).hexdigest()
  if len(set(exchange(name, digest, seconds))) == 1:
    return
  everyone = exchange(name, dict(values), seconds)
  keys = dict.fromkeys(key for one in everyone for key in one)
  wrong = [k for k in keys if len({one.get(k) for one in everyone}) > 1]
  said = "; ".join(_difference(key, everyone) for key in wrong[:5])
  more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
  raise InputError(f"the processes differ in {name}: {said}{more}")


def _difference(key: str, everyone: list[dict[str, str]]) -> str:
  """Return who has which value of a key, most processes first."""
  holders = collections.defaultdict(list)
  for number, one in enumerate(everyone):
    holders[one.get(key, "nothing")].append(number)
  parts = sorted(holders.items(), key=lambda item: (-len(item[1]), item[1]))
  shown = [
    f"{value} in process {watchdog.numbers(who)}" for value, who in parts
  ]
  return f"{key} is {', '.join(shown)}"


def decide(name: str, make: Callable[[], Any], seconds: float = SLOW) -> Any:
  """Return, in all processes, the JSON value that `make` gives in the first."""
  if count() == 1:
    return make()
  key = _key(f"decide/{name}")
  if first():
    value = make()
    coordination.put(key, json.dumps(value))
    return value
  assert _watch is not None
  with _watch.waiting(f"waiting for process 0 ({name})", seconds):
    text = coordination.get(key, seconds)
  if text is None:
    raise LostPeerError(
      f"process 0 did not decide on {name} in {seconds:.0f} s"
    )
  return json.loads(text)


def gather(array: np.ndarray) -> list[np.ndarray]:
  """Return the arrays of all processes, by index; first axes may differ."""
  if count() == 1:
    return [array]
  array = np.ascontiguousarray(array)
  # By name: bfloat16 has no code of numpy's.
  heads = exchange("gather", [array.dtype.name, list(array.shape)])
  sizes = [
    int(np.prod(shape)) * np.dtype(kind).itemsize for kind, shape in heads
  ]
  # As bytes: a collective would make 32 bits of 64. Few sizes compile.
  room = 1 << max(6, (max(sizes) - 1).bit_length())
  own = np.zeros(room, np.uint8)
  own[: array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
  found = np.asarray(multihost_utils.process_allgather(own))
  return [
    np.frombuffer(one[:size].tobytes(), np.dtype(kind)).reshape(shape)
    for one, size, (kind, shape) in zip(found, sizes, heads, strict=True)
  ]


def in_turn(name: str, make: Callable[[], Any]) -> Any:
  """Return what `make` gives: the first process makes it before all others.

  So they find what the first has kept in a cache that all share.
  """
  if count() == 1:
    return make()
  found = make() if first() else None
  barrier(name)
  return found if first() else make()


def stop_at() -> bool:
  """Return whether all processes stop here, having been asked to.

  It counts its calls, which have to be equal in all processes: one an update,
  a batch and a stage. SIGTERM to one of them is noticed by jax.
  """
  if count() == 1:
    return False
  _peers.stops += 1
  return multihost_utils.reached_preemption_sync_point(_peers.stops)


def beat(phase: str, step: int = -1, *, allow: float = 0.0) -> None:
  """Tell the watchdog what begins, and how many seconds more it may take."""
  if _watch is not None:
    _watch.beat(phase, step, allow)


def watch(seconds: float, folder: pathlib.Path) -> None:
  """Begin to watch: after `seconds` without a beat all end; 0: never.

  The stacks of all threads go to FOLDER/PROCESS.txt.
  """
  if _watch is not None:
    _watch.begin(seconds, folder)


def fail(message: str, code: int) -> NoReturn:
  """End this process, and so all of them, saying why in a line.

  It does not wait at jax's own barrier: those who would come are elsewhere.
  """
  assert _watch is not None
  output.complain(message)
  _watch.fail(message, code)


def at_end(release: Callable[[], None]) -> None:
  """Call a function also where `fail` ends the process at once."""
  watchdog.RELEASES.append(release)


def is_lost(error: BaseException) -> bool:
  """Return whether an error of jax says that another process is gone."""
  of_jax = isinstance(error, jax.errors.JaxRuntimeError)
  return count() > 1 and of_jax and any(word in str(error) for word in _LOST)


def _end_by(
  kind: type[BaseException],
  error: BaseException,
  trace: types.TracebackType | None,
) -> None:
  """End all by an error that nobody expected (`sys.excepthook`)."""
  if _watch is not None and issubclass(kind, KeyboardInterrupt):
    fail("error: interrupted", EXIT_INTERRUPTED)
  sys.__excepthook__(kind, error, trace)
  if _watch is None:
    return
  said, lost = f"error: {kind.__name__}: {error}", is_lost(error)
  if lost:
    # Whoever left may have said why: then the watch ends this process, too.
    time.sleep(4 * watchdog.LOOK)
  fail(said, EXIT_LOST if lost else EXIT_ERROR)


def finish() -> None:
  """Leave together with the others, at the end of a run."""
  global _watch
  if _watch is None:
    return
  barrier("the end")
  _watch.close()
  _watch = None
  try:
    jax.distributed.shutdown()
  # All is done and written.
  except RuntimeError as error:
    LOG.warning("leaving the others failed: %s", error)
