"""The rows of the benchmark on a GPU, most important first, and its goals.

Names and settings alone; what runs is imported in a row's own process. The toy
rows are the gate: equal small weights on both sides, on the device and with the
attention that are timed, torch in float32 being what all are compared with.
"""

import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from bench import harness, verdict
from bench.gpu import sizes

# Relative, see `verdict.errors`. A DPO loss is a difference of sums near -290,
# and AdamW divides by the size of a gradient: of bfloat16 no update is asked.
LIMITS = {"logps": 1e-4, "loss": 1e-2, "grad_norm": 1e-2, "update": 5e-2}
BFLOAT16 = {"logps": 5e-3, "loss": 1e-2, "grad_norm": 1e-2}

_TRAINER = (
  "float32 weights, bfloat16 autocast, fused AdamW, fixed tensors on the device"
  " from the collator, max_length raised, no dropout"
)
_LOOP = (
  "float32 weights, bfloat16 autocast, sdpa without a mask, logits of the"
  " answers alone in chunks, fused AdamW, no checkpointing of blocks"
)
# What the rows of a side have in common, by the first word of their names.
_SETTINGS = {
  "ours": "no remat",
  "torch": f"reference model in every step; {_LOOP}",
  "trl": f"sdpa; {_TRAINER}",
}
# Name, workload, label, how it is run.
_FULL: tuple[tuple[str, str, str, Mapping[str, Any]], ...] = (
  ("ours_8", "dpo_8", "pivot_jax, 8 pairs", {}),
  ("trl_8", "dpo_8", "TRL DPOTrainer, default", {"tuned": False}),
  ("trl_tuned_8", "dpo_8", "TRL DPOTrainer, tuned", {"tuned": True}),
  ("ours_attention", "dpo_8", "remat attention", {"remat": "attention"}),
  ("ours_sft", "sft_16", "pivot_jax SFT", {"objective": "sft"}),
  ("torch_8", "dpo_8", "torch loop", {}),
  ("ours_16", "dpo_16", "pivot_jax, 16 pairs", {}),
  ("torch_sft", "sft_16", "torch loop SFT", {}),
  ("torch_compiled_8", "dpo_8", "torch loop, compiled", {"compiled": True}),
)
# With --tiny, to go through the code if not through all settings.
_QUICK = ("ours_8", "trl_8", "ours_sft", "torch_sft", "torch_compiled_8")
# Timed steps and the most seconds of rows that have others than the rest.
_STEPS = {"ours_8": 20, "ours_16": 20}
_SECONDS = {"ours_8": 200.0}


def _make(
  side: str, kind: str, *arguments: str, **how: Any
) -> Callable[[pathlib.Path], harness.Ready]:
  """Return a maker whose side is imported in the row's own process."""

  def make(folder: pathlib.Path) -> harness.Ready:
    module = importlib.import_module(f"bench.gpu.{side}")
    return module.MAKERS[kind](folder, *arguments, **how)

  return make


def _full(
  name: str, workload: str, label: str, how: Mapping[str, Any]
) -> harness.Variant:
  """Return a row of real size: weights are random, and nothing is gated."""
  side = name.split("_")[0]
  module = side if side == "ours" else f"{side}_peer"
  said = [f"{key} {value}" for key, value in how.items()]
  return harness.Variant(
    name,
    label,
    _make(module, "update", workload, **how),
    "; ".join([*said, _SETTINGS[side]]),
    again=name == "ours_8",
    limits={},
    workload=workload,
    steps=_STEPS.get(name, 0),
    seconds=_SECONDS.get(name, 100.0),
    quick=name in _QUICK,
  )


def _toy(name: str, label: str, module: str, dtype: str) -> harness.Variant:
  """Return a row of the gate."""
  return harness.Variant(
    name,
    f"{label}, toy in {dtype}",
    _make(module, "toy", dtype),
    limits=LIMITS if dtype == "float32" else BFLOAT16,
    part=True,
    workload="toy",
    steps=3,
  )


ROWS = (
  _toy("toy_torch", "torch loop", "torch_peer", "float32"),
  _toy("toy_torch_bf16", "torch loop", "torch_peer", "bfloat16"),
  _toy("toy_ours", "pivot_jax", "ours", "float32"),
  _toy("toy_ours_bf16", "pivot_jax", "ours", "bfloat16"),
  *(_full(*row) for row in _FULL),
  harness.Variant(
    "ours_reference",
    "(reference pass, once)",
    _make("ours", "reference", "dpo_8"),
    limits={},
    part=True,
    workload="dpo_8",
  ),
)


def setup(folder: pathlib.Path, options: harness.Options) -> harness.Work:
  """Return the work of a step; the toy is written by its first row."""
  del folder
  from bench.gpu import ours

  tiny = bool(options["tiny"])
  timed = {row.workload for row in ROWS} & set(sizes.WORKLOADS)
  return {name: ours.work(name, tiny=tiny) for name in timed} | ours.device()


def summary(
  rows: Mapping[str, verdict.Row], work: harness.Work
) -> tuple[list[str], dict[str, Any]]:
  """Return a line for each goal and the reference pass charged to epochs."""
  failed = [
    row.label for row in rows.values() if row.workload == "toy" and row.status
  ]
  lines = goals(rows, work) + _charged(rows) + _shares(rows, work)
  if failed:
    said = f"**The sides are not compared**: {', '.join(failed)} did not end."
    lines = [said, *lines]
  return lines, {"goals": lines}


def goals(rows: Mapping[str, verdict.Row], work: harness.Work) -> list[str]:
  """Return a line for each goal: met, missed or not measured."""

  def wall(name: str) -> float | None:
    return rows[name].wall if name in rows and rows[name].ran else None

  def rate(*names: str) -> float | None:
    found = [
      work[rows[n].workload]["examples"] / seconds
      for n in names
      if (seconds := wall(n))
    ]
    return max(found, default=None)

  def times(peer: str) -> float | None:
    # Nothing is beside a row where the gate could not be asked.
    beside = peer in rows and rows[peer].beside
    return _over(wall(peer), wall("ours_8")) if beside else None

  def peak(ours: str, peer: str) -> float | None:
    return _over(*(rows[n].peak if wall(n) else 0 for n in (ours, peer)))

  def start(number: int) -> float | None:
    first = rows["ours_8"].first if "ours_8" in rows else ()
    return first[number] if len(first) > number else None

  pairs = rate("ours_8", "ours_16")
  listed = (
    ("pairs/s, the better of 8 and 16", pairs, 28, True),
    ("the same, stretched", pairs, 35, True),
    ("SFT samples/s", rate("ours_sft"), 48, True),
    ("times faster than TRL default, 8 pairs", times("trl_8"), 2.2, True),
    ("times faster than TRL tuned, 8 pairs", times("trl_tuned_8"), 1.7, True),
    (
      "peak memory over TRL default's, both computing again, 8 pairs",
      *(peak("ours_attention", "trl_8"), 0.8, False),
    ),
    (
      "peak memory over TRL tuned's, neither computing again, 8 pairs",
      *(peak("ours_8", "trl_tuned_8"), 0.8, False),
    ),
    ("seconds of the first step, caches empty", start(0), 60, False),
    ("seconds of the first step, caches full", start(1), 10, False),
  )
  return [_goal(*one) for one in listed]


def _goal(text: str, value: float | None, limit: float, least: bool) -> str:
  if value is None:
    sign = "at least" if least else "at most"
    return f"- {text}: not measured, goal {sign} {limit:g}"
  return verdict.goal(text, value, limit, least=least)


def _over(left: float | None, right: float | None) -> float | None:
  return left / right if left and right else None


def _shares(rows: Mapping[str, verdict.Row], work: harness.Work) -> list[str]:
  """Return MFU, of the device's published peak, where that is known."""
  if "device" not in work:
    return []
  peak = work["device"]["peak TFLOP"]
  shares = [
    f"{row.label} {100 * work[row.workload]['TFLOP'] / row.wall / peak:.1f} %"
    for row in rows.values()
    if row.ran and not row.part and "TFLOP" in work.get(row.workload, {})
  ]
  return [f"- MFU, of {peak:.0f} TFLOP/s: {', '.join(shares)}"]


def _charged(rows: Mapping[str, verdict.Row]) -> list[str]:
  """Return the time of a step with the reference pass charged to epochs."""
  names = ("ours_8", "ours_reference")
  if not all(name in rows and rows[name].ran for name in names):
    return []
  ours, once = (rows[name].wall for name in names)
  lines = []
  for epochs in (1, 3):
    seconds = ours + once / epochs
    faster = [
      f"{row.wall / seconds:.2f}x {row.label}"
      for name in ("trl_8", "trl_tuned_8", "torch_8")
      if (row := rows.get(name)) and row.ran and row.beside
    ]
    text = ", ".join([f"{1e3 * seconds:.1f} ms/step", *faster])
    lines.append(f"- the reference pass charged, {epochs} epoch(s): {text}")
  return lines


BENCH = harness.Bench(
  name="gpu",
  setup=setup,
  variants=ROWS,
  reference="toy_torch",
  ours={
    "dpo_8": "ours_8",
    "dpo_16": "ours_16",
    "sft_16": "ours_sft",
  },
  limits=LIMITS,
  options={"tiny": False},
  steps=10,
  summary=summary,
  minutes=10.0,
)
