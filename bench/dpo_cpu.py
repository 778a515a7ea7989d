"""One DPO update of a toy MLLM on two CPU cores, beside torch and TRL.

  python -m bench.dpo_cpu

Needs `pip install -e ".[bench]"`. All variants train the same 8.1 M parameters
on the same eight pairs with AdamW, in float32 but for the row that says
bfloat16. Ours is a ladder: "naive" is the peers' algorithm, and each rung takes
away one thing that is computed twice. The last has the reference model's
log-probabilities as data; what making them costs is measured and charged below
the table. This says nothing about an accelerator or a model of real size.
"""

from collections.abc import Mapping
from typing import Any

from bench import harness, verdict
from bench.update import peers, toy

# Relative. A DPO loss is a difference of sums near -290, which float32 gives to
# 3e-5. Torch's own gradient norm is 2e-5 off what float64 gives. AdamW divides
# by the size of a gradient, so what training adds to a tensor is compared as a
# vector (`verdict.errors`).
LIMITS = {"logps": 1e-5, "loss": 1e-4, "grad_norm": 1e-4, "update": 1e-2}
EPOCHS = (1, 3)


def _rung(name, label, settings, *, again=False, limits=None, part=False):
  def make(folder):
    from bench.update import ladder

    return ladder.RUNGS[name](folder)

  return harness.Variant(name, label, make, settings, again, limits, part)


LADDER = (
  _rung("naive", "pivot_jax naive", "the peers' algorithm"),
  _rung("image_once", "+ image once", "one encode for a pair"),
  _rung("prompt_once", "+ prompt once", "answers as branches of a packed row"),
  _rung(
    "cached",
    "+ cached reference = pivot_jax",
    "the package's own objective and update",
    again=True,
  ),
  _rung(
    "reference",
    "(reference forward pass, once)",
    "what the score stage does",
    limits={"logps": LIMITS["logps"]},
    part=True,
  ),
)


def summary(
  rows: Mapping[str, verdict.Row], work: harness.Work
) -> tuple[list[str], dict[str, Any]]:
  """Return the goals, and a step's cost with the reference charged."""
  torch = peers.fastest(rows, peers.EAGER)
  compiled = peers.fastest(rows, ["torch_compile"])
  trl = peers.fastest(rows, peers.TRL)
  if not all((torch, compiled, trl, {"cached", "reference"} <= set(rows))):
    return [], {}
  ours, once = rows["cached"], rows["reference"]
  lines = [
    verdict.goal(
      f"times faster than {row.label} (by CPU seconds"
      f" {row.cpu / ours.cpu:.2f})",
      row.wall / ours.wall,
      limit,
    )
    for row, limit in ((torch, 1.7), (compiled, 1.3), (trl, 2.0))
  ]
  lines += verdict.compile_goals(ours)
  found = {}
  for epochs in EPOCHS:
    wall = ours.wall + once.wall / epochs
    cpu = ours.cpu + once.cpu / epochs
    faster = {row.name: row.wall / wall for row in (torch, compiled, trl)}
    found[f"epochs_{epochs}"] = {"wall": wall, "cpu": cpu, "faster": faster}
    text = ", ".join(f"{v:.2f}x {rows[k].label}" for k, v in faster.items())
    lines.append(
      f"- the reference pass charged, {epochs} epoch(s): {wall:.3f} s/step"
      f" ({cpu:.3f} CPU s), {work['']['pairs'] / wall:.1f} pairs/s; {text}"
    )
  return lines, found


BENCH = harness.Bench(
  name="dpo_cpu",
  setup=toy.setup(answers=2),
  variants=(*peers.variants("dpo"), *LADDER),
  reference="torch",
  ours={"": "cached"},
  limits=LIMITS,
  options=toy.OPTIONS,
  summary=summary,
)

if __name__ == "__main__":
  harness.main(BENCH)
