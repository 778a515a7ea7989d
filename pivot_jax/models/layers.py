"""The pieces that both towers are made of.

Norms, rotary embedding, linear layers, activations and the stack that repeats a
block. Nothing here knows a whole model, a batch or a mesh; attention itself is
in `attention.py`.

Axes: R rows (or images), T query tokens (or patches), S key tokens, D width,
A query heads, K key/value heads, G query heads that share one of them,
H head dim.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from pivot_jax.errors import InputError

# What the backward pass finds instead of computing it again, beside the input
# of each block; "context" is what attention gives out.
_POLICIES = {
  "attention": jax.checkpoint_policies.save_only_these_names("context"),
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("context"),
  ),
  "full": jax.checkpoint_policies.nothing_saveable,
}
REMATS = ("none", *_POLICIES)
ATTENTIONS = ("auto", "plain", "xla", "cudnn", "splash")


@dataclasses.dataclass(frozen=True)
class Compute:
  """The way a model is computed: its cost and rounding, never its function.

  dtype: of activations and of the matrix products; parameters, norms, softmax
    and logits stay float32.
  remat: what is computed again in the backward pass. "none": nothing; "dots":
    all but the linear layers and what attention gives out; "attention": all but
    what attention gives out; "full": all of a block but its input.
  scan: one compiled block in a loop, or False for the blocks laid out one
    after another (faster on a CPU with few layers). The parameter tree is the
    same.
  attention: "plain" masks all pairs of a packed row; the others attend in its
    plain causal sequences, by XLA ("xla", which masks the row where that is
    fewer scores), cuDNN's flash attention ("cudnn", GPU) or the splash kernel
    ("splash", TPU). "auto" is settled by `attention.choose`.
  """

  dtype: str = "float32"
  remat: str = "none"
  scan: bool = True
  attention: str = "plain"

  def __post_init__(self):
    for name, choices in (
      ("dtype", ("float32", "bfloat16")),
      ("remat", REMATS),
      ("attention", ATTENTIONS),
    ):
      value = vars(self)[name]
      if value not in choices:
        raise InputError(f"compute.{name}={value!r}: choose one of {choices}")


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Return x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
  return x * jax.nn.sigmoid(1.702 * x)


def gelu_erf(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Return the exact GELU, which torch calls `gelu`."""
  return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Return the GELU with the tanh approximation."""
  return jax.nn.gelu(x, approximate=True)


# Named as Hugging Face's `hidden_act`.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": gelu_erf,
  "gelu_pytorch_tanh": gelu_tanh,
  "quick_gelu": quick_gelu,
  "silu": jax.nn.silu,
}


def along_last(
  vector: Float[Array, "D"], x: Float[Array, "*batch D"]
) -> Float[Array, "*ones D"]:
  """Return a vector with the rank of `x`, along its last axis."""
  return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


class LayerNorm(nn.Module):
  """Layer norm with float32 statistics, in two passes as torch does."""

  epsilon: float
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    width = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x).mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(variance + self.epsilon)
    x = x * along_last(scale, x) + along_last(bias, x)
    return x.astype(self.dtype)


class RMSNorm(nn.Module):
  """Root-mean-square norm with float32 statistics and no bias."""

  epsilon: float
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    scale = self.param(
      "scale", nn.initializers.ones, (x.shape[-1],), jnp.float32
    )
    x = x.astype(jnp.float32)
    mean_square = jnp.square(x).mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + self.epsilon) * along_last(scale, x)
    return x.astype(self.dtype)


class Linear(nn.Module):
  """x @ kernel + bias in float32 parameters; no bias if `bias_init` is None.

  Tokens are one axis in the product. With rows and tokens apart XLA lays the
  gradient of the kernel out anew, and on a CPU that takes as long as the
  products themselves.
  """

  features: int
  dtype: str
  kernel_init: nn.initializers.Initializer
  bias_init: nn.initializers.Initializer | None = nn.initializers.zeros

  @nn.compact
  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch F"]:
    shape = (x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    flat = x.astype(self.dtype).reshape(-1, x.shape[-1])
    y = flat @ kernel.astype(self.dtype)
    if self.bias_init is not None:
      bias = self.param("bias", self.bias_init, shape[-1:], jnp.float32)
      # In float32, so that its gradient is summed over tokens in float32.
      y = (y.astype(jnp.float32) + bias[None]).astype(self.dtype)
    return y.reshape(*x.shape[:-1], self.features)


def rotary_angles(
  positions: Int[Array, "R T"], *, head_dim: int, theta: float
) -> Float[Array, "R T half"]:
  """Return the rotation angle of each pair of channels, in float32 radians."""
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  return (
    positions[..., None].astype(jnp.float32) / (theta**exponent)[None, None]
  )


def rotate(
  x: Float[Array, "R T A H"], angles: Float[Array, "R T half"]
) -> Float[Array, "R T A H"]:
  """Rotate channel i with channel i + H/2 (half-split, not interleaved)."""
  cos = jnp.cos(angles)[:, :, None, :]
  sin = jnp.sin(angles)[:, :, None, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)


def resize_tokens(
  x: Float[Array, "N P D"], tokens: int
) -> Float[Array, "N tokens D"]:
  """Resize a square grid of features bilinearly, in float32.

  As torch's `interpolate` without aligned corners and without antialiasing,
  which the paper's code calls (paper.md 1.4).
  """
  weights = _bilinear(math.isqrt(x.shape[1]), math.isqrt(tokens))
  grid = rearrange(
    x.astype(jnp.float32), "N (h w) D -> N h w D", h=weights.shape[1]
  )
  grid = jnp.einsum("ih,jw,NhwD->NijD", weights, weights, grid)
  return rearrange(grid, "N i j D -> N (i j) D").astype(x.dtype)


def _bilinear(old: int, new: int) -> np.ndarray:
  """Return the matrix [new, old] that resizes one axis."""
  centre = np.maximum((np.arange(new) + 0.5) * old / new - 0.5, 0)
  low = np.floor(centre).astype(int)
  high = np.minimum(low + 1, old - 1)
  weights = np.zeros((new, old))
  np.add.at(weights, (np.arange(new), low), 1 - (centre - low))
  np.add.at(weights, (np.arange(new), high), centre - low)
  return weights.astype(np.float32)


def stack(
  block: type[nn.Module], *, compute: Compute, length: int, in_axes: tuple
) -> Callable[..., nn.Module]:
  """Return the module class of `length` blocks, parameters stacked on axis 0.

  A block maps (carry, *inputs) to (carry, output); `in_axes` says for each
  input whether all blocks share it (nn.broadcast) or axis 0 counts the blocks.
  What a block sows under "intermediates" comes back stacked likewise.
  """
  if compute.remat != "none":
    # Inside a loop nothing can be merged with the forward pass; outside, XLA
    # would undo the recomputation without this barrier.
    block = nn.remat(
      block, prevent_cse=not compute.scan, policy=_POLICIES[compute.remat]
    )
  return nn.scan(
    block,
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True},
    # An axis for each input; the stub knows one for all of them only.
    in_axes=in_axes,  # pyright: ignore[reportArgumentType]
    length=length,
    unroll=1 if compute.scan else length,
  )


def logical_rules(
  rules: Sequence[tuple[str, str | tuple[str, ...] | None]],
) -> contextlib.AbstractContextManager[None]:
  """Return a context in which logical axes mean the given mesh axes."""
  return nn.logical_axis_rules(rules)
