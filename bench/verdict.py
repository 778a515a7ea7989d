"""Numbers of a side-by-side benchmark: the gate, the medians and the table.

Pure functions of what `bench/side_by_side.py` has measured. They start nothing
and know no model; a *row* is what one variant's runs came to.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

Numbers = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
  """One variant as measured; seconds are of one step.

  `walls` and `cpus` are of the run shown, `again` the median wall and CPU
  seconds of the second run, where there is one; `first` are the seconds of the
  first step of each run, the first of them with empty caches of compiled code.
  `other_work` is how many cores of the machine did something else meanwhile,
  `load` the load average before and after. `part` says that a step is not the
  others' whole step.
  """

  name: str
  label: str
  settings: str
  walls: tuple[float, ...]
  cpus: tuple[float, ...]
  first: tuple[float, ...]
  again: tuple[float, float] | None
  errors: Mapping[str, float]
  load: tuple[float, float]
  other_work: float = 0.0
  part: bool = False

  @property
  def wall(self) -> float:
    return float(np.median(self.walls))

  @property
  def cpu(self) -> float:
    return float(np.median(self.cpus))

  @property
  def noise(self) -> tuple[float, float] | None:
    """The differences of two runs of the same thing, as shares of the first."""
    if self.again is None:
      return None
    wall, cpu = self.again
    return abs(wall / self.wall - 1), abs(cpu / self.cpu - 1)


def errors(found: Numbers, reference: Numbers) -> dict[str, float]:
  """Returns the relative difference of every kind of number, the worst of each.

  The kind of "update/head" is "update". Numbers of that kind are what training
  added to a tensor and are compared as vectors, |a - b| / |b|: AdamW divides
  by the size of the gradient, so an element whose gradient is nothing but
  rounding moves by a whole step in either direction. All other numbers are
  compared one by one. A number that is missing or not finite differs by inf.
  """
  worst: dict[str, float] = {}
  for name, right in reference.items():
    kind = name.split("/")[0]
    value = np.inf
    if name in found and np.shape(found[name]) == np.shape(right):
      value = _difference(found[name], right, whole=kind == "update")
    worst[kind] = max(worst.get(kind, 0.0), value)
  return worst


def _difference(left, right, *, whole: bool) -> float:
  left, right = (np.asarray(x, np.float64) for x in (left, right))
  if not (np.isfinite(left).all() and np.isfinite(right).all()):
    return float("inf")
  off, size = np.abs(left - right), np.abs(right)
  if whole:
    off, size = np.linalg.norm(off), np.linalg.norm(size)
  # Equal zeros differ by nothing; anything differs from zero by a lot.
  return float(np.max(off / np.maximum(size, 1e-30), initial=0.0))


def failures(
  differences: Mapping[str, float], limits: Mapping[str, float]
) -> list[str]:
  """Returns a line for every kind of number that is off by over its limit."""
  return [
    f"{kind} differs by {differences.get(kind, np.inf):.2e}, allowed {limit:.0e}"
    for kind, limit in limits.items()
    # Written so that nan fails.
    if not differences.get(kind, np.inf) <= limit
  ]


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
  """Returns the 10th percentile, the median and the 90th percentile."""
  low, middle, high = np.quantile(seconds, (0.1, 0.5, 0.9))
  return float(low), float(middle), float(high)


def table(rows: Sequence[Row], ours: str, work: Mapping[str, float]) -> str:
  """Returns the rows as a Markdown table.

  `work` is what one step does, {"pairs": 8}, the same for all; each entry
  becomes a column of work per second. The last two columns are how many times
  faster `ours` is, in wall and in CPU seconds: over 1 means ours is faster.
  """
  heads = ["variant", "wall s/step", "p10–p90", "CPU s/step"]
  heads += [f"{name}/s" for name in work]
  heads += ["first step s", "warm", "ours, wall", "ours, CPU"]
  best = {row.name: row for row in rows}.get(ours)
  lines = [heads, ["---"] * len(heads)]
  for row in rows:
    low, middle, high = spread(row.walls)
    cells = [row.label, f"{middle:.3f}", f"{low:.3f}–{high:.3f}"]
    cells += [f"{row.cpu:.3f}"]
    cells += [
      "" if row.part else _count(amount / middle) for amount in work.values()
    ]
    cells += [f"{row.first[0]:.1f}"]
    cells += [f"{row.first[1]:.1f}" if len(row.first) > 1 else ""]
    cells += _faster(row, best)
    lines.append(cells)
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _faster(row: Row, best: Row | None) -> list[str]:
  if best is None or row.part or row.name == best.name:
    return ["", ""]
  return [f"{row.wall / best.wall:.2f}x", f"{row.cpu / best.cpu:.2f}x"]


def _count(value: float) -> str:
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def goal(text: str, value: float, limit: float, *, least: bool = True) -> str:
  """Returns a line saying whether a goal is met: at least, or at most, limit."""
  met = value >= limit if least else value <= limit
  sign = "at least" if least else "at most"
  state = "met" if met else "missed"
  return f"- {text}: {value:.2f}, goal {sign} {limit:g}: {state}"


def compile_goals(ours: Row) -> list[str]:
  """Returns the lines on our first step, with empty caches and with full ones."""
  limits = (("empty", 15.0), ("full", 2.0))
  return [
    goal(f"seconds of the first step, caches {name}", took, limit, least=False)
    for (name, limit), took in zip(limits, ours.first, strict=False)
  ]


def warning(rows: Sequence[Row], allowed: float = 0.1) -> list[str]:
  """Returns a line if the machine did other work, or none."""
  off = [row.label for row in rows if row.other_work > allowed]
  if not off:
    return []
  return [
    f"**Do not compare wall seconds here**: other work ran on over {allowed:g}"
    f" cores during {len(off)} of {len(rows)} rows ({', '.join(off)})."
  ]


def notes(rows: Sequence[Row]) -> str:
  """Returns what was run, what it agreed to and how much it wavered."""
  lines = []
  for row in rows:
    parts = [row.settings] if row.settings else []
    if row.errors:
      found = ", ".join(f"{k} {v:.0e}" for k, v in sorted(row.errors.items()))
      parts.append(f"differs from the reference by {found}")
    if row.again is not None:
      wall, cpu = row.noise
      parts.append(
        f"run again {row.again[0]:.3f} s/step ({100 * wall:.0f} % off) and"
        f" {row.again[1]:.3f} CPU s ({100 * cpu:.0f} % off)"
      )
    before, after = row.load
    parts.append(
      f"other work on {max(row.other_work, 0):.2f} cores, load {before:.1f}"
      f" before, {after:.1f} after"
    )
    lines.append(f"- {row.label}: {'; '.join(parts)}")
  return "\n".join(lines)
