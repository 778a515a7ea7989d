"""Work that is spread over processes."""

import os

import pytest

from pivot_jax.data import pool
from pivot_jax.errors import InputError


def _scaled(factor: int, item: int) -> tuple[int, int]:
  return factor * item, os.getpid()


def _ended(factor: int, item: int) -> int:
  os._exit(factor + item)


def test_results_come_in_order_from_other_processes():
  found = list(pool.results(_scaled, 3, range(7), processes=2, broken=""))
  assert [value for value, _ in found] == [0, 3, 6, 9, 12, 15, 18]
  assert os.getpid() not in {process for _, process in found}


def test_a_process_that_ends_is_an_error_of_the_input():
  with pytest.raises(InputError, match="rows were read"):
    list(
      pool.results(_ended, 1, range(3), processes=1, broken="rows were read")
    )
