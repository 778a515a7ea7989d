"""What the rows of the benchmark on a GPU came to: a table, goals, notes.

Pure functions. A *result* is what a row's process has saved, and "status", ""
where it ended well or else what became of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench import gpu_rows, verdict

Result = Mapping[str, Any]

# Whose steps those of a workload are compared with.
OURS = {
  "dpo_8": "ours_8",
  "dpo_16": "ours_16",
  "dpo_ragged": "ours_ragged",
  "sft_16": "sft",
}
# A row whose time ran out has said enough with this many timed steps.
ENOUGH = 3


def wall(result: Result | None) -> float | None:
  """Returns the median seconds of a step, None if there is none."""
  if result is None or len(result.get("walls", ())) < ENOUGH:
    return None
  return float(np.median(result["walls"]))


def table(
  results: Mapping[str, Result],
  works: Mapping[str, Mapping[str, float]],
  peak: float | None,
  *,
  compared: bool,
) -> str:
  """Returns the rows as a Markdown table; `peak` is the device's FLOP/s."""
  heads = ["row", "examples", "examples/s", "ms/step", "p10–p90"]
  heads += ["useful tokens/s", "TF/s", "MFU", "peak GB", "compile s", "ours"]
  lines = [heads, ["---"] * len(heads)]
  for name, result in results.items():
    row, seconds = gpu_rows.by_name()[name], wall(result)
    work = works.get(row.workload, {})
    cells = [row.label, f"{work.get('examples', 0):.0f}"]
    if seconds is None:
      cells += [result["status"] or "no steps", *[""] * (len(heads) - 3)]
    else:
      cells += _numbers(row, result, seconds, work, peak)
      cells.append(_faster(row, seconds, results) if compared else "")
    lines.append(cells)
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _numbers(row, result, seconds, work, peak) -> list[str]:
  low, _, high = verdict.spread(result["walls"])
  cells = [f"{1e3 * seconds:.1f}", f"{1e3 * low:.1f}–{1e3 * high:.1f}"]
  rates = ["", "", "", ""]
  if not row.part:
    flops = work["flops"] / seconds
    rates = [
      f"{work['examples'] / seconds:.2f}",
      f"{work['tokens'] / seconds:,.0f}",
      f"{flops / 1e12:.4g}",
      f"{100 * flops / peak:.1f} %" if peak else "",
    ]
  memory = f"{result['peak'] / 1e9:.1f}" if "peak" in result else ""
  return [rates[0], *cells, *rates[1:], memory, f"{_compiling(result):.1f}"]


def _compiling(result: Result) -> float:
  """Returns the seconds before steps; of torch those of the first one."""
  if "compile_seconds" in result:
    return result["trace_seconds"] + result["compile_seconds"]
  return result["first_step"]


def _faster(row, seconds, results) -> str:
  base = OURS.get(row.workload)
  ours = wall(results.get(base))
  if row.part or ours is None or row.name == base:
    return ""
  return f"{seconds / ours:.2f}x"


def goals(
  results: Mapping[str, Result],
  works: Mapping[str, Mapping[str, float]],
  *,
  compared: bool,
) -> list[str]:
  """Returns a line for each goal: met, missed or not measured."""
  if not compared:
    results = {
      k: v for k, v in results.items() if gpu_rows.by_name()[k].side == "ours"
    }

  def rate(*names):
    found = [
      works[gpu_rows.by_name()[n].workload]["examples"] / seconds
      for n in names
      if (seconds := wall(results.get(n)))
    ]
    return max(found, default=None)

  def times(peer, ours="ours_8"):
    return _over(wall(results.get(peer)), wall(results.get(ours)))

  def memory(ours, peer):
    return _over(*(results.get(n, {}).get("peak") for n in (ours, peer)))

  def compiling(name):
    result = results.get(name, {})
    return _compiling(result) if "compile_seconds" in result else None

  listed = (
    ("pairs/s, the better of 8 and 16", rate("ours_8", "ours_16"), 28, True),
    ("the same, stretched", rate("ours_8", "ours_16"), 35, True),
    ("SFT samples/s", rate("sft"), 48, True),
    ("times faster than TRL default, 8 pairs", times("trl_8"), 2.2, True),
    ("times faster than TRL tuned, 8 pairs", times("trl_tuned_8"), 1.7, True),
    (
      "peak memory over TRL default's, both computing again, 8 pairs",
      memory("ours_attention", "trl_8"),
      0.8,
      False,
    ),
    (
      "peak memory over TRL tuned's, neither computing again, 8 pairs",
      memory("ours_8", "trl_tuned_8"),
      0.8,
      False,
    ),
    ("seconds to compile, caches empty", compiling("ours_8"), 60, False),
    ("seconds to compile, caches full", compiling("ours_again"), 10, False),
  )
  return [_goal(*one) for one in listed]


def _goal(text, value, limit, least) -> str:
  if value is None:
    sign = "at least" if least else "at most"
    return f"- {text}: not measured, goal {sign} {limit:g}"
  return verdict.goal(text, value, limit, least=least)


def _over(left: float | None, right: float | None) -> float | None:
  return left / right if left and right else None


def charged(results: Mapping[str, Result]) -> list[str]:
  """Returns what a step takes with the reference pass charged to epochs."""
  ours, once = wall(results.get("ours_8")), wall(results.get("ours_reference"))
  if not (ours and once):
    return []
  lines = []
  for epochs in (1, 3):
    seconds = ours + once / epochs
    faster = [
      f"{seconds_of / seconds:.2f}x {gpu_rows.by_name()[name].label}"
      for name in ("trl_8", "trl_tuned_8", "torch_8")
      if (seconds_of := wall(results.get(name)))
    ]
    text = ", ".join([f"{1e3 * seconds:.1f} ms/step", *faster])
    lines.append(f"- the reference pass charged, {epochs} epoch(s): {text}")
  return lines


def notes(results: Mapping[str, Result]) -> list[str]:
  """Returns how each row was run and what else it said."""
  return [
    f"- {gpu_rows.by_name()[name].label} (`{name}`): "
    + "; ".join(_said(gpu_rows.by_name()[name], result))
    for name, result in results.items()
  ]


def _said(row: gpu_rows.Row, result: Result) -> list[str]:
  parts = [row.settings] if row.settings else []
  if result["status"]:
    parts.append(result["status"])
  if "estimate" in result:
    parts.append(f"memory foreseen {result['estimate'] / 1e9:.1f} GB")
  if "program_bytes" in result:
    parts.append(f"XLA's own sum {result['program_bytes'] / 1e9:.1f} GB")
  if "reserved" in result:
    parts.append(f"reserved {result['reserved'] / 1e9:.1f} GB")
  if "flash_calls" in result:
    parts.append(flash(result))
  if "first_step" in result:
    parts.append(f"first step {result['first_step']:.1f} s")
  if not result.get("finite", True):
    parts.append("NOT FINITE")
  return parts


def flash(result: Result) -> str:
  """Returns what the compiled program says of its attention."""
  calls, scores = result["flash_calls"], result["scores"]
  said = f"{calls} calls of cuDNN's attention in the program"
  return f"{said}, float32 scores: {', '.join(scores) or 'none'}"


def gate(before: Mapping[str, Result]) -> list[str]:
  """Returns what both sides agreed to on equal small weights."""
  lines = []
  for name in ("gate_torch", "gate_ours"):
    for dtype, found in before[name].get("errors", {}).items():
      said = ", ".join(f"{k} {v:.0e}" for k, v in sorted(found.items()))
      lines.append(f"- {name} in {dtype}, off torch in float32 by: {said}")
    if before[name]["status"]:
      lines.append(
        f"- {name} {before[name]['status']}: THE SIDES ARE NOT COMPARED"
      )
  return lines


def ceilings(found: Result) -> list[str]:
  """Returns what the device gives at best."""
  if "copy_rate" not in found:
    return []
  return [
    f"- ceilings: {found['matmul_flops'] / 1e12:.4g} TF/s for a product of"
    f" {found['matmul_side']} x {found['matmul_side']} random bfloat16"
    f" matrices, {found['copy_rate'] / 1e12:.3g} TB/s for a copy of"
    f" {found['copy_bytes'] / 1e9:.2g} GB (read and written)"
  ]


def markdown(
  found: Mapping[str, Any], results: Mapping[str, Result], lines: Sequence[str]
) -> str:
  """Returns the page."""
  versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
  tiny = "Tiny sizes: that this ran is all it says; goals are not for them.\n"
  return "\n".join(
    [
      f"`{found['command']}`",
      "",
      *([tiny] if found["tiny"] else []),
      f"{found['date']}, {found['gpu'] or found['cpu']}; {versions};"
      f" took {found['seconds']:.0f} s.",
      "",
      table(
        results,
        found["works"],
        found["peak_flops"],
        compared=found["compared"],
      ),
      "",
      *lines,
      "",
      f"Medians of a row's timed steps after {found['warm_up_steps']}; every row"
      " is a process of its own. TF/s and MFU count the least arithmetic that"
      ' does the update, the same for every row. "ours" says how many times'
      " faster our row of the same workload is; compiling is, for torch, its"
      " first step. Peak memory is what arrays took, not what was reserved.",
      "",
      *notes(results),
      "",
    ]
  )
