"""RL makes MLLMs see better than SFT, in JAX: `load` and `save` of weights.

  import pivot_jax
  loaded = pivot_jax.load("package:toy:vision")
  pivot_jax.save("out", loaded.params, meta=loaded.meta)

jax is imported when one of them is called: the command answers a wrong flag
before that.
"""

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from pivot_jax import checkpoint


def load(address: str) -> "checkpoint.Loaded":
  """Returns what `pivot_jax.checkpoint.load` finds at an address."""
  from pivot_jax import checkpoint

  return checkpoint.load(address)


def save(
  folder: str | pathlib.Path, params: Any, *, meta: Mapping[str, Any]
) -> None:
  """Writes an artifact that `load` reads, as `pivot_jax.checkpoint.save`."""
  from pivot_jax import checkpoint

  checkpoint.save(pathlib.Path(folder), params, meta=meta)
