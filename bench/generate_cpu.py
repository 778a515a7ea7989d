"""Greedy answers of a toy MLLM on two CPU cores, beside transformers.

  python -m bench.generate_cpu

Needs `pip install -e ".[bench]"`. A step takes eight images (64 tokens each)
with prompts of 24 tokens and gives 64 new tokens for each: encoding, prefill
and the loop, from arrays to ids. All variants hold the same float32 weights,
every prompt is as long as the next, nobody may end early, and the gate wants
the same 64 ids in all rows. This says nothing about an accelerator, a model of
real size or trained weights.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from bench import harness, verdict
from bench.update import toy

GOAL = 1.5
# The toy's matrices are so small that it repeats one word for ever, and a wrong
# cache would not show. Five times as large, every id depends on what came
# before it.
SCALE = 5.0


def setup(folder: pathlib.Path, options: harness.Options) -> harness.Work:
  """Write model and data and return the work of a step."""
  import torch
  import transformers

  toy.write(folder, options, answers=1)
  model = transformers.LlavaForConditionalGeneration.from_pretrained(
    folder / "toy"
  )
  with torch.no_grad():
    for tensor in model.model.language_model.layers.parameters():
      if tensor.ndim == 2:
        tensor.mul_(SCALE)
  model.save_pretrained(folder / "toy")
  return {"": {"new tokens": options["pairs"] * options["answer"]}}


def _theirs(folder, *, attention="sdpa", static=False, compiled=False):
  import numpy as np
  import torch
  import transformers

  from bench.update import torch_peer

  data = toy.read(folder)
  model = torch_peer.load(data, attention).eval()
  batch = torch_peer.tensors(data, ("chosen",))
  ids = batch.ids[:, : batch.start]
  length = data.sizes["answer"]
  settings = dict(
    do_sample=False,
    min_new_tokens=length,
    max_new_tokens=length,
    # So that none is chosen for us, with a warning.
    pad_token_id=toy.PAD_ID,
  )
  if static:
    settings["cache_implementation"] = "static"
  if compiled:
    config = transformers.CompileConfig(mode="default")
    # Without this, `generate` compiles on accelerators alone.
    config._compile_all_devices = True
    settings["compile_config"] = config
  found = {}

  @torch.inference_mode()
  def step():
    found["ids"] = model.generate(
      input_ids=ids,
      pixel_values=batch.pixels,
      attention_mask=torch.ones_like(ids),
      **settings,
    )

  def numbers():
    return {"ids": np.asarray(found["ids"][:, batch.start :])}

  return harness.stepping(step, numbers)


def _ours(folder):
  import functools

  import jax
  import numpy as np

  from bench.update import ours
  from pivot_jax.evals import generate

  made = ours.Setup(folder)
  batch = made.alone(ours.examples(made.data, ()))
  compute = jax.jit(
    functools.partial(
      generate.generate,
      made.model,
      max_new_tokens=made.data.sizes["answer"],
      # No id of the vocabulary: no row ends.
      eos_ids=(toy.VOCAB,),
    )
  )
  found = {}

  def step():
    with made.context():
      found["ids"] = jax.block_until_ready(compute(made.params, batch))

  return harness.stepping(step, lambda: {"ids": np.asarray(found["ids"])})


def _peer(name, label, settings, *, again=False, **how):
  return harness.Variant(
    name, label, lambda folder: _theirs(folder, **how), settings, again
  )


PEERS = (
  _peer(
    "eager",
    "transformers",
    "generate, sdpa attention, its default cache, inference mode",
    again=True,
  ),
  _peer(
    "eager_attention",
    "transformers, eager attention",
    "as transformers, but attn_implementation=eager",
    attention="eager",
  ),
  _peer(
    "static",
    "transformers, static cache",
    "as transformers, but cache_implementation=static",
    static=True,
  ),
  _peer(
    "compiled",
    "transformers, static cache, torch.compile",
    "as static cache, each step compiled in the default mode",
    again=True,
    static=True,
    compiled=True,
  ),
)


def summary(
  rows: Mapping[str, verdict.Row], work: harness.Work
) -> tuple[list[str], dict[str, Any]]:
  """Return the goal: how many times faster ours is than the best peer."""
  del work
  found = [rows[peer.name] for peer in PEERS if peer.name in rows]
  if "ours" not in rows or not found:
    return [], {}
  best = min(found, key=lambda row: row.wall)
  faster = best.wall / rows["ours"].wall
  line = verdict.goal(
    f"times faster than {best.label}, the fastest of them",
    faster,
    GOAL,
    least=True,
  )
  return [line], {"fastest": best.name, "faster": faster}


BENCH = harness.Bench(
  name="generate_cpu",
  setup=setup,
  variants=(
    *PEERS,
    harness.Variant(
      "ours", "pivot_jax", _ours, "one compiled function", again=True
    ),
  ),
  reference="eager",
  ours={"": "ours"},
  # Ids are the same or they are not.
  limits={"ids": 0.0},
  options=toy.OPTIONS | {"answer": 64},
  summary=summary,
)

if __name__ == "__main__":
  harness.main(BENCH)
