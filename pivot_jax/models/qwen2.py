"""The Qwen2.5 decoder: embeddings in, hidden states out, with a KV cache.

It knows nothing of images, batches or losses; `mllm.py` builds the embeddings
and says which tokens see which.

Axes: R rows, T tokens, S cache slots, B blocks, E width, A query heads,
K key/value heads, H head dim, V vocabulary.
"""

import dataclasses
import typing

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pivot_jax.errors import InputError
from pivot_jax.models import attention, bounds, layers, sequences

_WIDTHS = (
  *("hidden_size", "intermediate_size", "head_dim"),
  *("num_attention_heads", "num_key_value_heads"),
)


@dataclasses.dataclass(frozen=True)
class LLMConfig:
  """The sizes and choices of a decoder; every field goes to model.json.

  initializer_range: standard deviation of fresh weights. Qwen2.5's 0.02 is for
    widths of 1,000 and more: at a width of 100, with tied embeddings, words
    that occur alike stay alike, and nothing is ever looked up or copied.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rope_theta: float
  rms_norm_eps: float
  tie_word_embeddings: bool
  initializer_range: float = 0.02

  @property
  def kernel_init(self) -> nn.initializers.Initializer:
    """The distribution of every fresh matrix and of the embedding table."""
    return nn.initializers.normal(self.initializer_range)

  def __post_init__(self):
    bounds.whole("vocab_size", self.vocab_size, bounds.VOCABULARY)
    bounds.whole("num_hidden_layers", self.num_hidden_layers, bounds.BLOCKS)
    for name in _WIDTHS:
      bounds.whole(name, vars(self)[name], bounds.WIDTH)
    bounds.real("rope_theta", self.rope_theta, 1, 1e15)
    bounds.real("rms_norm_eps", self.rms_norm_eps, 1e-30, 1)
    bounds.real("initializer_range", self.initializer_range, 0, 1e3)
    bounds.truth("tie_word_embeddings", self.tie_word_embeddings)
    if self.num_attention_heads % self.num_key_value_heads:
      raise InputError(
        f"num_attention_heads {self.num_attention_heads} is no multiple of"
        f" num_key_value_heads {self.num_key_value_heads}"
      )
    if self.head_dim % 2:
      raise InputError(f"head_dim {self.head_dim} is odd: it cannot rotate")


# Not checked: jax rebuilds it around whatever a tree function gives.
@typing.no_type_check
class Cache(flax.struct.PyTreeNode):
  """Keys and values of the tokens seen so far.

  keys, values: of every block, already rotated.
  valid: slots that hold a token.
  """

  keys: Float[Array, "B R K S H"]
  values: Float[Array, "B R K S H"]
  valid: Bool[Array, "R S"]


class Qwen2(nn.Module):
  """Embedding table, decoder blocks, final norm and head."""

  config: LLMConfig
  compute: layers.Compute

  def setup(self):
    config = self.config
    self.embed_tokens = Embedding(config)
    blocks = layers.stack(
      Block,
      compute=self.compute,
      length=config.num_hidden_layers,
      in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
    )
    self.layers = blocks(config, self.compute)
    self.norm = layers.RMSNorm(config.rms_norm_eps, self.compute.dtype)
    if not config.tie_word_embeddings:
      self.lm_head = Head(config)

  def embed(self, tokens: Int[Array, "R T"]) -> Float[Array, "R T E"]:
    """Look token ids up; an id outside the vocabulary gives NaN."""
    return self.embed_tokens(tokens).astype(self.compute.dtype)

  def head(self) -> Float[Array, "E V"]:
    """Return the output matrix in the compute dtype."""
    if self.config.tie_word_embeddings:
      kernel = self.embed_tokens.table().T
    else:
      kernel = self.lm_head()
    return kernel.astype(self.compute.dtype)

  def logits(self, hidden: Float[Array, "R E"]) -> Float[Array, "R V"]:
    """Return float32 logits; for generation, where only one token is read."""
    return jnp.einsum(
      "RE,EV->RV", hidden, self.head(), preferred_element_type=jnp.float32
    )

  def __call__(
    self,
    x: Float[Array, "R T E"],
    *,
    positions: Int[Array, "R T"],
    visible: Bool[Array, "R T T"] | sequences.Sequences,
  ) -> Float[Array, "R T E"]:
    """Return the hidden states after the final norm.

    `visible` is a mask of what a token may look at, or the causal sequences
    that say it.
    """
    x, _ = self.layers(x, self._angles(positions), visible, None, None)
    return self.norm(x)

  def extend(
    self,
    x: Float[Array, "R T E"],
    *,
    positions: Int[Array, "R T"],
    mask: Bool[Array, "R T S"],
    index: Int[Array, ""],
    cache: Cache,
  ) -> tuple[Float[Array, "R T E"], Cache]:
    """Write T tokens to the slots from `index` on and decode them.

    `mask` is over the slots of the cache, the new tokens' own included. The
    caller keeps `cache.valid`.
    """
    x, (keys, values) = self.layers(
      x, self._angles(positions), mask, (cache.keys, cache.values), index
    )
    return self.norm(x), cache.replace(keys=keys, values=values)

  def empty_cache(self, rows: int, slots: int) -> Cache:
    """Return a cache without tokens."""
    config = self.config
    shape = (
      config.num_hidden_layers,
      rows,
      config.num_key_value_heads,
      slots,
      config.head_dim,
    )
    return Cache(
      keys=jnp.zeros(shape, self.compute.dtype),
      values=jnp.zeros(shape, self.compute.dtype),
      valid=jnp.zeros((rows, slots), bool),
    )

  def _angles(self, positions):
    return layers.rotary_angles(
      positions, head_dim=self.config.head_dim, theta=self.config.rope_theta
    )


class Embedding(nn.Module):
  """The vectors of the vocabulary, looked up in float32.

  A token that occurs often has a gradient of many summands, and bfloat16 would
  stop adding at a few hundred of them.
  """

  config: LLMConfig

  def setup(self):
    shape = (self.config.vocab_size, self.config.hidden_size)
    self.embedding = self.param(
      "embedding", self.config.kernel_init, shape, jnp.float32
    )

  def __call__(self, tokens: Int[Array, "R T"]) -> Float[Array, "R T E"]:
    return jnp.take(self.embedding, tokens, axis=0)

  def table(self) -> Float[Array, "V E"]:
    """Return all vectors."""
    return self.embedding


class Head(nn.Module):
  """The output matrix of a model that does not tie it to the embeddings."""

  config: LLMConfig

  @nn.compact
  def __call__(self) -> Float[Array, "E V"]:
    shape = (self.config.hidden_size, self.config.vocab_size)
    return self.param("kernel", self.config.kernel_init, shape, jnp.float32)


class Block(nn.Module):
  """Pre-norm attention and gated MLP.

  Without a cache the second result is None; with one it is the block's keys
  and values, those of the new tokens written to the slots from `index` on.
  """

  config: LLMConfig
  compute: layers.Compute

  @nn.compact
  def __call__(self, x, angles, visible, past, index):
    config, compute = self.config, self.compute
    norm1 = layers.RMSNorm(
      config.rms_norm_eps, compute.dtype, name="input_layernorm"
    )
    self_attn = Attention(config, compute, name="self_attn")
    mixed, past = self_attn(norm1(x), angles, visible, past, index)
    x = x + mixed
    norm2 = layers.RMSNorm(
      config.rms_norm_eps, compute.dtype, name="post_attention_layernorm"
    )
    x = x + MLP(config, compute, name="mlp")(norm2(x))
    x = nn.with_logical_constraint(x, ("rows", "tokens", "embed"))
    self.sow("intermediates", "output", x)
    return x, past


class Attention(nn.Module):
  """Grouped-query attention; biases on q, k and v only."""

  config: LLMConfig
  compute: layers.Compute

  @nn.compact
  def __call__(self, x, angles, visible, past, index):
    config, dtype = self.config, self.compute.dtype

    def heads(name, count):
      y = layers.Linear(
        count * config.head_dim,
        name=name,
        dtype=dtype,
        kernel_init=config.kernel_init,
      )(x)
      y = rearrange(y, "R T (A H) -> R T A H", A=count)
      return nn.with_logical_constraint(y, ("rows", "tokens", "heads", None))

    q = layers.rotate(heads("q_proj", config.num_attention_heads), angles)
    k = layers.rotate(heads("k_proj", config.num_key_value_heads), angles)
    v = heads("v_proj", config.num_key_value_heads)
    if past is not None:
      fresh = (rearrange(y, "R T K H -> R K T H") for y in (k, v))
      past = tuple(
        jax.lax.dynamic_update_slice(old, new, (0, 0, index, 0))
        for old, new in zip(past, fresh, strict=True)
      )
      k, v = (rearrange(y, "R K S H -> R S K H") for y in past)
    mixed = rearrange(self._mix(q, k, v, visible), "R T A H -> R T (A H)")
    mixed = checkpoint_name(mixed, "context")
    output = layers.Linear(
      config.hidden_size,
      name="o_proj",
      dtype=dtype,
      kernel_init=config.kernel_init,
      bias_init=None,
    )
    return output(mixed), past

  def _mix(self, q, k, v, visible):
    if not isinstance(visible, sequences.Sequences):
      return attention.attend(q, k, v, visible)
    q, k, v = (sequences.unpack(x, visible) for x in (q, k, v))
    mixed = attention.attend_causal(
      q, k, v, visible.lengths, backend=self.compute.attention
    )
    return sequences.repack(mixed, visible)


class MLP(nn.Module):
  """down(silu(gate(x)) * up(x)), without biases."""

  config: LLMConfig
  compute: layers.Compute

  @nn.compact
  def __call__(self, x: Float[Array, "R T E"]) -> Float[Array, "R T E"]:
    config = self.config

    def project(name, features):
      return layers.Linear(
        features,
        name=name,
        dtype=self.compute.dtype,
        kernel_init=config.kernel_init,
        bias_init=None,
      )

    gate = jax.nn.silu(project("gate_proj", config.intermediate_size)(x))
    up = project("up_proj", config.intermediate_size)(x)
    return project("down_proj", config.hidden_size)(gate * up)
