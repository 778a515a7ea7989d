"""The growth of a DPO update's cost with pairs, answers, image and layers.

  python -m bench.growth

One axis is varied at a time from the toy of `bench/update/toy.py`; each point
is the package's own update on random weights, timed in this process. Printed
and written are an affine fit, seconds = a + b x, its share of unexplained variance,
and the exponent of a power law, beside the growth that `training.cost` counts.
One machine's seconds: what carries over is whether a curve is straight.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from bench import results, verdict
from bench.update import toy
from pivot_jax import sharding, trees
from pivot_jax.data import packing
from pivot_jax.models import layers, mllm, qwen2, vit
from pivot_jax.training import (
  cost,
  objectives,
  optimizer,
  train_state,
  train_step,
)

CORES = 2
WARM_UP, STEPS = 2, 5


@dataclasses.dataclass(frozen=True)
class Sizes:
  """One point: pairs a step, tokens an answer, pixels a side, blocks a tower."""

  pairs: int = 8
  answer: int = 32
  image: int = 128
  layers: int = 4
  scan: bool = False


AXES: dict[str, tuple[Sizes, ...]] = {
  "pairs": tuple(Sizes(pairs=n) for n in (1, 2, 4, 8, 16)),
  "answer tokens": tuple(Sizes(answer=n) for n in (10, 50, 100, 200, 300)),
  "image tokens": tuple(Sizes(image=16 * n) for n in (8, 12, 16, 24)),
  "layers, unrolled": tuple(Sizes(layers=n) for n in (2, 4, 8, 12)),
  "layers, in a loop": tuple(Sizes(layers=n, scan=True) for n in (2, 4, 8, 12)),
}


def place_on(axis: str, sizes: Sizes) -> float:
  """Return the number that an axis varies."""
  return {
    "pairs": sizes.pairs,
    "answer tokens": sizes.answer,
    "image tokens": (sizes.image // toy.PATCH) ** 2,
  }.get(axis, sizes.layers)


@dataclasses.dataclass(frozen=True)
class Point:
  """A measured update: its place on the axis, seconds, FLOPs, first step."""

  x: float
  wall: float
  cpu: float
  flops: int
  first: float


@dataclasses.dataclass(frozen=True)
class Fit:
  """seconds = a + b x, the share of variance left, and the exponent of x."""

  a: float
  b: float
  left: float
  exponent: float


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
  """Return the least-squares line and the slope of log y over log x."""
  b, a = np.polyfit(x, y, 1)
  rest = np.asarray(y) - (a + b * np.asarray(x))
  exponent, _ = np.polyfit(np.log(x), np.log(y), 1)
  left = float((rest**2).sum() / max(np.var(y) * len(y), 1e-30))
  return Fit(float(a), float(b), left, float(exponent))


def measure(axis: str, sizes: Sizes) -> Point:
  """Return the cost of an update of these sizes."""
  model = _model(sizes)
  batch, counted = _batch(sizes, model.vision.num_patches)
  mesh = sharding.make_mesh({"data": -1})
  with jax.set_mesh(mesh), layers.logical_rules(sharding.ACTIVATION_RULES):
    params = jax.device_get(mllm.init_params(model, jax.random.PRNGKey(0)))
    state, tx = train_state.make_state(
      params, trainable=(".*",), tx=_optimizer, mesh=mesh, seed=0
    )
    paths = list(trees.flatten(state.trainable))
    step_fn = train_step.make_train_step(
      objectives.dpo(model, beta=0.1), tx, accum=1, examples=sizes.pairs
    )
    placed = sharding.place_rows(batch, mesh)
    seconds = list(_time(step_fn, state, placed))
  walls, cpus = zip(*seconds[WARM_UP:])
  return Point(
    x=place_on(axis, sizes),
    wall=float(np.median(walls)),
    cpu=float(np.median(cpus)),
    flops=sum(cost.flops_of_update(model, paths, counted).values()),
    first=seconds[0][0],
  )


def _optimizer(trainable):
  factor = optimizer.schedule("constant", steps=1, warmup=0.0)
  return optimizer.adamw(trainable, lr=((".*", 1e-4),), factor=factor)


def _time(step_fn, state, batch) -> Iterable[tuple[float, float]]:
  """Yield wall and CPU seconds of steps, the one that compiles first."""
  for _ in range(WARM_UP + STEPS):
    wall, cpu = time.perf_counter(), time.process_time()
    state, _ = step_fn(state, batch)
    jax.block_until_ready(state)
    yield time.perf_counter() - wall, time.process_time() - cpu


def _model(sizes: Sizes) -> mllm.MLLM:
  text, seen = toy.TEXT, toy.VISION
  llm = qwen2.LLMConfig(
    vocab_size=toy.VOCAB,
    hidden_size=text["hidden_size"],
    intermediate_size=text["intermediate_size"],
    num_hidden_layers=sizes.layers,
    num_attention_heads=text["num_attention_heads"],
    num_key_value_heads=text["num_key_value_heads"],
    head_dim=text["head_dim"],
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
  )
  vision = vit.VisionConfig(
    image_size=sizes.image,
    patch_size=toy.PATCH,
    hidden_size=seen["hidden_size"],
    intermediate_size=seen["intermediate_size"],
    num_hidden_layers=sizes.layers,
    num_attention_heads=seen["num_attention_heads"],
    feature_layer=sizes.layers,
  )
  compute = layers.Compute(scan=sizes.scan, attention="xla")
  return mllm.MLLM(llm, vision, compute)


def _batch(sizes: Sizes, patches: int) -> tuple[packing.Batch, packing.Work]:
  """Return pairs of random tokens and images, packed, and what they are."""
  rng = np.random.default_rng(0)
  side = sizes.image
  prompt = np.r_[packing.IMAGE_TOKEN, rng.integers(2, 8000, toy.PROMPT)]
  examples = [
    packing.Example(
      id=str(i),
      prompt=prompt,
      prompt_targets=np.zeros(len(prompt), bool),
      answers=tuple(rng.integers(2, 8000, (2, sizes.answer))),
      answer_targets=(np.ones(sizes.answer, bool),) * 2,
      images=(rng.integers(0, 256, (side, side, 3)).astype(np.uint8),),
      reference=(0.0, 0.0),
    )
    for i in range(sizes.pairs)
  ]
  layout = packing.layout_for([examples], patches=patches, image_size=side)
  batch = packing.pack(examples, layout)
  return batch, packing.count_work(batch, patches)


def describe(axis: str, points: Sequence[Point]) -> tuple[str, Fit]:
  """Return the table of one axis, and the fit of its CPU seconds."""
  x = [p.x for p in points]
  line = fit(x, [p.cpu for p in points])
  counted = fit(x, [float(p.flops) for p in points])
  said = (
    f"**{axis}**: CPU seconds = {line.a:.3f} + {line.b:.3g} x"
    f" ({100 * line.left:.1f} % of the variance left), exponent"
    f" {line.exponent:.2f}; of the FLOPs {counted.exponent:.2f}"
  )
  head = [axis, "wall s", "CPU s", "GFLOP", "GFLOP/CPU s", "first step s"]
  rows = [
    [
      f"{p.x:g}",
      f"{p.wall:.3f}",
      f"{p.cpu:.3f}",
      f"{p.flops / 1e9:.1f}",
      f"{p.flops / 1e9 / p.cpu:.0f}",
      f"{p.first:.1f}",
    ]
    for p in points
  ]
  return f"{said}\n\n{verdict.markdown([head, *rows])}", line


def main() -> None:
  """Measure every axis and write growth.md and growth.json."""
  parser = argparse.ArgumentParser(prog="python -m bench.growth")
  parser.add_argument("--out", type=pathlib.Path, default="bench/results")
  parser.add_argument("--only", choices=AXES, help="one axis, printed alone")
  flags = parser.parse_args()
  report = results.Report("python -m bench.growth")
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
  blocks, axes = [], {}
  for axis, sizes in AXES.items():
    if flags.only and axis != flags.only:
      continue
    points = list(map(functools.partial(measure, axis), sizes))
    block, line = describe(axis, points)
    blocks.append(block)
    axes[axis] = {
      "points": [dataclasses.asdict(p) for p in points],
      "fit": dataclasses.asdict(line),
    }
  if flags.only:
    print("\n\n".join(blocks))
    return
  report.publish(
    flags.out, "growth", *blocks, machine=f", {CORES} cores", axes=axes
  )


if __name__ == "__main__":
  main()
