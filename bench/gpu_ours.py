"""Our rows of the benchmark on a GPU: updates of models of real size.

Weights are made on the device, by the package's own initialisation; model,
packing, objectives and update are the package's own, too, and the rungs of the
ladder those of `bench/dpo_ladder.py`. Every row compiles its one program ahead
of its first step, so that compiling is timed alone.

Q pairs, S sequences (2Q, chosen ones first), T tokens of a row, P patches.
"""

import contextlib
import functools
import itertools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from bench import budget, dpo_ladder, gpu_sizes, ours
from pivot_jax import sharding
from pivot_jax.data import packing
from pivot_jax.models import layers, mllm, qwen2, vit
from pivot_jax.training import loop, memory, monitor, objectives, optimizer

# Positions that have logits at a time.
CHUNK = 2048
# Small, so that random weights stay what they are.
LEARNING_RATE = 1e-6
# How cuDNN's attention is called, and its gradient.
_FLASH = r'custom_call_target="__cudnn\$fmha'


def update(
  job: budget.Job,
  *,
  rung: str = "cached",
  moments: str = "float32",
  look: bool = True,
  **compute: Any,
) -> None:
  """Times an update; `compute` are fields of `layers.Compute`.

  `rung` is "cached" (the package's own), "sft", or one of the ladder in which
  the reference model runs in every step. `look` reads the compiled program.
  """
  data = gpu_sizes.data(job.workload, tiny=job.tiny)
  model = model_of(data, settings(**compute))
  mesh = sharding.make_mesh({"data": -1})
  with jax.set_mesh(mesh), layers.logical_rules(sharding.ACTIVATION_RULES):
    state, tx = _state(model, mesh, moments)
    objective, batch = _objective(data, rung, state, model, mesh)
    found = memory.estimate(
      state, objective, model, batch, available=memory.available()
    )
    job.save(estimate=found.total, estimate_parts=found.parts)
    step_fn = loop.make_train_step(
      objective(model),
      tx,
      accum=1,
      examples=len(data.prompt),
      shardings=jax.tree.map(lambda x: x.sharding, state),
      dtype=model.compute.dtype,
    )
    compiled = _compile(job, step_fn, (state, batch))
    _steps(job, compiled, state, batch)
    if look:
      # Last: what was timed is kept whatever the program turns out to be.
      _look(job, compiled, data, model.compute)


def reference(job: budget.Job) -> None:
  """Times the forward pass that the score stage does once for all epochs."""
  data = gpu_sizes.data(job.workload, tiny=job.tiny)
  model = model_of(data, settings())
  mesh = sharding.make_mesh({"data": -1})
  with jax.set_mesh(mesh), layers.logical_rules(sharding.ACTIVATION_RULES):
    params = _fixed(_params(model, mesh), model.compute.dtype)
    batch = sharding.place_rows(packed(data), mesh)
    score = objectives.pair_logps(model, chunk=CHUNK)
    compiled = _compile(job, score, (params, batch))
    held = {}
    clock = budget.Clock(job, lambda: jax.block_until_ready(held))
    for _ in range(budget.WARM_UP + job.steps):
      clock.begin()
      held["logps"] = compiled(params, batch)
      clock.end()
  job.save(peak=monitor.peak_memory())


def settings(**compute: Any) -> layers.Compute:
  """Returns how our rows compute, but for what is given."""
  # A CPU has no flash attention of cuDNN.
  fast = "cudnn" if jax.default_backend() == "gpu" else "xla"
  usual = dict(dtype="bfloat16", scan=True, attention=fast, remat="none")
  return layers.Compute(**(usual | compute))


def model_of(data: gpu_sizes.Data, compute: layers.Compute) -> mllm.MLLM:
  """Returns the model of the data's sizes."""
  return mllm.MLLM(
    llm=qwen2.LLMConfig(**data.llm),
    vision=vit.VisionConfig(**data.vision),
    compute=compute,
  )


def _params(model, mesh):
  """Returns fresh parameters that were never anywhere but on the device."""
  init = functools.partial(mllm.init_params, model)
  key = jax.random.PRNGKey(0)
  shardings = sharding.infer(jax.eval_shape(init, key), mesh)
  return jax.jit(init, out_shardings=shardings)(key)


def _state(model, mesh, moments):
  """Returns the first state and its optimizer, as `train.make_state` does.

  That one copies parameters of the host, which for these sizes takes longer
  than the steps.
  """
  params = _params(model, mesh)
  tx = optimizer.adamw(
    params,
    lr=((".*", LEARNING_RATE),),
    factor=optimizer.schedule("constant", steps=1, warmup=0.0),
    clip=ours.CLIP,
    moments=moments,
  )
  shapes = jax.eval_shape(tx.init, params)
  placed = sharding.like_params(shapes, params, mesh)
  one = sharding.replicated(mesh)
  state = loop.TrainState(
    step=jax.device_put(jnp.zeros((), jnp.int32), one),
    examples=jax.device_put(jnp.zeros((), jnp.int32), one),
    trainable=params,
    frozen={},
    opt_state=jax.jit(tx.init, out_shardings=placed)(params),
    rng=jax.device_put(jax.random.PRNGKey(0), one),
  )
  return state, tx


def _objective(data, rung, state, model, mesh):
  """Returns what gives a model's loss function, and the placed batch."""
  if rung not in dpo_ladder.POLICIES:
    batch = sharding.place_rows(packed(data), mesh)
    if rung == "sft":
      return functools.partial(objectives.sft, chunk=CHUNK), batch
    return (
      functools.partial(objectives.dpo, beta=dpo_ladder.BETA, chunk=CHUNK),
      batch,
    )
  make_policy, separate = dpo_ladder.POLICIES[rung]
  batch = _alone(data) if separate else packed(data)
  batch = sharding.place_rows(batch, mesh)
  fixed = _fixed(state.trainable, model.compute.dtype)

  def objective(model):
    return dpo_ladder.in_every_step(make_policy(model, chunk=CHUNK))

  return objective, (batch, fixed)


def _fixed(params, dtype):
  """Returns a copy for a forward pass, its kernels in the products' dtype."""

  def copy(params):
    # What is not cast is to be copied, too: the state is donated.
    return jax.tree.map(jnp.copy, loop.cast_kernels(params, dtype))

  return jax.jit(copy)(params)


def packed(data: gpu_sizes.Data) -> packing.Batch:
  """Returns the examples as the stages pack them."""
  examples = ours.examples(data, data.answers, data.reference)
  layout = _layout(data, examples)
  return packing.pack(examples, layout)


def _alone(data: gpu_sizes.Data) -> packing.Batch:
  """Returns every answer with its prompt and image in a row of its own."""
  parts = [ours.examples(data, (name,)) for name in data.answers]
  examples = list(itertools.chain.from_iterable(parts))
  return packing.pack_in_order(examples, _layout(data, examples))


def _layout(data, examples) -> packing.Layout:
  longest = max(packing.length(e, data.patches) for e in examples)
  return packing.layout_for(
    [examples],
    patches=data.patches,
    image_size=data.vision["image_size"],
    row_tokens=longest,
    # Nothing is too long here.
    max_length=longest,
  )


def _compile(job, function, arguments):
  """Returns the compiled function and saves how long that took."""
  began = time.perf_counter()
  lowered = function.lower(*arguments)
  traced = time.perf_counter()
  compiled = lowered.compile()
  job.save(
    trace_seconds=traced - began,
    compile_seconds=time.perf_counter() - traced,
  )
  return compiled


def _look(job, compiled, data, compute) -> None:
  """Saves what the compiled program holds; refuses one without its kernel."""
  text, taken = compiled.as_text(), compiled.memory_analysis()
  spans = {data.patches} | {
    data.patches + len(prompt) + len(answer)
    for column in (data.chosen, data.rejected)
    for prompt, answer in zip(data.prompt, column, strict=False)
  }
  calls = len(re.findall(_FLASH, text))
  job.save(
    program_bytes=taken.temp_size_in_bytes + taken.argument_size_in_bytes,
    flash_calls=calls,
    scores=sorted(scores(text, spans)),
  )
  if compute.attention == "cudnn" and not calls:
    raise RuntimeError("the compiled program holds no attention of cuDNN")


def scores(text: str, spans: set[int]) -> set[str]:
  """Returns the float32 tensors of a program that hold attention scores.

  Those with two neighbouring axes that are both as long as a sequence.
  """
  found = set()
  for shape in re.findall(r"\bf32\[([\d,]+)\]", text):
    axes = [int(axis) for axis in shape.split(",")]
    if any({a, b} <= spans for a, b in itertools.pairwise(axes)):
      found.add(f"f32[{shape}]")
  return found


def _steps(job, compiled, state, batch) -> None:
  held, losses = {"state": state}, []
  clock = budget.Clock(job, lambda: jax.block_until_ready(held["state"]))
  for _ in range(budget.WARM_UP + job.steps):
    clock.begin()
    held["state"], metrics = compiled(held["state"], batch)
    clock.end()
    losses.append(metrics)
  kept = [loop.means(jax.device_get(m)) for m in losses]
  job.save(
    peak=monitor.peak_memory(),
    losses=[m["losses/total"] for m in kept],
    grad_norms=[m["grad_norm"] for m in kept],
    finite=all(m["finite"] == 1 for m in kept),
  )


@contextlib.contextmanager
def exact(dtype: str):
  """Gives float32 products in full; a GPU would round their inputs."""
  precision = "highest" if dtype == "float32" else "default"
  with jax.default_matmul_precision(precision):
    yield
