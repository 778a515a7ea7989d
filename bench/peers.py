"""The peers' rows of the training benchmarks: how torch and TRL are run.

Names and settings alone; what runs is in `bench/torch_peers.py` and
`bench/trl_peers.py`, which are imported in a row's own process.
"""

from collections.abc import Iterable, Mapping

from bench import side_by_side, verdict

# The same algorithm in several settings: the fastest row counts.
EAGER = ("torch", "torch_eager_attention", "torch_foreach")
TRL = ("trl", "trl_tuned", "trl_compiled")

_TRAINER = (
  "float32 (its default is bfloat16 autocast), sdpa, fused AdamW, no dropout,"
  " no truncation; scores all positions, as it does without Triton"
)


def variants(objective: str) -> tuple[side_by_side.Variant, ...]:
  """Returns the rows for "dpo" or "sft", the reference of the gate first."""

  def torch(name, label, settings, *, again=False, limits=None, **how):
    def make(folder):
      from bench import torch_peers

      return torch_peers.LOOPS[objective](folder, **how)

    return side_by_side.Variant(name, label, make, settings, again, limits)

  def trl(name, kind, settings, *, again=False, **how):
    def make(folder):
      from bench import trl_peers

      return trl_peers.TRAINERS[objective](folder, **how)

    label = f"TRL {objective.upper()}Trainer, {kind}"
    return side_by_side.Variant(name, label, make, settings, again)

  return (
    torch(
      "torch",
      "torch eager",
      "float32, sdpa attention, fused AdamW, logits of answer tokens alone",
      again=True,
    ),
    torch(
      "torch_eager_attention",
      "torch eager, eager attention",
      "as torch eager, but attn_implementation=eager",
      attention="eager",
    ),
    torch(
      "torch_foreach",
      "torch eager, foreach AdamW",
      "as torch eager, but AdamW(foreach=True)",
      fused=False,
    ),
    torch(
      "torch_compile",
      "torch.compile",
      "as torch eager, the whole loss compiled in the default mode",
      again=True,
      compiled=True,
    ),
    trl(
      "trl",
      "default",
      f"gradient checkpointing and a log every 10 steps; {_TRAINER}",
      tuned=False,
    ),
    trl(
      "trl_tuned",
      "tuned",
      f"no gradient checkpointing, no log; {_TRAINER}",
      again=True,
      tuned=True,
    ),
    trl(
      "trl_compiled",
      "tuned, compiled",
      f"torch_compile=True, else as tuned; {_TRAINER}",
      tuned=True,
      compiled=True,
    ),
    torch(
      "torch_bf16",
      "torch eager, bfloat16",
      "as torch eager, under autocast: another precision than all other rows",
      limits={"logps": 5e-3},
      bf16=True,
    ),
  )


def fastest(
  rows: Mapping[str, verdict.Row], names: Iterable[str]
) -> verdict.Row | None:
  """Returns the named row of the shortest step, None if none has run."""
  found = [rows[name] for name in names if name in rows]
  return min(found, key=lambda row: row.wall, default=None)
