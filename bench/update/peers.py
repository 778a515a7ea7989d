"""The peers' rows of the training benchmarks: how torch and TRL are run.

Names and settings alone; what runs is in `bench/update/torch_peer.py` and
`bench/update/trl_peer.py`, which are imported in a row's own process.
"""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from bench import harness, verdict

# The same algorithm in several settings: the fastest row counts.
EAGER = ("torch", "torch_eager_attention", "torch_foreach")
TRL = ("trl", "trl_tuned", "trl_compiled")

_TRAINER = (
  "float32 (its default is bfloat16 autocast), sdpa, fused AdamW, no dropout,"
  " no truncation; scores all positions, as it does without Triton"
)


# Name, label, settings, how it is run; what is run again has a warm first step.
_ROWS: tuple[tuple[str, str, str, Mapping[str, Any]], ...] = (
  (
    *("torch", "torch eager"),
    "float32, sdpa attention, fused AdamW, logits of answer tokens alone",
    {},
  ),
  (
    *("torch_eager_attention", "torch eager, eager attention"),
    "as torch eager, but attn_implementation=eager",
    {"attention": "eager"},
  ),
  (
    *("torch_foreach", "torch eager, foreach AdamW"),
    "as torch eager, but AdamW(foreach=True)",
    {"fused": False},
  ),
  (
    *("torch_compile", "torch.compile"),
    "as torch eager, the whole loss compiled in the default mode",
    {"compiled": True},
  ),
  (
    *("trl", "default"),
    f"gradient checkpointing and a log every 10 steps; {_TRAINER}",
    {"tuned": False},
  ),
  (
    *("trl_tuned", "tuned"),
    f"no gradient checkpointing, no log; {_TRAINER}",
    {"tuned": True},
  ),
  (
    *("trl_compiled", "tuned, compiled"),
    f"torch_compile=True, else as tuned; {_TRAINER}",
    {"tuned": True, "compiled": True},
  ),
  (
    *("torch_bf16", "torch eager, bfloat16"),
    "as torch eager, under autocast: another precision than all other rows",
    {"bf16": True},
  ),
)
_AGAIN = ("torch", "torch_compile", "trl_tuned")
_LIMITS = {"torch_bf16": {"logps": 5e-3}}


def variants(objective: str) -> tuple[harness.Variant, ...]:
  """Return the rows for "dpo" or "sft", the reference of the gate first."""
  return tuple(_variant(objective, *row) for row in _ROWS)


def _variant(
  objective: str, name: str, label: str, settings: str, how: Mapping[str, Any]
) -> harness.Variant:
  side = name.split("_")[0]
  if side == "trl":
    label = f"TRL {objective.upper()}Trainer, {label}"

  def make(folder):
    module = importlib.import_module(f"bench.update.{side}_peer")
    return module.MAKERS[objective](folder, **how)

  again, limits = name in _AGAIN, _LIMITS.get(name)
  return harness.Variant(name, label, make, settings, again, limits)


def fastest(
  rows: Mapping[str, verdict.Row], names: Iterable[str]
) -> verdict.Row | None:
  """Return the named row of the shortest step, None if none has run."""
  found = [rows[name] for name in names if name in rows]
  return min(found, key=lambda row: row.wall, default=None)
