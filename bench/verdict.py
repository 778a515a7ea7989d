"""Numbers of a benchmark: the gate, the medians and the tables.

Pure functions of what `bench/harness.py` has measured. They start nothing and
know no model; a *row* holds the runs of one variant.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

Numbers = Mapping[str, np.ndarray]

VECTORS = ("update", "gradient", "values")

# A row whose time ran out has said enough with this many timed steps.
ENOUGH = 3


@dataclasses.dataclass(frozen=True)
class Row:
  """One variant as measured; seconds are of one step.

  `walls` and `cpus` are of the run shown, `again` the median wall and CPU
  seconds of the second run, where there is one; `first` are the seconds of the
  first step of each run, compiling included, the first of them with empty
  caches of compiled code. `other_work` is how many cores of the machine did
  something else meanwhile, `load` the load average before and after. `part`
  says that a step is not the others' whole step. `status` says in words why a
  variant did not end well. `workload` names the work of a step and `beside` the
  row of ours that it is compared with. `peak` is in bytes, 0 if not known.
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
  status: str = ""
  workload: str = ""
  beside: str = ""
  peak: int = 0
  said: tuple[str, ...] = ()

  @property
  def ran(self) -> bool:
    """Tell that there are enough steps: one cut short may have done them."""
    return len(self.walls) >= ENOUGH or (bool(self.walls) and not self.status)

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
  """Return the relative difference of every kind of number, the worst of each.

  The kind of "update/head" is "update". Numbers of that kind are what training
  added to a tensor and are compared as vectors, |a - b| / |b|: AdamW divides
  by the size of the gradient, so an element whose gradient is nothing but
  rounding moves by a whole step in either direction. So are the other kinds of
  `VECTORS`; all other numbers are compared one by one. A number that is missing
  or not finite differs by inf.
  """
  worst: dict[str, float] = {}
  for name, right in reference.items():
    kind = name.split("/")[0]
    value = np.inf
    if name in found and np.shape(found[name]) == np.shape(right):
      value = _difference(found[name], right, whole=kind in VECTORS)
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
  """Return a line for every kind of number that is off by over its limit."""
  return [
    f"{kind} differs by {differences.get(kind, np.inf):.2e}, allowed {limit:.0e}"
    for kind, limit in limits.items()
    # Written so that nan fails.
    if not differences.get(kind, np.inf) <= limit
  ]


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
  """Return the 10th percentile, the median and the 90th percentile."""
  low, middle, high = np.quantile(seconds, (0.1, 0.5, 0.9))
  return float(low), float(middle), float(high)


def markdown(lines: Sequence[Sequence[object]]) -> str:
  """Return a Markdown table of a head and rows of cells."""
  head, *rows = lines
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def table(rows: Sequence[Row], work: Mapping[str, Mapping[str, float]]) -> str:
  """Return the rows as a Markdown table.

  `work` is what one step of each workload does, {"": {"pairs": 8}}; each entry
  becomes a column of work per second. The last two columns are how many times
  faster ours is, in wall and in CPU seconds: over 1 means ours is faster.
  """
  units = list(
    dict.fromkeys(unit for row in rows for unit in work.get(row.workload, {}))
  )
  peaks = any(row.peak for row in rows)
  head = ["variant", "wall s/step", "p10–p90", "CPU s/step"]
  head += [f"{unit}/s" for unit in units] + ["peak GB"] * peaks
  head += ["first step s", "warm", "ours, wall", "ours, CPU"]
  best = {row.name: row for row in rows if row.ran}
  lines = [head]
  for row in rows:
    if not row.ran:
      said = row.status or "no steps"
      lines.append([row.label, said, *[""] * (len(head) - 2)])
      continue
    low, middle, high = map(_seconds, spread(row.walls))
    cells = [row.label, middle, f"{low}–{high}", _seconds(row.cpu)]
    cells += _rates(row, units, work.get(row.workload, {}))
    cells += [f"{row.peak / 1e9:.1f}" if row.peak else ""] * peaks
    cells += [f"{seconds:.1f}" for seconds in row.first[:2]]
    cells += [""] * (2 - len(row.first))
    lines.append([*cells, *_faster(row, best.get(row.beside))])
  return markdown(lines)


def _rates(
  row: Row, units: Sequence[str], work: Mapping[str, float]
) -> list[str]:
  if row.part:
    return [""] * len(units)
  return [_count(work[u] / row.wall) if u in work else "" for u in units]


def _seconds(value: float) -> str:
  return f"{value:.3f}" if value >= 0.02 else f"{value:.5f}"


def _faster(row: Row, best: Row | None) -> list[str]:
  if best is None or row.part or row.name == best.name:
    return ["", ""]
  return [f"{row.wall / best.wall:.2f}x", f"{row.cpu / best.cpu:.2f}x"]


def _count(value: float) -> str:
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def goal(text: str, value: float, limit: float, *, least: bool = True) -> str:
  """Return a line saying whether a goal is met: at least, or at most, limit."""
  met = value >= limit if least else value <= limit
  sign = "at least" if least else "at most"
  state = "met" if met else "missed"
  return f"- {text}: {value:.2f}, goal {sign} {limit:g}: {state}"


def compile_goals(ours: Row) -> list[str]:
  """Return the lines on our first step, with empty caches and with full ones."""
  limits = (("empty", 15.0), ("full", 2.0))
  return [
    goal(f"seconds of the first step, caches {name}", took, limit, least=False)
    for (name, limit), took in zip(limits, ours.first, strict=False)
  ]


def warning(rows: Sequence[Row], allowed: float = 0.1) -> list[str]:
  """Return a line if the machine did other work, or none."""
  off = [row.label for row in rows if row.other_work > allowed]
  if not off:
    return []
  return [
    f"**Do not compare wall seconds here**: other work ran on over {allowed:g}"
    f" cores during {len(off)} of {len(rows)} rows ({', '.join(off)})."
  ]


def notes(rows: Sequence[Row]) -> str:
  """Return each row's settings, differences and noise."""
  lines = []
  for row in rows:
    parts = [row.settings] if row.settings else []
    if row.errors:
      found = ", ".join(f"{k} {v:.0e}" for k, v in sorted(row.errors.items()))
      parts.append(f"differs from the reference by {found}")
    if row.again is not None and row.ran:
      wall, cpu = row.noise
      parts.append(
        f"run again {row.again[0]:.3f} s/step ({100 * wall:.0f} % off) and"
        f" {row.again[1]:.3f} CPU s ({100 * cpu:.0f} % off)"
      )
    if row.status:
      parts.append(row.status)
    parts += row.said
    before, after = row.load
    parts.append(
      f"other work on {max(row.other_work, 0):.2f} cores, load {before:.1f}"
      f" before, {after:.1f} after"
    )
    lines.append(f"- {row.label}: {'; '.join(parts)}")
  return "\n".join(lines)
