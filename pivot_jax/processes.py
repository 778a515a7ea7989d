"""The other processes of a run: join, agree, wait, stop and fail with them.

The only file that knows that there are others. `start` joins them before a
device is touched; after it, what is written is written by the first process
alone (`first`), what is decided by what the first sees (`decide`), and what one
process knows of its share goes to all (`gather`, `exchange`). With one process
each of these does nothing but give its argument back.

Small things go by the key-value store of jax's coordination service, which has
time-outs and needs no device; arrays by a collective.
"""

import collections
import contextlib
import dataclasses
import faulthandler
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from pivot_jax import cluster, command_line, files, output
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

# Values that JSON can hold.
Json = str | float | Sequence | Mapping | None
# A peer was lost, or all wait for one that is stuck: the launcher restarts.
EXIT_LOST = 70
# As Python has them: of an error that nobody expected, and of Ctrl-C.
EXIT_ERROR, EXIT_INTERRUPTED = 1, 130
# Words of jax's errors where another process is gone.
_LOST = (
  *("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED"),
  *("Connection closed", "Connection reset", "Gloo", "NCCL"),
)
# Seconds: to join, for small things to arrive, and for all to leave.
_JOIN, _ANSWER, _LEAVE = 300, 300, 5
# Seconds between looks at what the others say.
_LOOK = 0.5
_HEARTBEAT = 100
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
_watch: "_Watch | None" = None
# For what threads of this process wait that others have to bring.
_waiting: list[str] = []
# What is done before the process ends at once.
_at_end: list[Callable[[], None]] = []


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
  state = _state()
  _peers = _Peers(
    state.process_id,
    state.num_processes,
    socket.gethostname(),
    state.coordinator_address or "",
    collections.Counter(),
  )
  _watch = _Watch()
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
  _in_time(_release)
  os._exit(command_line.EXIT_INPUT)


def _state():
  """Return jax's state of the processes.

  Its store has no public name in jax 0.10 to 0.12; orbax takes it from here.
  """
  from jax._src import distributed

  return distributed.global_state


def _store():
  return _state().client


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


def _put(key: str, text: str) -> None:
  _store().key_value_set(key, text)


def _get(key: str, seconds: float) -> str | None:
  """Return what a process puts under a key, None if it does not in time."""
  try:
    return _store().blocking_key_value_get(key, max(1, int(seconds * 1000)))
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    return None


def _peek(key: str) -> str | None:
  """Return what is under a key now."""
  try:
    return _store().key_value_try_get(key)
  except jax.errors.JaxRuntimeError as error:
    if "NOT_FOUND" not in str(error):
      raise
    return None


def exchange(name: str, value: Json, seconds: float = SLOW) -> list[Any]:
  """Return the values of all processes, which JSON can hold, by index.

  Each use of a `name` is one that all processes come to, in the same order.

  Raises:
    LostPeerError: after `seconds`, naming the processes that are missing.
  """
  if count() == 1:
    return [json.loads(json.dumps(value))]
  key = _key(name)
  _put(f"{key}/{index()}", json.dumps(value))
  _waiting.append(name)
  try:
    if first():
      _put(f"{key}/all", json.dumps(_collect(key, name, seconds)))
      if _peers.used[name] > 1:
        # All have read what was exchanged before, as they came to this.
        _store().key_value_delete(f"pivot/{name}/{_peers.used[name] - 1}/")
    found = _get(f"{key}/all", seconds + _ANSWER)
  finally:
    _waiting.remove(name)
  if found is None:
    raise LostPeerError(f"process 0 did not answer in {seconds:.0f} s")
  return json.loads(found)


def _collect(key: str, name: str, seconds: float) -> list[Any]:
  """Return what all have put under a key; of the first process."""
  until = time.monotonic() + seconds
  texts = [
    _get(f"{key}/{one}", until - time.monotonic()) for one in range(count())
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
  shown = [f"{value} in process {_numbers(who)}" for value, who in parts]
  return f"{key} is {', '.join(shown)}"


def _numbers(who: list[int]) -> str:
  listed = ", ".join(map(str, who[:8]))
  return f"{listed} and {len(who) - 8} more" if len(who) > 8 else listed


def decide(name: str, make: Callable[[], Any], seconds: float = SLOW) -> Any:
  """Return, in all processes, the JSON value that `make` gives in the first."""
  if count() == 1:
    return make()
  key = _key(f"decide/{name}")
  if first():
    value = make()
    _put(key, json.dumps(value))
    return value
  assert _watch is not None
  with _watch.waiting(f"waiting for process 0 ({name})", seconds):
    text = _get(key, seconds)
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
  _at_end.append(release)


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
  said = f"error: {kind.__name__}: {error}"
  lost = isinstance(error, jax.errors.JaxRuntimeError) and any(
    word in str(error) for word in _LOST
  )
  if lost:
    # Whoever left may have said why: then the watch ends this process, too.
    time.sleep(4 * _LOOK)
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


def _release() -> None:
  for release in _at_end:
    release()
  for stream in (sys.stdout, sys.stderr):
    stream.flush()


def _in_time(action: Callable[[], None]) -> None:
  """Do what a stalled disk may keep for ever; go on after some seconds."""
  thread = threading.Thread(target=action, daemon=True)
  thread.start()
  thread.join(_LEAVE)


class _Watch(threading.Thread):
  """Looks at what the others say, and whether this process still moves."""

  def __init__(self):
    super().__init__(name="watch", daemon=True)
    self._closed = threading.Event()
    self._beat = ("starting", -1, time.monotonic(), 0.0)
    self._seconds, self._folder = 0.0, pathlib.Path()
    self._fails = False
    # Since when the store does not answer, and for how long it may not.
    self._silent: float | None = None
    self._patience = cluster.seconds(
      cluster.environment(), "PIVOT_HEARTBEAT", _HEARTBEAT
    )
    self.start()

  def begin(self, seconds: float, folder: pathlib.Path) -> None:
    self._folder, self._seconds = folder, seconds

  def beat(self, phase: str, step: int, allow: float) -> None:
    self._beat = (phase, step, time.monotonic(), allow)

  @contextlib.contextmanager
  def waiting(self, phase: str, allow: float) -> Iterator[None]:
    """Be in a phase; the one before begins anew behind it."""
    before = self._beat
    self.beat(phase, -1, allow)
    yield
    self.beat(before[0], before[1], before[3])

  def close(self) -> None:
    self._closed.set()
    self.join()

  def run(self) -> None:
    """Look until the run ends."""
    while not self._closed.wait(_LOOK):
      try:
        failed, stuck = _peek("pivot/failed"), _peek("pivot/stuck")
        self._silent = None
      except jax.errors.JaxRuntimeError:
        self._lost()
        continue
      if self._fails:
        # The main thread is on its way out.
        continue
      if failed is not None:
        self._follow(json.loads(failed))
      elif stuck is not None or self._is_stuck():
        self._stuck()

  def fail(self, message: str, code: int) -> NoReturn:
    """Say that this process ends, and end it when the others know."""
    self._fails = True
    said = dict(index=index(), host=_peers.host, message=message, code=code)
    try:
      _put("pivot/failed", json.dumps(said))
    except jax.errors.JaxRuntimeError:
      # Another one was before, or nobody listens any more.
      pass
    self._leave(code)

  def _follow(self, said: Mapping[str, Any]) -> None:
    """End as another process did, with its line."""
    who = f"process {said['index']} ({said['host']}): "
    output.complain(f"{'' if said.get('all') else who}{said['message']}")
    self._leave(said["code"])

  def _leave(self, code: int) -> NoReturn:
    """End the process; the first one after the others, who hear through it."""
    _in_time(_release)
    try:
      _put(f"pivot/left/{index()}", "")
      until = time.monotonic() + _LEAVE
      if first():
        for one in range(1, count()):
          _get(f"pivot/left/{one}", until - time.monotonic())
        time.sleep(0.2)
    except jax.errors.JaxRuntimeError:
      pass
    os._exit(code)

  def _lost(self) -> None:
    """End when the first process has not answered for a while."""
    now = time.monotonic()
    self._silent = self._silent or now
    if now - self._silent > self._patience:
      output.complain("error: process 0 was lost: start all of them again")
      _in_time(_release)
      os._exit(EXIT_LOST)

  def _is_stuck(self) -> bool:
    _, _, since, allow = self._beat
    over = time.monotonic() - since > self._seconds + allow
    return self._seconds > 0 and over

  def _stuck(self) -> NoReturn:
    """Write the stacks, tell who waits for whom, and end all."""
    phase, step, since, _ = self._beat
    waited = round(time.monotonic() - since)
    try:
      _put("pivot/stuck", "")
    except jax.errors.JaxRuntimeError:
      pass
    said = dict(phase=phase, step=step, waited=waited, host=_peers.host)
    said["waits"] = bool(_waiting) or phase.startswith("waiting")
    try:
      _put(f"pivot/state/{index()}", json.dumps(said))
      if first():
        line = "error: " + _behind(self._states())
        told = dict(index=0, host="", message=line, code=EXIT_LOST, all=True)
        _put("pivot/failed", json.dumps(told))
      text = _get("pivot/failed", 2 * _LEAVE)
    except jax.errors.JaxRuntimeError:
      text = None
    own = f"error: process {index()} is stuck: {_doing(said)}"
    _in_time(self._write_stacks)
    output.complain(json.loads(text)["message"] if text else own)
    self._leave(EXIT_LOST)

  def _states(self) -> dict[int, dict[str, Any]]:
    until = time.monotonic() + _LEAVE
    texts = {
      one: _get(f"pivot/state/{one}", until - time.monotonic())
      for one in range(count())
    }
    return {one: json.loads(text) for one, text in texts.items() if text}

  def _write_stacks(self) -> None:
    """Write where all threads of this process are.

    Every process does, whoever is the first: it is what a person asks for.
    """
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      with open(self._folder / f"{index()}.txt", "w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
      output.complain(f"{self._folder}: no stacks ({error.strerror})")


def _behind(states: Mapping[int, Mapping[str, Any]]) -> str:
  """Return which process is behind, in what, and where the others wait."""
  silent = [one for one in range(count()) if one not in states]
  if silent:
    return f"process {_numbers(silent)} does not answer"

  def place(item):
    _, state = item
    # Who waits for another is not behind it.
    return state["waits"], state["step"], item[0]

  ordered = sorted(states.items(), key=place)
  # Of those who are as far, the one that reads keeps the others waiting.
  far = place(ordered[0])[:2]
  reading = [
    x for x in ordered if place(x)[:2] == far and "read" in x[1]["phase"]
  ]
  number, state = (reading or ordered)[0]
  others = [one for one in states if one != number]
  wait = f"; the others wait in {_at(states[others[0]])}" if others else ""
  return f"process {number} ({state['host']}): {_doing(state)}{wait}"


def _at(state: Mapping[str, Any]) -> str:
  step = f" {state['step']}" if state["step"] >= 0 else ""
  return f"{state['phase']}{step}"


def _doing(state: Mapping[str, Any]) -> str:
  return f"{_at(state)} since {state['waited']} s"
