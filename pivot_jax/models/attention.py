"""Attention, and who computes it: the one place that knows a backend.

  plain    softmax over all pairs under any mask; the reference of the others
  xla      the same on causal sequences: any device, float32 scores in memory
  cudnn    flash attention of cuDNN: GPU, bfloat16, causal or full with lengths
  splash   flash attention for TPU, causal with lengths

The kernels are given causal sequences and lengths, never a mask as large as the
scores. What has to be gathered for that is `sequences.py`'s business.

Axes: N sequences (or images), T query tokens, S key tokens, A query heads,
K key/value heads, G query heads that share one of them, H head dim.
"""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from pivot_jax.errors import InputError
from pivot_jax.models import layers

# Finite, so that a row whose every key is masked gives uniform weights and
# finite gradients instead of NaN.
_MASKED = -1e30
# The splash kernel works in blocks of this many tokens.
_BLOCK = 128


def attend(
  q: Float[Array, "N T A H"],
  k: Float[Array, "N S K H"],
  v: Float[Array, "N S K H"],
  mask: Bool[Array, "N T S"] | None,
) -> Float[Array, "N T A H"]:
  """Return softmax(q k' / sqrt(H)) v with scores and softmax in float32.

  Query head a reads key/value head a // (A / K). `mask` is True where a query
  may look; None lets every query see every key. A query that may look nowhere
  gives the mean of the values: finite, and of no meaning.
  """
  tokens, shared = q.shape[1], k.shape[2]
  # Laid out as batched products whose results need no transposition.
  q = rearrange(q, "N T (K G) H -> N K (G T) H", K=shared)
  k, v = (rearrange(x, "N S K H -> N K S H") for x in (k, v))
  scores = jnp.einsum(
    "NKQH,NKSH->NKQS", q, k, preferred_element_type=jnp.float32
  )
  scores = scores * q.shape[-1] ** -0.5
  if mask is not None:
    seen = jnp.tile(mask, (1, q.shape[2] // tokens, 1))
    scores = jnp.where(seen[:, None], scores, _MASKED)
  mixed = _mix(scores, v)
  return rearrange(mixed, "N K (G T) H -> N T (K G) H", T=tokens)


@jax.custom_vjp
def _mix(scores, v):
  """Return softmax(scores) v; the division comes after the product.

  It is one of H channels there and not one of S keys.
  """
  return _mix_forward(scores, v)[0]


def _mix_forward(scores, v):
  largest = scores.max(axis=-1, keepdims=True)
  weights = jnp.exp(scores - largest)
  total = weights.sum(axis=-1, keepdims=True)
  mixed = jnp.einsum(
    "NKQS,NKSH->NKQH",
    weights.astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
  return (mixed / total).astype(v.dtype), (weights, total, v)


def _mix_backward(kept, gradient):
  """Differentiate the softmax itself.

  Through the division a softmax of one key would get a gradient of rounding
  errors instead of zero.
  """
  weights, total, v = kept
  weights = weights / total
  to_weights = jnp.einsum(
    "NKQH,NKSH->NKQS", gradient, v, preferred_element_type=jnp.float32
  )
  mean = (weights * to_weights).sum(axis=-1, keepdims=True)
  to_v = jnp.einsum("NKQS,NKQH->NKSH", weights.astype(v.dtype), gradient)
  return weights * (to_weights - mean), to_v


_mix.defvjp(_mix_forward, _mix_backward)


def attend_all(
  q: Float[Array, "N T A H"],
  k: Float[Array, "N T A H"],
  v: Float[Array, "N T A H"],
  *,
  backend: str,
) -> Float[Array, "N T A H"]:
  """Let every token see every token, as the patches of an image do."""
  if backend == "cudnn":
    return _cudnn(q, k, v, None)
  # On a TPU, too: an image has few patches, and their number need not be one of
  # the kernel's blocks.
  return attend(q, k, v, None)


def attend_causal(
  q: Float[Array, "N T A H"],
  k: Float[Array, "N T K H"],
  v: Float[Array, "N T K H"],
  lengths: Int[Array, "N"],
  *,
  backend: str,
) -> Float[Array, "N T A H"]:
  """Let each token see itself and those before it.

  Tokens from `lengths` (at least 1) on are no keys, and as queries give finite
  values of no meaning.
  """
  if backend == "cudnn":
    return _cudnn(q, k, v, lengths, causal=True)
  if backend == "splash":
    return _splash(q, k, v, lengths)
  place = jnp.arange(q.shape[1])
  causal = place[:, None] >= place[None, :]
  present = place[None, :] < lengths[:, None]
  return attend(q, k, v, causal[None] & present[:, None])


def _cudnn(q, k, v, lengths, *, causal=False):
  """Run the kernel, whose gradient asks for an even number of tokens."""
  tokens = q.shape[1]
  if tokens % 2:
    # A class token makes it odd, and so may the longest sequence of a row.
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    if lengths is None:
      lengths = jnp.full(len(q), tokens, jnp.int32)
  mixed = jax.nn.dot_product_attention(
    q,
    k,
    v,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    is_causal=causal,
    implementation="cudnn",
  )
  return mixed[:, :tokens]


def _splash(q, k, v, lengths):
  """Run the kernel on each device's own sequences and heads."""
  # Only where there is a TPU: the module is experimental and may move.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  pad = -q.shape[1] % _BLOCK
  widths = ((0, 0), (0, pad), (0, 0), (0, 0))
  scaled = q * q.shape[-1] ** -0.5
  long_q, long_k, long_v = (jnp.pad(x, widths) for x in (scaled, k, v))
  width = long_q.shape[1]
  # Tokens behind the end are a segment of their own: no query is without key.
  segments = (jnp.arange(width)[None] < lengths[:, None]).astype(jnp.int32)

  def local(q, k, v, segments) -> Any:
    mask = splash.CausalMask((width, width))
    heads = splash.MultiHeadMask([mask] * q.shape[2])
    kernel = splash.make_splash_mha(heads, head_shards=1, q_seq_shards=1)

    def one(q, k, v, segment):
      ids = splash.SegmentIds(q=segment, kv=segment)
      q, k, v = (rearrange(x, "T A H -> A T H") for x in (q, k, v))
      return rearrange(kernel(q, k, v, segment_ids=ids), "A T H -> T A H")

    return jax.vmap(one)(q, k, v, segments)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    mixed = local(long_q, long_k, long_v, segments)
    return mixed[:, : q.shape[1]].astype(v.dtype)
  rows = nn.logical_to_mesh_axes(("rows", "tokens"))
  heads = nn.logical_to_mesh_axes(("rows", "tokens", "heads", None))
  assert heads is not None  # It is for no names alone.
  # Key/value heads that the mesh cannot share out are given to each query head.
  if heads[2] is not None and k.shape[2] % mesh.shape[heads[2]]:
    repeats = q.shape[2] // k.shape[2]
    long_k, long_v = (jnp.repeat(x, repeats, axis=2) for x in (long_k, long_v))
  # A kernel is opaque to the partitioner: it runs by device, on what is there.
  mapped = jax.shard_map(
    local,
    in_specs=(heads, heads, heads, rows),
    out_specs=heads,
    check_vma=False,
  )
  mixed = mapped(long_q, long_k, long_v, segments)
  return mixed[:, : q.shape[1]].astype(v.dtype)


def choose(
  compute: layers.Compute,
  *,
  head_dims: tuple[int, ...],
  platform: str,
  capability: float = 0.0,
) -> layers.Compute:
  """Return `compute` with "auto" settled and the choice checked.

  "auto" is cudnn on a GPU where it can serve, splash on a TPU, else xla.
  `head_dims` are those of all towers, `platform` is `jax.default_backend()`,
  `capability` NVIDIA's compute capability of the GPU, 0 for others.
  Raises InputError where the backend asked for cannot serve, saying why.
  """
  name = compute.attention
  device = (platform, capability)
  if name == "auto":
    fast = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "xla")
    serves = not _refusal(fast, compute.dtype, head_dims, *device)
    return dataclasses.replace(compute, attention=fast if serves else "xla")
  reason = _refusal(name, compute.dtype, head_dims, *device)
  if reason:
    raise InputError(
      f"compute.attention={name!r} {reason}; choose xla, or auto to have it "
      "chosen"
    )
  return compute


def device() -> tuple[str, float]:
  """Return the platform of this process and its GPU's compute capability."""
  first = jax.local_devices()[0]
  if first.platform != "gpu":
    return first.platform, 0.0
  # AMD's are named, as gfx90a.
  found = re.fullmatch(r"\d+\.\d+", str(first.compute_capability))
  return first.platform, float(found[0]) if found else 0.0


def _refusal(name, dtype, head_dims, platform, capability) -> str:
  """Return why a backend cannot serve, or nothing."""
  where = {"cudnn": "gpu", "splash": "tpu"}
  if name not in where:
    return ""
  if platform != where[name]:
    return f"runs on a {where[name]}, and this is a {platform}"
  if name == "cudnn" and dtype != "bfloat16":
    return f"computes in bfloat16, and compute.dtype is {dtype}"
  if name == "cudnn" and capability < 8:
    return "needs an NVIDIA GPU of compute capability 8.0 or later"
  most = 256 if capability >= 9 else 128
  wrong = [dim for dim in head_dims if dim % 8 or dim > most]
  if name == "cudnn" and wrong:
    return f"needs head dims of 8, 16, ... {most}, and the model has {wrong}"
  return ""
