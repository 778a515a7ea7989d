"""The key-value store of jax's coordination service, which processes share.

It has time-outs and needs no device. jax gives it no public name: this is the
one place that takes it from inside (the same in jax 0.10 to 0.12; orbax does so,
too).
"""

from typing import Any

import jax


def state() -> Any:
  """Return jax's state: process_id, num_processes, coordinator_address."""
  from jax._src import distributed

  return distributed.global_state


def put(key: str, text: str) -> None:
  """Put a text under a key that is new."""
  state().client.key_value_set(key, text)


def get(key: str, seconds: float) -> str | None:
  """Return what a process puts under a key, None if it does not in time."""
  wait = max(1, int(seconds * 1000))
  try:
    return state().client.blocking_key_value_get(key, wait)
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    return None


def peek(key: str) -> str | None:
  """Return what is under a key now, None if nothing is."""
  try:
    return state().client.key_value_try_get(key)
  except jax.errors.JaxRuntimeError as error:
    if "NOT_FOUND" not in str(error):
      raise
    return None


def delete(folder: str) -> None:
  """Delete all keys that begin with a folder."""
  state().client.key_value_delete(folder)
