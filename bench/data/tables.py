"""The page of `bench.data`: its tables, and whether the goals are met."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench import verdict

OPEN_SECONDS, RESIDENT = 10.0, 1024.0
# Examples a second that one H200 trains on, as estimated: from, to.
NEEDS = {"llava": (48, 60), "mmpr": (28, 35)}

Found = Mapping[str, Any]


def blocks(found: Sequence[Found]) -> list[str]:
  """Return the paragraphs and tables of the page."""
  text = [
    "**Opening.** Memory is that of a fresh process, in MiB: anonymous / all of"
    " it, with the mapped pages of the index and of libraries. Files were in the"
    " page cache as far as memory reaches.",
    opening(found),
    "\n".join(goals(found)),
  ]
  for title, name, make in (
    ("**Random reads**, one thread.", "read", reading),
    (
      "**Measuring lengths**, as before a run, random rows; two processes are"
      " started first, within the time.",
      "measure",
      measuring,
    ),
    (
      "**To packed rows**: updates of 256 read in shuffled order, encoded and"
      f" packed into rows of about 8k tokens. An H200 needs {_needs()};"
      " *times the need* divides by the larger. Without JPEGs an image is one"
      " black pixel and as many tokens.",
      "pack",
      packing,
    ),
    ("**Training sets of MMPR.**", "choose", choosing),
    ("**The layout of an epoch**, sizes drawn.", "lay_out", laying_out),
  ):
    if of(found, name):
      text += [title, make(found)]
  return text


def _needs() -> str:
  (a, b), (c, d) = NEEDS["llava"], NEEDS["mmpr"]
  return f"{a}–{b} conversations or {c}–{d} pairs a second (an estimate)"


def of(found: Sequence[Found], name: str) -> list[Found]:
  """Return the runs of a name, how they were called and what they found."""
  return [one | one["found"] for one in found if one["run"] == name]


def _memory(at: Mapping[str, int]) -> str:
  return f"{at['anonymous'] / 2**20:,.0f} / {at['total'] / 2**20:,.0f}"


def _machine(one: Found) -> str:
  machine = one["machine"]
  return f"{machine['load']:.1f}, {machine['other_work']:.1f}"


def opening(found: Sequence[Found]) -> str:
  """Return the table of the first opening, the next one, and memory."""
  again = {one["kind"]: one for one in of(found, "read")}
  rows = []
  for one in of(found, "index"):
    cells = [""] * 5
    if one["kind"] in again:
      later = again[one["kind"]]
      cells = [f"{later['seconds']:.4f}"]
      cells += map(_memory, later["memory"].values())
    rows.append([
      one["kind"],
      f"{one['rows']:,}",
      f"{one['bytes'] / 1e6:,.0f}",
      f"{one['seconds']:.1f}",
      f"{one['bytes'] / 1e6 / one['seconds']:.0f}",
      f"{one['memory']['opened']['peak'] / 2**20:,.0f}",
      *cells,
      _machine(one),
    ])  # fmt: skip
  head = ["kind", "rows", "MB", "indexed, s", "MB/s", "peak MiB"]
  head += ["opened again, s", "MiB before", "opened", "texts read"]
  return verdict.markdown([[*head, "images read", "load, others"], *rows])


def reading(found: Sequence[Found]) -> str:
  """Return the table of random reads."""
  rows = [
    [one["kind"], name]
    + [f"{one[name][key]:,.0f}" for key in ("reads", "rate", "cpu_rate")]
    + [_machine(one)]
    for one in of(found, "read")
    for name in ("texts", "pictures")
  ]
  head = ["kind", "random", "reads", "reads/s", "reads/CPU s", "load, others"]
  return verdict.markdown([head, *rows])


def measuring(found: Sequence[Found]) -> str:
  """Return the table of measuring lengths."""
  rows = [
    [
      one["kind"],
      one["processes"],
      f"{one['rows']:,}",
      f"{one['text_tokens']:.0f}",
      f"{one['seconds']:.1f}",
      f"{one['rate']:,.0f}",
      f"{one['rows'] / one['cpu']:,.0f}",
      _machine(one),
    ]
    for one in of(found, "measure")
  ]
  head = ["kind", "processes", "rows", "tokens of text a row", "s", "rows/s"]
  return verdict.markdown([[*head, "rows/CPU s", "load, others"], *rows])


def packing(found: Sequence[Found]) -> str:
  """Return the table of reading, encoding and packing updates."""
  rows = []
  for one in of(found, "pack"):
    low, _, high = verdict.spread(one["walls"])
    rows.append([
      one["kind"],
      "of 640x480" if one["pixels"] else "none",
      one["threads"],
      f"{one['rate']:,.0f}",
      f"{one['batch'] / high:,.0f}–{one['batch'] / low:,.0f}",
      f"{one['cpu_rate']:,.0f}",
      f"{1000 * one['pack_seconds']:.0f}",
      f"{one['rate'] / NEEDS[one['kind']][1]:.1f}",
      f"{one['memory']['end']['peak'] / 2**20:,.0f}",
      _machine(one),
    ])  # fmt: skip
  head = ["kind", "JPEGs", "threads", "rows/s", "p10–p90", "rows/CPU s"]
  head += [
    "packing, ms an update",
    "times the need",
    "peak MiB",
    "load, others",
  ]
  return verdict.markdown([head, *rows])


def choosing(found: Sequence[Found]) -> str:
  """Return the table of choosing training sets."""
  rows = []
  for one in of(found, "choose"):
    said = ", ".join(f"{n:,} {why}" for why, n in one["refused"].items())
    rows.append([
      one["way"],
      f"{one['chosen']:,} of {one['of']:,}",
      f"{one['seconds']:.1f}",
      f"{one['cpu']:.1f}",
      said or "none",
      _memory(one["memory"]["end"]),
      f"{one['memory']['end']['peak'] / 2**20:,.0f}",
      _machine(one),
    ])  # fmt: skip
  head = ["selection", "chosen", "s", "CPU s", "refused", "MiB after"]
  return verdict.markdown([[*head, "peak MiB", "load, others"], *rows])


def laying_out(found: Sequence[Found]) -> str:
  """Return the table of finding the layout of an epoch."""
  rows = []
  for one in of(found, "lay_out"):
    layout = one["layout"]
    rows.append([
      f"{one['updates']:,}",
      f"{one['order_seconds']:.1f}",
      f"{one['seconds']:.1f}",
      f"{layout['rows']} of {layout['tokens']}, {layout['images']} images",
      f"{100 * one['padding']:.1f} %",
      _memory(one["memory"]["start"]),
      _memory(one["memory"]["end"]),
      f"{one['memory']['end']['peak'] / 2**20:,.0f}",
      _machine(one),
    ])  # fmt: skip
  head = ["updates", "order and sizes, s", "layout, s", "rows", "padding"]
  head += ["MiB before", "after", "peak MiB", "load, others"]
  return verdict.markdown([head, *rows])


def goals(found: Sequence[Found]) -> list[str]:
  """Return a line for each goal."""
  lines = []
  for one in of(found, "read"):
    kind, mebibytes = one["kind"], one["memory"]["texts"]["total"] / 2**20
    lines += [
      verdict.goal(
        f"seconds to open {kind} again",
        one["seconds"],
        OPEN_SECONDS,
        least=False,
      ),
      verdict.goal(
        f"MiB in all after random reads of {kind}",
        mebibytes,
        RESIDENT,
        least=False,
      ),
    ]
  for one in of(found, "pack"):
    if one["pixels"] and one["threads"] == 2:
      said = f"packed rows/s of {one['kind']} with pixels, two threads"
      lines.append(verdict.goal(said, one["rate"], NEEDS[one["kind"]][1]))
  return lines
