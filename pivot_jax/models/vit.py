"""Vision transformers: uint8 images to patch features.

One module for SigLIP 1 and 2, CLIP, DINOv2, MAE, MoCo-v3 and supervised ViT,
and one frozen dataclass of choices in which they differ. Resizing is not done
here (`data/images.py`), nor the projection to a language model (`heads.py`).

Axes: N images, P patches (or feature tokens), T tokens (patches, and the class
token before them if there is one), D width, A heads, H head dim, p q the two
sides of a patch, C colours, h w the patch grid.
"""

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Num

from pivot_jax.errors import InputError
from pivot_jax.models import attention, bounds, layers

FAMILIES = ("siglip", "clip", "dinov2", "vit", "vit_mae")

_TRUTHS = (
  *("final_norm", "class_token", "patch_bias", "pre_norm", "layer_scale"),
  "gated_mlp",
)
_LINEAR_INIT = nn.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The sizes and choices of an encoder; every field goes to model.json.

  feature_layer: index into the N + 1 hidden states as transformers counts
    them (0 is the embedding); -2 is the output of block N-1. Blocks behind it
    do not exist here.
  final_norm: whether the last norm is applied to the features. Both defaults
    are the paper's for SigLIP (penultimate block, no norm).
  image_mean, image_std: of the channels after division by 255.
  family: whose names and files it goes by: siglip (1 and 2), clip, dinov2, vit
    (supervised and MoCo-v3) or vit_mae.
  class_token: a learned token before the patches, with a position of its own;
    it is no feature.
  patch_bias: whether the patch embedding has a bias.
  pre_norm: a norm before the first block (CLIP).
  layer_scale: a learned factor per channel on each residual (DINOv2).
  gated_mlp: down(silu(gate(x)) * up(x)) instead of fc2(act(fc1(x))) (DINOv2-g).
  feature_tokens: features per image after bilinear interpolation of the patch
    grid, a square number (paper 1.4, `-interpN`); 0 keeps the patches.
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
  image_mean: Sequence[float] = (0.5, 0.5, 0.5)
  image_std: Sequence[float] = (0.5, 0.5, 0.5)
  family: str = "siglip"
  class_token: bool = False
  patch_bias: bool = True
  pre_norm: bool = False
  layer_scale: bool = False
  gated_mlp: bool = False
  feature_tokens: int = 0

  def __post_init__(self):
    bounds.whole("image_size", self.image_size, bounds.PIXELS)
    bounds.whole("patch_size", self.patch_size, self.image_size)
    bounds.whole("hidden_size", self.hidden_size, bounds.WIDTH)
    bounds.whole("intermediate_size", self.intermediate_size, bounds.WIDTH)
    bounds.whole("num_hidden_layers", self.num_hidden_layers, bounds.BLOCKS)
    heads = self.num_attention_heads
    bounds.whole("num_attention_heads", heads, self.hidden_size)
    if self.hidden_size % heads:
      raise InputError(
        f"hidden_size {self.hidden_size} is no multiple of"
        f" num_attention_heads {heads}"
      )
    most = bounds.BLOCKS
    bounds.whole("feature_layer", self.feature_layer, most, least=-most)
    if not 1 <= self.used_layers <= self.num_hidden_layers:
      raise InputError(
        f"feature_layer {self.feature_layer} of {self.num_hidden_layers}"
        f" blocks leaves {self.used_layers} blocks"
      )
    bounds.word("hidden_act", self.hidden_act, layers.ACTIVATIONS)
    bounds.real("layer_norm_eps", self.layer_norm_eps, 1e-30, 1)
    # JSON gives lists; a config must stay hashable.
    mean = bounds.mean("image_mean", self.image_mean)
    object.__setattr__(self, "image_mean", mean)
    std = bounds.std("image_std", self.image_std)
    object.__setattr__(self, "image_std", std)
    bounds.word("family", self.family, FAMILIES)
    for name in _TRUTHS:
      bounds.truth(name, vars(self)[name])
    tokens = bounds.whole(
      "feature_tokens", self.feature_tokens, bounds.WIDTH, least=0
    )
    if math.isqrt(tokens) ** 2 != tokens:
      raise InputError(f"feature_tokens {tokens} is no square number")

  @property
  def grid(self) -> int:
    """Patches along a side; pixels beyond the last whole patch are cut."""
    return self.image_size // self.patch_size

  @property
  def positions(self) -> int:
    """Rows of the position table: one a patch, and one for a class token."""
    return self.grid**2 + self.class_token

  @property
  def num_patches(self) -> int:
    """Features of an image, the tokens that a language model reads."""
    return self.feature_tokens or self.grid**2

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
  def __call__(self, images: Num[Array, "N H W 3"]) -> Float[Array, "N P D"]:
    config = self.config
    size = config.image_size
    if images.shape[1:] != (size, size, 3):
      raise ValueError(
        f"images are {images.shape[1:]}, the encoder reads {(size, size, 3)}"
      )
    x = Embeddings(config, self.compute, name="embeddings")(
      normalize(images, config)
    )

    def norm(name):
      return layers.LayerNorm(
        config.layer_norm_eps, self.compute.dtype, name=name
      )

    if config.pre_norm:
      # The name is CLIP's own, as its files have it.
      x = norm("pre_layrnorm")(x)
    x = nn.with_logical_constraint(x, ("rows", "patches", "embed"))
    x = Encoder(config, self.compute, name="encoder")(x)
    if config.final_norm:
      x = norm("post_layernorm")(x)
    if config.class_token:
      x = x[:, 1:]
    if config.feature_tokens:
      x = layers.resize_tokens(x, config.feature_tokens)
    return x


def normalize(
  images: Num[Array, "N H W C"], config: VisionConfig
) -> Float[Array, "N H W C"]:
  """Return (images / 255 - mean) / std in float32."""
  mean = jnp.asarray(config.image_mean, jnp.float32)
  std = jnp.asarray(config.image_std, jnp.float32)
  x = images.astype(jnp.float32) / 255.0
  return (x - layers.along_last(mean, x)) / layers.along_last(std, x)


class Embeddings(nn.Module):
  """Patches, a class token before them if there is one, and positions."""

  config: VisionConfig
  compute: layers.Compute

  @nn.compact
  def __call__(self, pixels: Float[Array, "N H W C"]) -> Float[Array, "N T D"]:
    config = self.config
    x = PatchEmbedding(config, self.compute, name="patch_embedding")(pixels)
    if config.class_token:
      token = self.param(
        "class_embedding",
        nn.initializers.normal(config.hidden_size**-0.5),
        (config.hidden_size,),
        jnp.float32,
      )
      token = jnp.broadcast_to(token, (len(x), 1, len(token)))
      x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
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
    grid = self.config.grid
    patches = rearrange(
      pixels[:, : grid * side, : grid * side],
      "N (h p) (w q) C -> (N h w) (p q C)",
      p=side,
      q=side,
    )
    dtype = self.compute.dtype
    kernel = rearrange(kernel, "p q C D -> (p q C) D").astype(dtype)
    x = patches.astype(dtype) @ kernel
    x = x.reshape(len(pixels), grid**2, width)
    if not self.config.patch_bias:
      return x
    bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
    return (x.astype(jnp.float32) + bias[None, None]).astype(dtype)


class PositionEmbedding(nn.Module):
  """Adds one learned vector per position."""

  compute: layers.Compute

  @nn.compact
  def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
    embedding = self.param(
      "embedding",
      nn.initializers.normal(x.shape[-1] ** -0.5),
      x.shape[1:],
      jnp.float32,
    )
    return (x.astype(jnp.float32) + embedding[None]).astype(self.compute.dtype)


class Encoder(nn.Module):
  """The blocks that are read, and none behind them."""

  config: VisionConfig
  compute: layers.Compute

  @nn.compact
  def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
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
    self, x: Float[Array, "N T D"]
  ) -> tuple[Float[Array, "N T D"], None]:
    config, compute = self.config, self.compute
    norm1 = layers.LayerNorm(
      config.layer_norm_eps, compute.dtype, name="layer_norm1"
    )
    mixed = Attention(config, compute, name="self_attn")(norm1(x))
    x = x + self._scale("layer_scale1", mixed)
    norm2 = layers.LayerNorm(
      config.layer_norm_eps, compute.dtype, name="layer_norm2"
    )
    mlp = GatedMLP if config.gated_mlp else MLP
    x = x + self._scale(
      "layer_scale2", mlp(config, compute, name="mlp")(norm2(x))
    )
    x = nn.with_logical_constraint(x, ("rows", "patches", "embed"))
    self.sow("intermediates", "output", x)
    return x, None

  def _scale(self, name, x):
    return LayerScale(name=name)(x) if self.config.layer_scale else x


class LayerScale(nn.Module):
  """A learned factor per channel."""

  @nn.compact
  def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
    factor = self.param(
      "lambda1", nn.initializers.ones, x.shape[-1:], jnp.float32
    )
    return (x.astype(jnp.float32) * factor[None, None]).astype(x.dtype)


class Attention(nn.Module):
  """Full attention among the patches of an image, all projections biased."""

  config: VisionConfig
  compute: layers.Compute

  @nn.compact
  def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
    def project(name):
      return layers.Linear(
        self.config.hidden_size,
        name=name,
        dtype=self.compute.dtype,
        kernel_init=_LINEAR_INIT,
      )

    def heads(name):
      y = rearrange(
        project(name)(x),
        "N T (A H) -> N T A H",
        A=self.config.num_attention_heads,
      )
      return nn.with_logical_constraint(y, ("rows", "patches", "heads", None))

    mixed = attention.attend_all(
      heads("q_proj"),
      heads("k_proj"),
      heads("v_proj"),
      backend=self.compute.attention,
    )
    mixed = rearrange(mixed, "N T A H -> N T (A H)")
    return project("out_proj")(checkpoint_name(mixed, "context"))


class MLP(nn.Module):
  """fc1, activation, fc2."""

  config: VisionConfig
  compute: layers.Compute

  @nn.compact
  def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
    config, dtype = self.config, self.compute.dtype
    x = layers.Linear(
      config.intermediate_size,
      name="fc1",
      dtype=dtype,
      kernel_init=_LINEAR_INIT,
    )(x)
    x = layers.ACTIVATIONS[config.hidden_act](x)
    return layers.Linear(
      config.hidden_size, name="fc2", dtype=dtype, kernel_init=_LINEAR_INIT
    )(x)


class GatedMLP(nn.Module):
  """down(silu(gate(x)) * up(x)), all three biased."""

  config: VisionConfig
  compute: layers.Compute

  @nn.compact
  def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
    def project(name, features):
      return layers.Linear(
        features,
        name=name,
        dtype=self.compute.dtype,
        kernel_init=_LINEAR_INIT,
      )

    inner = self.config.intermediate_size
    gate = jax.nn.silu(project("gate_proj", inner)(x))
    return project("down_proj", self.config.hidden_size)(
      gate * project("up_proj", inner)(x)
    )
