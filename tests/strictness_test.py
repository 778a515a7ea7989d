"""The strictness that `conftest.py` turns on is on."""

import importlib.util

import jax.numpy as jnp
import jaxtyping
import pytest

from pivot_jax.training import losses
from tests import conftest


def test_every_checked_module_is_there():
  assert all(map(importlib.util.find_spec, conftest.CHECKED))


def test_an_array_of_another_shape_raises():
  right, wrong = jnp.zeros((3, 2)), jnp.zeros((4, 2))
  losses.dpo(right, right, jnp.zeros(3), beta=0.1)
  with pytest.raises(jaxtyping.TypeCheckError, match="reference"):
    losses.dpo(right, wrong, jnp.zeros(3), beta=0.1)


def test_an_array_of_another_dtype_raises():
  with pytest.raises(jaxtyping.TypeCheckError, match="weight"):
    losses.sft(jnp.zeros(3), jnp.zeros(3, int))


def test_adding_a_vector_to_a_matrix_raises():
  with pytest.raises(ValueError, match="rank_promotion"):
    jnp.zeros((3, 2)) + jnp.zeros(2)
