"""Our rows of the benchmark on a GPU: updates of models of real size.

Weights are made on the device, by the package's own initialization; model,
packing, objectives and update are the package's own, too. An update is first a
program over shapes, which any machine can estimate and lower; it takes memory
when `start` is called.

Q pairs, S sequences (2Q, chosen ones first), T tokens of a row, P patches.
"""

import contextlib
import functools
import itertools
import pathlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bench import harness
from bench.gpu import sizes
from bench.update import ladder, ours
from pivot_jax import sharding, trees
from pivot_jax.data import packing
from pivot_jax.models import layers, mllm, qwen2, vit
from pivot_jax.training import (
  cost,
  loop,
  monitor,
  objectives,
  optimizer,
  train_state,
  train_step,
)

# Positions that have logits at a time.
CHUNK = 2048
# Small, so that random weights stay what they are.
LEARNING_RATE = 1e-6
# How cuDNN's attention is called, and its gradient.
FLASH = r"__cudnn\$fmha"


def settings(**compute: str | bool) -> layers.Compute:
  """Return the compute settings of our rows, with changes."""
  # A CPU has no flash attention of cuDNN.
  fast = "cudnn" if jax.default_backend() == "gpu" else "xla"
  usual = dict(dtype="bfloat16", scan=True, attention=fast, remat="none")
  return layers.Compute(**(usual | compute))


def model_of(data: sizes.Data, compute: layers.Compute) -> mllm.MLLM:
  """Return the model of the data's sizes."""
  return mllm.MLLM(
    llm=qwen2.LLMConfig(**data.llm),
    vision=vit.VisionConfig(**data.vision),
    compute=compute,
  )


class Update:
  """An update on one device: shapes, a program over them, then arrays."""

  def __init__(
    self,
    data: sizes.Data,
    compute: layers.Compute,
    *,
    objective: str = "dpo",
  ):
    """Make the program's shapes.

    Args:
      data: whose sizes the model has.
      compute: how the model is computed.
      objective: "dpo" or "sft".
    """
    self.model = model_of(data, compute)
    self._examples, self._name = len(data.prompt), objective
    kinds = (jax.sharding.AxisType.Auto,) * len(sharding.AXES)
    self.mesh = jax.make_mesh(
      (1, 1, 1), sharding.AXES, axis_types=kinds, devices=jax.devices()[:1]
    )
    self.batch = packed(data)
    with self._context():
      self.state = self._placed(jax.eval_shape(self._start, _key()))

  @contextlib.contextmanager
  def _context(self) -> Iterator[None]:
    rules = layers.logical_rules(sharding.ACTIVATION_RULES)
    with jax.set_mesh(self.mesh), rules:
      yield

  def _placed(self, shapes: Any) -> Any:
    one = sharding.replicated(self.mesh)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes
    )

  def _optimizer(self, params):
    return optimizer.adamw(
      params,
      lr=((".*", LEARNING_RATE),),
      factor=optimizer.schedule("constant", steps=1, warmup=0.0),
      clip=ours.CLIP,
    )

  def _start(self, key):
    """Return the first state, as `train_state.make_state` makes it.

    That one copies parameters of the host, which for these sizes takes longer
    than the steps.
    """
    params = mllm.init_params(self.model, key)
    return train_state.TrainState(
      step=jnp.zeros((), jnp.int32),
      examples=jnp.zeros((), jnp.int32),
      trainable=params,
      frozen={},
      opt_state=self._optimizer(params).init(params),
      rng=key,
    )

  def _fixed(self, params):
    """Return a copy for a forward pass, its kernels in the products' dtype."""
    # What is not cast is to be copied, too: the state is donated.
    dtype = self.model.compute.dtype
    return jax.tree.map(jnp.copy, train_state.cast_kernels(params, dtype))

  def _objective(self, model: mllm.MLLM) -> objectives.LossFn:
    if self._name == "sft":
      return objectives.sft(model, chunk=CHUNK)
    return objectives.dpo(model, beta=ladder.BETA, chunk=CHUNK)

  def estimate(self) -> cost.Estimate:
    """Return the bytes foreseen."""
    with self._context():
      return cost.estimate_memory(
        self.state,
        self._objective,
        self.model,
        self.batch,
        accum=1,
        shards=1,
        chunk=CHUNK,
        available=cost.available_memory(),
      )

  def lower(self, *platforms: str) -> jax.stages.Lowered:
    """Return the program, for this process's device or for another kind."""
    with self._context():
      step_fn = train_step.make_train_step(
        self._objective(self.model),
        self._optimizer(self.state.trainable),
        accum=1,
        examples=self._examples,
        shardings=jax.tree.map(lambda x: x.sharding, self.state),
        dtype=self.model.compute.dtype,
      )
      traced = step_fn.trace(self.state, self._placed(self.batch))
      return traced.lower(lowering_platforms=platforms or None)

  def start(self) -> tuple[train_state.TrainState, packing.Batch]:
    """Return the first state and the batch, on the device."""
    shardings = jax.tree.map(lambda x: x.sharding, self.state)
    with self._context():
      state = jax.jit(self._start, out_shardings=shardings)(_key())
      return state, sharding.place_rows(self.batch, self.mesh)


def _key() -> jax.Array:
  return jax.random.PRNGKey(0)


def update(
  folder: pathlib.Path,
  workload: str,
  *,
  objective: str = "dpo",
  **compute: str | bool,
) -> harness.Ready:
  """Return an update to be timed; `compute` are fields of `layers.Compute`."""
  data = sizes.data(workload, tiny=bool(harness.options(folder)["tiny"]))
  return ready(Update(data, settings(**compute), objective=objective), data)


def ready(made: Update, data: sizes.Data) -> harness.Ready:
  """Return an update compiled ahead, so that compiling is timed alone."""
  foreseen = made.estimate().total
  facts: dict[str, Any] = {"estimate": foreseen}
  facts["notes"] = [f"memory foreseen {foreseen / 1e9:.1f} GB"]
  began = time.perf_counter()
  compiled = made.lower().compile()
  facts["compile_seconds"] = time.perf_counter() - began
  state, inputs = made.start()
  held, seen = {"state": state}, []

  def drive(count, begin, end):
    jax.block_until_ready(held["state"])
    for _ in range(count):
      begin()
      held["state"], metrics = compiled(held["state"], inputs)
      jax.block_until_ready(held["state"])
      end()
      seen.append(metrics)
    facts.update(_losses(seen), peak=monitor.peak_memory())
    # Last: what was timed is kept whatever the program turns out to be.
    facts.update(_program(compiled, data))
    facts["notes"] += [flash(facts)]
    facts["notes"] += ["NOT FINITE"] * (not facts["finite"])

  return harness.Ready(drive, facts=lambda: facts)


def _losses(metrics) -> dict[str, Any]:
  kept = [loop.means(jax.device_get(m)) for m in metrics]
  return {
    "losses": [m["losses/total"] for m in kept],
    "grad_norms": [m["grad_norm"] for m in kept],
    "finite": all(m["finite"] == 1 for m in kept),
  }


def _program(compiled: jax.stages.Compiled, data: sizes.Data) -> dict[str, Any]:
  """Return the memory and the attention of a compiled program."""
  text, taken = compiled.as_text(), compiled.memory_analysis()
  spans = {data.patches} | {
    data.patches + len(prompt) + len(answer)
    for column in (data.chosen, data.rejected)
    for prompt, answer in zip(data.prompt, column, strict=True)
  }
  return {
    "program_bytes": taken.temp_size_in_bytes + taken.argument_size_in_bytes,
    "flash_calls": len(re.findall(FLASH, text)),
    "scores": sorted(scores(text, spans)),
  }


def flash(facts: Mapping[str, Any]) -> str:
  """Return a line on the attention in a compiled program."""
  said = f"{facts['flash_calls']} calls of cuDNN's attention in the program"
  return f"{said}, float32 scores: {', '.join(facts['scores']) or 'none'}"


def scores(text: str, spans: set[int]) -> set[str]:
  """Return the float32 tensors of a program that hold attention scores.

  Those with two neighboring axes that are both as long as a sequence.
  """
  found = set()
  for shape in re.findall(r"\bf32\[([\d,]+)\]", text):
    axes = [int(axis) for axis in shape.split(",")]
    if any({a, b} <= spans for a, b in itertools.pairwise(axes)):
      found.add(f"f32[{shape}]")
  return found


def reference(folder: pathlib.Path, workload: str) -> harness.Ready:
  """Return the forward pass that the score stage does once for all epochs."""
  data = sizes.data(workload, tiny=bool(harness.options(folder)["tiny"]))
  made = Update(data, settings())
  with made._context():
    state, batch = made.start()
    params = jax.jit(made._fixed)(state.trainable)
    del state
    score = objectives.pair_logps(made.model, chunk=CHUNK)
    began = time.perf_counter()
    compiled = score.lower(params, batch).compile()
  facts = {"compile_seconds": time.perf_counter() - began}
  return harness.stepping(
    lambda: jax.block_until_ready(compiled(params, batch)), facts=lambda: facts
  )


def toy(folder: pathlib.Path, dtype: str) -> harness.Ready:
  """Return our update of the toy, whose numbers the gate compares."""
  # A GPU would round the inputs of float32 products otherwise.
  exact = dtype == "float32"
  jax.config.update(
    "jax_default_matmul_precision", "highest" if exact else "default"
  )
  # cuDNN's attention has no float32.
  attention = {"attention": "xla"} if exact else {}
  return ladder.cached(folder, settings(dtype=dtype, **attention))


def packed(data: sizes.Data) -> packing.Batch:
  """Return the examples as the stages pack them."""
  examples = ours.examples(data, data.answers, data.reference)
  return packing.pack(examples, _layout(data, examples))


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


def work(workload: str, *, tiny: bool) -> dict[str, float]:
  """Return the work of a step, by one definition for all rows."""
  data = sizes.data(workload, tiny=tiny)
  model = model_of(data, layers.Compute())
  shapes = jax.eval_shape(functools.partial(mllm.init_params, model), _key())
  found = packing.count_work(packed(data), data.patches)
  paths = list(trees.flatten(shapes))
  return {
    "examples": len(data.prompt),
    "useful tokens": found.tokens,
    "TFLOP": sum(cost.flops_of_update(model, paths, found).values()) / 1e12,
  }


def device() -> harness.Work:
  """Return the device's published peak, where that is known."""
  peak = cost.peak_flops(jax.devices()[0].device_kind, 1)
  return {"device": {"peak TFLOP": peak / 1e12}} if peak else {}


MAKERS = {
  "update": update,
  "reference": reference,
  "toy": toy,
}
