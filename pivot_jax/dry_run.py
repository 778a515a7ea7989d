"""What a run would do: stages, shapes, parameters, memory and row counts.

Nothing is trained, written or compiled; sources are opened and counted.
"""

import functools
from typing import Any

import jax

from pivot_jax import checkpoint, recipe, trees
from pivot_jax.data import chat, registry
from pivot_jax.stages import train


def describe(plan: recipe.Plan) -> str:
  """Returns the plan with what can be known of each stage beforehand."""
  lines = [recipe.describe(plan), ""]
  for step in plan.steps:
    details = [*_rows(step), *(_train(step) if step.kind == "train" else ())]
    if details:
      lines += [step.name, *(f"  {line}" for line in details)]
  return "\n".join(lines)


def _rows(step: recipe.Step) -> list[str]:
  found = []
  for name in sorted(step.config.sources):
    source = registry.open_source(step.config.sources[name].to_dict())
    found.append(f"{name}: {len(source)} rows")
  return found


def _train(step: recipe.Step) -> list[str]:
  """Returns parameters and state bytes of a training stage, from shapes."""
  config = step.config
  shapes = _shapes(step)
  inside, _ = trees.split(shapes, config.trainable)
  total, training = trees.count(shapes), trees.count(inside)
  # float32 parameters, and for what trains a gradient and two moments.
  megabytes = (4 * total + 12 * training) / 1e6
  pack = config.pack
  tokens = pack.tokens or pack.get("row") or "as long as the longest example"
  return [
    f"{total:,} parameters, {training:,} train; {megabytes:,.1f} MB of state",
    f"{config.steps} updates of {config.batch} examples; row tokens: {tokens}",
  ]


def _shapes(step: recipe.Step) -> Any:
  """Returns the shapes of a stage's model, without reading earlier stages."""
  tokenizer = chat.load_tokenizer(
    checkpoint.tokenizer_folder(step.config.tokenizer)
  )
  outside = {
    name: address
    for name, address in step.inputs.items()
    if address.startswith(("package:", "hf:"))
  }
  build = functools.partial(train.assemble, step.config, outside, tokenizer)
  return jax.eval_shape(lambda: build().params)
