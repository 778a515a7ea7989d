"""How much memory a training will take, known before anything is compiled.

What is kept between updates is counted, and so is what the forward pass leaves
for the backward pass: it is read off the traced program, shared out over the
devices that hold rows. What XLA needs beside (gradients within a block, copies)
is not in it, and a tensor axis of the mesh is not taken off the activations.
"""

import collections
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pivot_jax import trees
from pivot_jax.models import mllm


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


def estimate(
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
    "activations": activations(objective(model), state, part, dtype) // shards,
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


def _one_block(kept, state, objective, model, batch) -> int:
  """Return the bytes of a block whose activations are computed again.

  One block at a time has all that it would keep without recomputation.
  """
  compute = dataclasses.replace(model.compute, remat="none")
  plain = objective(model.clone(compute=compute))
  everything = activations(plain, state, batch, compute.dtype)
  blocks = [
    *([model.llm.num_hidden_layers] if model.llm else []),
    *([model.vision.used_layers] if model.vision else []),
  ]
  return (everything - kept) // max(blocks)


def activations(
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


def available() -> int | None:
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
