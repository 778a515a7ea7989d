"""RL makes MLLMs see better than SFT, in JAX: `load` and `save` of weights.

  import pivot_jax
  loaded = pivot_jax.load("package:toy:vision")
  pivot_jax.save(folder, loaded.params, meta=loaded.meta)

Both are those of `pivot_jax.checkpoint`, imported on first use: a wrong flag of
the command is answered before jax is.
"""

from typing import Any

__all__ = ("load", "save")


def __getattr__(name: str) -> Any:
  if name in __all__:
    from pivot_jax import checkpoint

    return getattr(checkpoint, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
