"""Vision transformer of the SigLIP family: uint8 images to patch features.

One module and one frozen dataclass of choices. Resizing is not done here
(`data/images.py`), nor the projection to a language model (`heads.py`).

Axes: N images, P patches, D width, A heads, H head dim, p q the two sides of a
patch, C colours, h w the patch grid.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from pivot_jax.errors import InputError
from pivot_jax.models import layers

_LINEAR_INIT = nn.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """What an encoder computes; every field goes to model.json.

  feature_layer: index into the N + 1 hidden states as transformers counts
    them (0 is the embedding); -2 is the output of block N-1. Blocks behind it
    do not exist here.
  final_norm: whether the last norm is applied to the features. Both defaults
    are the paper's for SigLIP (penultimate block, no norm).
  image_mean, image_std: of the channels after division by 255.
  """

  image_size: int
  patch_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  feature_layer: int = -2
  final_norm: bool = False
  hidden_act: str = "gelu_pytorch_tanh"
  layer_norm_eps: float = 1e-6
  image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

  def __post_init__(self):
    # JSON gives lists; a config must stay hashable.
    object.__setattr__(self, "image_mean", tuple(self.image_mean))
    object.__setattr__(self, "image_std", tuple(self.image_std))
    if not 1 <= self.used_layers <= self.num_hidden_layers:
      raise InputError(
        f"feature_layer {self.feature_layer} of {self.num_hidden_layers}"
        f" blocks leaves {self.used_layers} blocks"
      )
    if self.hidden_size % self.num_attention_heads:
      raise InputError(
        f"hidden_size {self.hidden_size} is no multiple of"
        f" num_attention_heads {self.num_attention_heads}"
      )
    if self.hidden_act not in layers.ACTIVATIONS:
      raise InputError(
        f"hidden_act {self.hidden_act!r} is none of"
        f" {sorted(layers.ACTIVATIONS)}"
      )

  @property
  def num_patches(self) -> int:
    """Patch tokens of an image; pixels beyond the last whole patch are cut."""
    return (self.image_size // self.patch_size) ** 2

  @property
  def used_layers(self) -> int:
    """Blocks that are computed: N-1 for feature_layer -2."""
    if self.feature_layer < 0:
      return self.num_hidden_layers + 1 + self.feature_layer
    return self.feature_layer


class ViT(nn.Module):
  """Encodes images to the features of the chosen layer."""

  config: VisionConfig
  compute: layers.Compute

  @nn.compact
  def __call__(self, images: UInt8[Array, "N H W 3"]) -> Float[Array, "N P D"]:
    config = self.config
    size = config.image_size
    if images.shape[1:] != (size, size, 3):
      raise ValueError(
        f"images are {images.shape[1:]}, the encoder reads {(size, size, 3)}"
      )
    x = Embeddings(config, self.compute, name="embeddings")(
      normalize(images, config)
    )
    x = nn.with_logical_constraint(x, ("rows", "patches", "embed"))
    x = Encoder(config, self.compute, name="encoder")(x)
    if config.final_norm:
      x = layers.LayerNorm(
        config.layer_norm_eps, self.compute.dtype, name="post_layernorm"
      )(x)
    return x


def normalize(
  images: UInt8[Array, "N H W C"], config: VisionConfig
) -> Float[Array, "N H W C"]:
  """Returns (images / 255 - mean) / std in float32."""
  mean = jnp.asarray(config.image_mean, jnp.float32)
  std = jnp.asarray(config.image_std, jnp.float32)
  return (images.astype(jnp.float32) / 255.0 - mean) / std


class Embeddings(nn.Module):
  """Patch embedding plus one learned vector per patch position."""

  config: VisionConfig
  compute: layers.Compute

  @nn.compact
  def __call__(self, pixels: Float[Array, "N H W C"]) -> Float[Array, "N P D"]:
    x = PatchEmbedding(self.config, self.compute, name="patch_embedding")(
      pixels
    )
    return PositionEmbedding(self.compute, name="position_embedding")(x)


class PatchEmbedding(nn.Module):
  """Convolution whose stride is its kernel, written as one matrix product.

  The product is several times faster than XLA's convolution on a CPU, forward
  and backward, and the same on an accelerator.
  """

  config: VisionConfig
  compute: layers.Compute

  @nn.compact
  def __call__(self, pixels: Float[Array, "N H W C"]) -> Float[Array, "N P D"]:
    side, width = self.config.patch_size, self.config.hidden_size
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(in_axis=(0, 1, 2)),
      (side, side, 3, width),
      jnp.float32,
    )
    bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
    grid = self.config.image_size // side
    patches = rearrange(
      pixels[:, : grid * side, : grid * side],
      "N (h p) (w q) C -> N (h w) (p q C)",
      p=side,
      q=side,
    )
    dtype = self.compute.dtype
    kernel = rearrange(kernel, "p q C D -> (p q C) D").astype(dtype)
    return patches.astype(dtype) @ kernel + bias.astype(dtype)


class PositionEmbedding(nn.Module):
  """Adds one learned vector per patch position."""

  compute: layers.Compute

  @nn.compact
  def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N P D"]:
    embedding = self.param(
      "embedding",
      nn.initializers.normal(x.shape[-1] ** -0.5),
      x.shape[1:],
      jnp.float32,
    )
    return x + embedding.astype(self.compute.dtype)


class Encoder(nn.Module):
  """The blocks that are read, and none behind them."""

  config: VisionConfig
  compute: layers.Compute

  @nn.compact
  def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N P D"]:
    blocks = layers.stack(
      Block, compute=self.compute, length=self.config.used_layers, in_axes=()
    )
    x, _ = blocks(self.config, self.compute, name="layers")(x)
    return x


class Block(nn.Module):
  """Pre-norm attention and MLP."""

  config: VisionConfig
  compute: layers.Compute

  @nn.compact
  def __call__(
    self, x: Float[Array, "N P D"]
  ) -> tuple[Float[Array, "N P D"], None]:
    config, compute = self.config, self.compute
    norm1 = layers.LayerNorm(
      config.layer_norm_eps, compute.dtype, name="layer_norm1"
    )
    x = x + Attention(config, compute, name="self_attn")(norm1(x))
    norm2 = layers.LayerNorm(
      config.layer_norm_eps, compute.dtype, name="layer_norm2"
    )
    x = x + MLP(config, compute, name="mlp")(norm2(x))
    x = nn.with_logical_constraint(x, ("rows", "patches", "embed"))
    self.sow("intermediates", "output", x)
    return x, None


class Attention(nn.Module):
  """Full attention among the patches of an image, all projections biased."""

  config: VisionConfig
  compute: layers.Compute

  @nn.compact
  def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N P D"]:
    def project(name):
      return layers.linear(
        self.config.hidden_size,
        name=name,
        dtype=self.compute.dtype,
        kernel_init=_LINEAR_INIT,
      )

    def heads(name):
      y = rearrange(
        project(name)(x),
        "N P (A H) -> N P A H",
        A=self.config.num_attention_heads,
      )
      return nn.with_logical_constraint(y, ("rows", "patches", "heads", None))

    mixed = layers.attend(
      heads("q_proj"), heads("k_proj"), heads("v_proj"), None
    )
    return project("out_proj")(rearrange(mixed, "N P A H -> N P (A H)"))


class MLP(nn.Module):
  """fc1, activation, fc2."""

  config: VisionConfig
  compute: layers.Compute

  @nn.compact
  def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N P D"]:
    config, dtype = self.config, self.compute.dtype
    x = layers.linear(
      config.intermediate_size,
      name="fc1",
      dtype=dtype,
      kernel_init=_LINEAR_INIT,
    )(x)
    x = layers.ACTIVATIONS[config.hidden_act](x)
    return layers.linear(
      config.hidden_size, name="fc2", dtype=dtype, kernel_init=_LINEAR_INIT
    )(x)
