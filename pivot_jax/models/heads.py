"""The small networks on top of patch features.

The projector into a language model, and the segmentation head of the patch
probe. Both are two linear layers around an exact (erf) GELU, initialised as
torch initialises `Linear`; what trains them is elsewhere.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pivot_jax.models import layers


class Projector(nn.Module):
  """Linear(D to E), erf GELU, Linear(E to E): LLaVA's `mlp2x_gelu`."""

  hidden_size: int
  compute: layers.Compute

  @nn.compact
  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
    return _two_linears(
      x, self.hidden_size, self.hidden_size, self.compute.dtype
    )


class SegmentationHead(nn.Module):
  """Linear(D to hidden), erf GELU, Linear(hidden to classes), per patch."""

  hidden_size: int
  classes: int
  compute: layers.Compute

  @nn.compact
  def __call__(
    self, x: Float[Array, "*batch D"]
  ) -> Float[Array, "*batch classes"]:
    return _two_linears(x, self.hidden_size, self.classes, self.compute.dtype)


def torch_linear_init(fan_in: int) -> nn.initializers.Initializer:
  """Return U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for a weight or its bias."""
  bound = fan_in**-0.5

  def init(rng: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32):
    return jax.random.uniform(rng, shape, dtype, -bound, bound)

  return init


def _two_linears(x, hidden, features, dtype):
  """Called inside a compact method: the layers belong to its module."""
  first, second = torch_linear_init(x.shape[-1]), torch_linear_init(hidden)
  x = layers.Linear(
    hidden,
    name="linear_1",
    dtype=dtype,
    kernel_init=first,
    bias_init=first,
  )(x)
  return layers.Linear(
    features,
    name="linear_2",
    dtype=dtype,
    kernel_init=second,
    bias_init=second,
  )(layers.gelu_erf(x))
