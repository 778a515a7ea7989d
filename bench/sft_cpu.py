"""One SFT update of a toy MLLM on two CPU cores, beside torch and TRL.

  python -m bench.sft_cpu

Needs `pip install -e ".[bench]"`. The model and the data of `bench/dpo_cpu.py`,
trained on the chosen answers alone: the loss is the mean over all answer tokens
of the batch. Nothing is computed twice here by anybody, so this compares how
the same work is done. It says nothing about an accelerator or a real model.
"""

from collections.abc import Mapping
from typing import Any

from bench import harness, verdict
from bench.update import peers, toy

# As in bench/dpo_cpu.py, but a loss is a mean and no difference.
LIMITS = {"logps": 1e-5, "loss": 1e-5, "grad_norm": 1e-4, "update": 1e-2}


def _ours(folder):
  import jax.numpy as jnp

  from bench.update import ours
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
  rows: Mapping[str, verdict.Row], work: harness.Work
) -> tuple[list[str], dict[str, Any]]:
  """Return the factors by which ours is faster than each kind's best."""
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


BENCH = harness.Bench(
  name="sft_cpu",
  setup=toy.setup(answers=1),
  variants=(
    *peers.variants("sft"),
    harness.Variant(
      "ours",
      "pivot_jax",
      _ours,
      "the package's own objective and update",
      again=True,
    ),
  ),
  reference="torch",
  ours={"": "ours"},
  limits=LIMITS,
  options=toy.OPTIONS,
  summary=summary,
)

if __name__ == "__main__":
  harness.main(BENCH)
