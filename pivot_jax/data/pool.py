"""Spreads work over spawned processes and gives the results in order.

The processes are small: each imports the module of the work it is sent, and
neither the program that was run nor jax.
"""

import contextlib
import functools
import multiprocessing
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import process
from typing import TypeVar

from pivot_jax.errors import InputError

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")


def results(
  work: Callable[[State, Item], Result],
  state: State,
  items: Sequence[Item],
  *,
  processes: int,
  broken: str,
) -> Iterator[Result]:
  """Yield `work(state, item)` for each item, in order.

  Args:
    work: a function of a module, so that it can be pickled.
    state: sent once to each process, which keeps its own copy.
    processes: how many work at once.
    broken: the message if one of them is killed.

  Raises:
    InputError: a process was killed.
  """
  with executor(state, min(processes, len(items))) as pool:
    try:
      with _no_program():
        found = pool.map(functools.partial(_call, work), items)
      yield from found
    except process.BrokenProcessPool:
      raise InputError(broken) from None


@contextlib.contextmanager
def executor(
  state: State, processes: int
) -> Iterator[futures.ProcessPoolExecutor]:
  """Give spawned processes that hold a state; drop open work at the end."""
  pool = futures.ProcessPoolExecutor(
    processes,
    # Not forked: this process has threads.
    multiprocessing.get_context("spawn"),
    _hold,
    (state,),
  )
  try:
    yield pool
  finally:
    pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _no_program() -> Iterator[None]:
  """Keep the processes that are started meanwhile from importing the program.

  A spawned process imports the module that was run, and of this project's
  programs that is jax and everything else: 300 MB in each.
  """
  program = sys.modules["__main__"]
  sys.modules["__main__"] = types.ModuleType("__main__")
  try:
    yield
  finally:
    sys.modules["__main__"] = program


# The state of this process, if it is one of an executor.
_held: list = []


def _hold(state: object) -> None:
  _held[:] = [state]


def _call(work: Callable, item: object):
  return work(_held[0], item)
