"""The cost of an update before it runs: floating-point operations and bytes.

Operations are the least that an update needs, which MFU is measured against.
Matrix products alone count, a multiplication and an addition being two
operations: forward, then the gradient of what they read and, where it trains,
of the weights. An image is encoded once, a prompt decoded once, the head reads
the positions of the loss; padding, recomputation and copies count nothing, so
that a path which does more than it has to shows a lower MFU.

Bytes are those kept between updates, and those that the forward pass leaves for
the backward pass: they are read off the traced program, shared out over the
devices that hold rows. Bytes that XLA needs beside (gradients within a block,
copies) are not in it, and a tensor axis of the mesh is not taken off the
activations.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pivot_jax import trees
from pivot_jax.data import packing
from pivot_jax.models import mllm, qwen2, vit

# Peak of bfloat16 matrix products, without sparsity, in operations a second:
# the makers' data sheets. The first name among a device's kind's words counts.
PEAKS: tuple[tuple[str, float], ...] = (
  ("H100 PCIe", 756e12),
  ("H100 NVL", 835e12),
  ("H200 NVL", 835e12),
  ("H100", 989e12),
  ("H200", 989e12),
  ("GH200", 989e12),
  ("B200", 2250e12),
  ("A100", 312e12),
  ("L40S", 362e12),
  ("L40", 181e12),
  ("L4", 121e12),
  ("T4", 65e12),
  ("TPU v6 lite", 918e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5p", 459e12),
  ("TPU v5", 459e12),
  ("TPU v4", 275e12),
)


def flops_of_update(
  model: mllm.MLLM, trainable: Sequence[str], work: packing.Work
) -> dict[str, int]:
  """Return the operations of an update by part: vision, projector, llm, head.

  `trainable` holds the paths of the parameters that train. A part has a backward
  pass if anything in it or before it trains.
  """
  found: dict[str, int] = {}
  before = False
  for name, part in _parts(model, work).items():
    trained = [
      path
      for path in trainable
      if path.startswith(f"{name}/") and not path.startswith(_BEHIND)
    ]
    first = not before
    before = before or bool(trained)
    found[name] = part.forward * (2 if before else 1)
    if before and first:
      # What the first part that trains reads needs no gradient.
      found[name] -= part.input
    found[name] += part.attention * (3 if before else 1)
    found[name] += sum(part.kernels.get(path, 0) for path in trained)
  if model.llm is not None:
    norm = any(path.startswith("llm/norm/") for path in trainable)
    found["head"] = _head(model.llm, trainable, work, before or norm)
  return found


def peak_flops(kind: str, devices: int) -> float | None:
  """Return the bfloat16 peak of all devices, None for a kind not known."""
  # A slice of a GPU has a share of its peak that the name does not say.
  if "MIG" in kind:
    return None
  known = [flops for name, flops in PEAKS if re.search(rf"\b{name}\b", kind)]
  return known[0] * devices if known else None


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes on one device, by what they hold; `available` is None if not known."""

  parts: dict[str, int]
  available: int | None

  @property
  def total(self) -> int:
    return sum(self.parts.values())

  @property
  def fits(self) -> bool:
    return self.available is None or self.total <= self.available

  def __str__(self) -> str:
    # Of toys MiB.
    unit, name = (2**30, "GiB") if self.total > 2**30 else (2**20, "MiB")
    listed = " + ".join(
      f"{part} {size / unit:.1f}" for part, size in self.parts.items()
    )
    limit = ""
    if self.available is not None:
      limit = f" of {self.available / unit:,.1f}"
    return f"{listed} = {self.total / unit:.1f}{limit} {name}"


def estimate_memory(
  state: PyTree,
  objective: Callable[[mllm.MLLM], Callable],
  model: mllm.MLLM,
  batch: PyTree,
  *,
  accum: int,
  shards: int,
  chunk: int,
  available: int | None,
) -> Estimate:
  """Return what one device holds while it makes an update.

  Args:
    state: TrainState of arrays on their devices.
    objective: gives a model's (params, batch, rng) -> (loss, metrics).
    model: with the `compute` it is trained with.
    batch: an update's rows, on the host.
    accum: parts that an update is made in.
    shards: devices that the rows of a part are spread over.
    chunk: positions that have logits at a time.
    available: the device's bytes.
  """
  dtype = model.compute.dtype
  part = rows_at_once(batch, len(batch.tokens) // accum)
  trainable = _on_one_device(state.trainable)
  kernels = sum(
    leaf.size
    for path, leaf in trees.flatten(state.trainable).items()
    if path.endswith("/kernel")
  )
  copies = 0
  if dtype != "float32":
    share = trainable / max(1, _bytes(state.trainable))
    copies = int(kernels * jnp.dtype(dtype).itemsize * share)
  parts = {
    "parameters": trainable + _on_one_device(state.frozen) + copies,
    "optimizer": _on_one_device(state.opt_state),
    # With parts, the sum and the gradient of one of them.
    "gradients": trainable * (1 if accum == 1 else 2),
    # The update's, and two that are prepared meanwhile.
    "batches": 3 * _bytes(batch) // shards,
    "activations": activation_bytes(objective(model), state, part, dtype)
    // shards,
  }
  positions = part.loss_target.size
  if positions > chunk and model.llm is not None:
    # Logits and their gradient, in float32; kept by the first pass they are
    # activations.
    parts["logits"] = 8 * chunk * model.llm.vocab_size // shards
  if model.compute.remat != "none":
    kept = parts["activations"] * shards
    again = _one_block(kept, state, objective, model, part)
    parts["a block again"] = again // shards
  return Estimate(parts, available)


def activation_bytes(
  loss_fn: Callable, state: PyTree, batch: PyTree, dtype: str = "float32"
) -> int:
  """Return the bytes that the forward pass leaves for the backward pass.

  `dtype` is that of kernels in products: they are counted as parameters.
  """

  def residuals(trainable: PyTree, frozen: PyTree, batch: PyTree):
    def loss(trainable: PyTree):
      return loss_fn(trees.merge(trainable, frozen), batch, None)

    return jax.vjp(loss, trainable, has_aux=True)[1]

  trainable = {
    path: jax.ShapeDtypeStruct(
      x.shape, dtype if path.endswith("/kernel") else x.dtype
    )
    for path, x in trees.flatten(state.trainable).items()
  }
  shapes = (trees.unflatten(trainable), _shapes(state.frozen), _shapes(batch))
  kept = jax.tree.leaves(jax.eval_shape(residuals, *shapes))
  # Parameters that the backward pass reads are not kept a second time.
  known = collections.Counter(_kind(x) for x in jax.tree.leaves(shapes))
  total = 0
  for leaf in kept:
    if known[_kind(leaf)]:
      known[_kind(leaf)] -= 1
    else:
      total += leaf.size * leaf.dtype.itemsize
  return total


def available_memory() -> int | None:
  """Return the bytes of the first device; of a CPU those of the machine."""
  device = jax.local_devices()[0]
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  if device.platform == "cpu":
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return None


def advice(found: Estimate) -> str:
  """Return what to change where an estimate does not fit."""
  largest = max(found.parts, key=found.parts.__getitem__)
  if largest == "activations":
    return (
      "raise accum (fewer rows at a time), or compute.remat: none < dots < "
      "attention < full"
    )
  return (
    "shard the state with mesh.fsdp, train less (trainable), or keep moments in "
    "bfloat16"
  )


def rows_at_once(batch: PyTree, rows: int) -> Any:
  """Return the shapes of a batch with another number of rows."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch
  )


# Parameters behind the blocks, which need no gradient because of them.
_BEHIND = ("llm/norm/", "llm/lm_head/")


@dataclasses.dataclass(frozen=True)
class _Part:
  """Forward operations: of each kernel by path, and of attention.

  input: of a kernel that reads nothing but the part's own input.
  """

  kernels: dict[str, int]
  attention: int = 0
  input: int = 0

  @property
  def forward(self) -> int:
    return sum(self.kernels.values())


def _parts(model: mllm.MLLM, work: packing.Work) -> dict[str, _Part]:
  """Return the parts in the order in which an update goes through them."""
  found = {}
  if model.vision is not None:
    found["vision"] = _vision(model.vision, work.images)
  if model.vision is not None and model.llm is not None:
    features = work.images * model.vision.num_patches
    wide, narrow = model.vision.hidden_size, model.llm.hidden_size
    found["projector"] = _Part(
      {
        "projector/linear_1/kernel": 2 * features * wide * narrow,
        "projector/linear_2/kernel": 2 * features * narrow**2,
      },
      input=2 * features * wide * narrow,
    )
  if model.llm is not None:
    found["llm"] = _llm(model.llm, work)
  return found


def _vision(config: vit.VisionConfig, images: int) -> _Part:
  width, inner = config.hidden_size, config.intermediate_size
  tokens = images * config.positions
  layers = config.used_layers
  patch = 2 * images * config.grid**2 * config.patch_size**2 * 3 * width
  blocks = "vision/encoder/layers"
  attended = {
    f"{blocks}/self_attn/{name}/kernel": 2 * layers * tokens * width**2
    for name in ("q_proj", "k_proj", "v_proj", "out_proj")
  }
  mlp = ("fc1", "fc2")
  if config.gated_mlp:
    mlp = ("gate_proj", "up_proj", "down_proj")
  perceived = {
    f"{blocks}/mlp/{name}/kernel": 2 * layers * tokens * width * inner
    for name in mlp
  }
  return _Part(
    {"vision/embeddings/patch_embedding/kernel": patch} | attended | perceived,
    attention=4 * layers * tokens * config.positions * width,
    input=patch,
  )


def _llm(config: qwen2.LLMConfig, work: packing.Work) -> _Part:
  width, layers = config.hidden_size, config.num_hidden_layers
  queries = config.num_attention_heads * config.head_dim
  keys = config.num_key_value_heads * config.head_dim
  sizes = {
    "self_attn/q_proj": width * queries,
    "self_attn/k_proj": width * keys,
    "self_attn/v_proj": width * keys,
    "self_attn/o_proj": queries * width,
    "mlp/gate_proj": width * config.intermediate_size,
    "mlp/up_proj": width * config.intermediate_size,
    "mlp/down_proj": width * config.intermediate_size,
  }
  return _Part(
    {
      f"llm/layers/{name}/kernel": 2 * layers * work.tokens * size
      for name, size in sizes.items()
    },
    attention=4 * layers * work.pairs * queries,
  )


def _head(config, trainable, work, backward) -> int:
  name = "embed_tokens/embedding"
  if not config.tie_word_embeddings:
    name = "lm_head/kernel"
  forward = 2 * work.targets * config.hidden_size * config.vocab_size
  trains = f"llm/{name}" in trainable
  return forward * (1 + (backward or trains) + trains)


def _one_block(kept, state, objective, model, batch) -> int:
  """Return the bytes of a block whose activations are computed again.

  One block at a time has all that it would keep without recomputation.
  """
  compute = dataclasses.replace(model.compute, remat="none")
  plain = objective(model.clone(compute=compute))
  everything = activation_bytes(plain, state, batch, compute.dtype)
  blocks = [
    *([model.llm.num_hidden_layers] if model.llm else []),
    *([model.vision.used_layers] if model.vision else []),
  ]
  return (everything - kept) // max(blocks)


def _on_one_device(tree: Any) -> int:
  """Return the bytes of one device's shards."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _shapes(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _kind(leaf) -> tuple:
  return (leaf.shape, str(leaf.dtype))
