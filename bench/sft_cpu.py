"""One SFT update of a toy MLLM on two CPU cores, beside torch and TRL.

  python -m bench.sft_cpu

Needs `pip install -e ".[bench]"`. The model and the data of `bench/dpo_cpu.py`,
trained on the chosen answers alone: the loss is the mean over all answer tokens
of the batch. Nothing is computed twice here by anybody, so this compares how
the same work is done. It says nothing about an accelerator or a real model.
"""

from collections.abc import Mapping
from typing import Any

from bench import peers, side_by_side, toy, verdict

# As in bench/dpo_cpu.py, but a loss is a mean and no difference.
LIMITS = {"logps": 1e-5, "loss": 1e-5, "grad_norm": 1e-4, "update": 1e-2}


def _ours(folder):
  import jax.numpy as jnp

  from bench import ours
  from pivot_jax.training import objectives

  setup = ours.Setup(folder)
  # One token mean over the batch, not one for every two examples.
  batch = setup.packed(ours.examples(setup.data, ("chosen",)), sft_group=0)

  def score(params, batch):
    values = objectives.logps(setup.model, params, batch)
    return jnp.where(batch.loss_answer == 0, values, 0.0).sum(axis=1)

  scores = setup.compute(score, batch)
  return ours.training(setup, objectives.sft(setup.model), batch, scores)


def summary(
  rows: Mapping[str, verdict.Row], work: Mapping[str, float]
) -> tuple[list[str], dict[str, Any]]:
  """Returns how much faster ours is than the fastest of each kind."""
  del work
  ours = rows["ours"] if "ours" in rows else None
  kinds = (peers.EAGER, ["torch_compile"], peers.TRL)
  found = [row for kind in kinds if (row := peers.fastest(rows, kind))]
  if ours is None:
    return [], {}
  faster = {row.name: row.wall / ours.wall for row in found}
  lines = [
    f"- times faster than {rows[name].label}: {value:.2f}"
    for name, value in faster.items()
  ]
  return [*lines, *verdict.compile_goals(ours)], {"faster": faster}


BENCH = side_by_side.Bench(
  name="sft_cpu",
  setup=toy.setup(answers=1),
  variants=(
    *peers.variants("sft"),
    side_by_side.Variant(
      "ours",
      "pivot_jax",
      _ours,
      "the package's own objective and update",
      again=True,
    ),
  ),
  reference="torch",
  ours="ours",
  limits=LIMITS,
  options=toy.OPTIONS,
  summary=summary,
)

if __name__ == "__main__":
  side_by_side.main(BENCH)
