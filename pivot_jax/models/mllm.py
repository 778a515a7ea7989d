"""The multimodal model: encode images, place them among the tokens, decode.

It says how a packed batch becomes hidden states. Losses, sampling and which
parameters train are not its business. A model without a vision tower is a
language model, one without a language model an encoder; the projector exists
if both do. Batches are read by field name: tokens, positions, segments,
branches, image_index and images; and, unless `compute.attention` is plain,
sequences and copies.

Axes: R rows, T tokens, I images of a row, N images, P patches, D vision width,
E llm width, V vocabulary, S cache slots.
"""

import dataclasses
import types
from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Num, PyTree, UInt8

from pivot_jax.models import (
  attention,
  heads,
  layers,
  qwen2,
  sequences,
  vit,
)


@runtime_checkable
class Rows(Protocol):
  """The fields of a packed batch that every model reads."""

  @property
  def tokens(self) -> Int[Array, "R T"]: ...
  @property
  def positions(self) -> Int[Array, "R T"]: ...
  @property
  def segments(self) -> Int[Array, "R T"]: ...
  @property
  def branches(self) -> Int[Array, "R T"]: ...
  @property
  def image_index(self) -> Int[Array, "R T"]: ...
  @property
  def images(self) -> UInt8[Array, "R I H W 3"]: ...


class MLLM(nn.Module):
  """Vision encoder, projector and decoder, each method pure under `apply`."""

  llm: qwen2.LLMConfig | None
  vision: vit.VisionConfig | None
  compute: layers.Compute = layers.Compute()

  def setup(self):
    self.parts = _Parts(self.llm, self.vision, self.compute)
    # The fields `llm` and `vision` hold configs, and the parameters go by the
    # same names: the modules live one level down and share this one's scope.
    nn.share_scope(self, self.parts)

  def encode(self, images: Num[Array, "N H W 3"]) -> Float[Array, "N P D"]:
    """Return the patch features of the layer that the config names.

    Pixels are 0 to 255, uint8 or, to differentiate by them, floats.
    """
    return self.parts.vision(images)

  def project(
    self, features: Float[Array, "*batch P D"]
  ) -> Float[Array, "*batch P E"]:
    """Map patch features to the width of the language model."""
    return self.parts.projector(features)

  def see(
    self, images: Num[Array, "R I H W 3"]
  ) -> Float[Array, "R IP E"] | None:
    """Encode and projects a batch's images; None for a text-only batch."""
    rows, count = images.shape[:2]
    if count == 0 or self.vision is None:
      return None
    features = self.encode(rearrange(images, "R I H W C -> (R I) H W C"))
    return rearrange(self.project(features), "(R I) P E -> R (I P) E", R=rows)

  def embed(
    self, visual: Float[Array, "R IP E"] | None, batch: Rows
  ) -> Float[Array, "R T E"]:
    """Return token embeddings with image features at the image positions.

    A position with image_index >= 0 takes that entry of its row's `visual`;
    padding (segment 0) is zero.
    """
    is_image = batch.image_index >= 0
    present = batch.segments > 0
    # The ids at image positions and in the padding are placeholders.
    x = self.parts.llm.embed(jnp.where(present & ~is_image, batch.tokens, 0))
    if visual is not None:
      index = jnp.maximum(batch.image_index, 0)[..., None]
      placed = jnp.take_along_axis(visual, index, axis=1).astype(x.dtype)
      x = jnp.where(is_image[..., None], placed, x)
    x = jnp.where(present[..., None], x, 0)
    return nn.with_logical_constraint(x, ("rows", "tokens", "embed"))

  def decode(
    self, embeddings: Float[Array, "R T E"], batch: Rows
  ) -> Float[Array, "R T E"]:
    """Return the hidden states after the final norm, never the logits."""
    return self.parts.llm(
      embeddings,
      positions=batch.positions,
      visible=_visible(batch, self.compute.attention),
    )

  def head(self) -> Float[Array, "E V"]:
    """Return the matrix from hidden states to logits."""
    return self.parts.llm.head()

  def prefill(
    self, embeddings: Float[Array, "R T E"], batch: Rows, cache_len: int
  ) -> tuple[Float[Array, "R T E"], qwen2.Cache]:
    """Decode the prompts and keep their keys and values in slots 0..T-1.

    Rows hold one example each. `cache_len` counts all slots, at least T.
    """
    rows, tokens = batch.tokens.shape
    if cache_len < tokens:
      raise ValueError(f"{tokens} tokens do not fit {cache_len} cache slots")
    spare = ((0, 0), (0, cache_len - tokens))
    mask = attention_mask(batch.segments, batch.branches)
    hidden, cache = self.parts.llm.extend(
      embeddings,
      positions=batch.positions,
      mask=jnp.pad(mask, ((0, 0), *spare)),
      index=jnp.int32(0),
      cache=self.parts.llm.empty_cache(rows, cache_len),
    )
    return hidden, cache.replace(valid=jnp.pad(batch.segments > 0, spare))

  def decode_step(
    self,
    tokens: Int[Array, "R"],
    position: Int[Array, "R"],
    index: Int[Array, ""],
    cache: qwen2.Cache,
  ) -> tuple[Float[Array, "R V"], qwen2.Cache]:
    """Append one token to each row, in slot `index`; return next logits."""
    cache = cache.replace(valid=cache.valid.at[:, index].set(True))
    hidden, cache = self.parts.llm.extend(
      self.parts.llm.embed(tokens[:, None]),
      positions=position[:, None],
      mask=cache.valid[:, None],
      index=index,
      cache=cache,
    )
    return self.parts.llm.logits(hidden[:, 0]), cache

  def logits(self, hidden: Float[Array, "R E"]) -> Float[Array, "R V"]:
    """Return float32 logits of one hidden state per row."""
    return self.parts.llm.logits(hidden)

  def __call__(self, batch: Rows) -> Float[Array, "..."]:
    """Touch every parameter, for `init`; return the hidden states.

    Without a language model it returns the features [R, I, P, D].
    """
    if self.llm is None:
      rows = batch.images.shape[0]
      flat = rearrange(batch.images, "R I H W C -> (R I) H W C")
      return rearrange(self.encode(flat), "(R I) P D -> R I P D", R=rows)
    hidden = self.decode(self.embed(self.see(batch.images), batch), batch)
    self.head()
    return hidden


class _Parts(nn.Module):
  """Holds the submodules under the names of the parameter tree."""

  llm_config: qwen2.LLMConfig | None
  vision_config: vit.VisionConfig | None
  compute: layers.Compute

  def setup(self):
    if self.vision_config is not None:
      self.vision = vit.ViT(self.vision_config, self.compute)
    if self.llm_config is not None:
      self.llm = qwen2.Qwen2(self.llm_config, self.compute)
    if self.vision_config is not None and self.llm_config is not None:
      self.projector = heads.Projector(
        self.llm_config.hidden_size, self.compute
      )


def _visible(batch, backend):
  """Return what says which tokens see which: a mask or causal sequences.

  XLA computes every score of either, so it is given whichever has fewer.
  """
  if backend == "xla":
    _, count, length = batch.sequences.shape
    backend = "plain" if count * length**2 >= batch.tokens.shape[1] ** 2 else ""
  if backend == "plain":
    return attention_mask(batch.segments, batch.branches)
  return sequences.Sequences(batch.sequences, batch.copies)


def attention_mask(
  segments: Int[Array, "R T"], branches: Int[Array, "R T"]
) -> Bool[Array, "R T T"]:
  """Say which tokens i (axis 1) may look at which tokens j (axis 2).

  i sees j if j is not later, both belong to the same example, and j is of the
  prompt (branch 0) or of i's own answer. Padding sees nothing.
  """
  tokens = segments.shape[1]
  causal = jnp.tril(jnp.ones((tokens, tokens), bool))
  example = segments[:, :, None] == segments[:, None, :]
  present = (segments > 0)[:, None, :]
  prompt = (branches == 0)[:, None, :]
  answer = branches[:, :, None] == branches[:, None, :]
  return causal[None] & example & present & (prompt | answer)


def settled(model: MLLM) -> MLLM:
  """Return the model with its attention backend chosen for this device.

  Raises InputError where the backend that is asked for cannot serve.
  """
  dims = () if model.llm is None else (model.llm.head_dim,)
  if model.vision is not None:
    dims += (model.vision.hidden_size // model.vision.num_attention_heads,)
  platform, capability = attention.device()
  compute = attention.choose(
    model.compute, head_dims=dims, platform=platform, capability=capability
  )
  return model.clone(compute=compute)


def init_params(model: MLLM, rng: jax.Array) -> PyTree:
  """Return fresh float32 parameters.

  A part's values depend on `rng` and the part's own configuration, not on
  which other parts exist. Under `jax.eval_shape` it gives the shapes alone.
  """
  # The values do not depend on how the model is computed; a scan compiles
  # faster.
  model = model.clone(
    compute=dataclasses.replace(
      model.compute, scan=True, remat="none", attention="plain"
    )
  )
  size = 1 if model.vision is None else model.vision.image_size
  row = jnp.zeros((1, 1), jnp.int32)
  batch = types.SimpleNamespace(
    tokens=row,
    positions=row,
    segments=row + 1,
    branches=row,
    image_index=row - 1 if model.vision is None else row,
    images=jnp.zeros(
      (1, 0 if model.vision is None else 1, size, size, 3), jnp.uint8
    ),
  )
  # Under jit the forward pass, whose result is not asked for, is not computed.
  return jax.jit(lambda key: model.init(key, batch)["params"])(rng)
