"""What a step of the benchmark on a GPU has to do, and what the GPU can do."""

import functools
import time

import jax
import jax.numpy as jnp

from bench import budget, gpu_ours, gpu_sizes
from pivot_jax import trees
from pivot_jax.data import work as counting
from pivot_jax.models import layers, mllm
from pivot_jax.training import flops


def work(name: str, *, tiny: bool) -> dict[str, float]:
  """Returns what a step of a workload does, by one definition for all rows."""
  data = gpu_sizes.data(name, tiny=tiny)
  model = gpu_ours.model_of(data, layers.Compute())
  shapes = jax.eval_shape(
    functools.partial(mllm.init_params, model), jax.random.PRNGKey(0)
  )
  flat = trees.flatten(shapes)
  found = counting.count(gpu_ours.packed(data), data.patches)
  return {
    "examples": len(data.prompt),
    "tokens": found.tokens,
    "flops": sum(flops.update(model, list(flat), found).values()),
    "parameters": sum(leaf.size for leaf in flat.values()),
  }


def ceilings(job: budget.Job) -> None:
  """Measures a matrix product and a copy: what this device gives at best."""
  side, words = (256, 2**16) if job.tiny else (8192, 2**30)
  first, second = jax.random.split(jax.random.PRNGKey(0))
  # Random: products of zeros are faster, since they draw less power.
  left = jax.random.normal(first, (side, side), jnp.bfloat16)
  right = jax.random.normal(second, (side, side), jnp.bfloat16)
  seconds = _repeated(job, jax.jit(jnp.matmul), left, right)
  numbers = jax.random.bits(first, (words,), jnp.uint32)
  copied = _repeated(job, jax.jit(lambda x: x ^ 1), numbers)
  kind = jax.local_devices()[0].device_kind
  job.save(
    kind=kind,
    peak_flops=flops.peak(kind, 1),
    matmul_side=side,
    matmul_flops=2 * side**3 / seconds,
    # Read and written.
    copy_bytes=2 * numbers.nbytes,
    copy_rate=2 * numbers.nbytes / copied,
  )


def _repeated(job, function, *arguments) -> float:
  """Returns the seconds of one call, the best of some groups."""
  jax.block_until_ready(function(*arguments))
  best = float("inf")
  for _ in range(5):
    began = time.perf_counter()
    for _ in range(job.steps):
      result = function(*arguments)
    jax.block_until_ready(result)
    best = min(best, (time.perf_counter() - began) / job.steps)
  return best
