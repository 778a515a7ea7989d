"""A committed page holds what the code makes of the numbers beside it."""

import importlib
import json
import math
import pathlib

import pytest

from bench import (
  faults,
  growth,
  images,
  padding,
  probe_cpu,
  processes,
  restart,
  verdict,
)
from bench.data import tables

RESULTS = pathlib.Path(__file__).parents[1] / "bench" / "results"


def _read(name):
  found = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
  return found, (RESULTS / f"{name}.md").read_text("utf-8")


@pytest.mark.parametrize("name", ["dpo_cpu", "sft_cpu", "generate_cpu"])
def test_the_table_of_a_side_by_side_benchmark(name):
  found, page = _read(name)
  bench = importlib.import_module(f"bench.{name}").BENCH
  rows = [
    verdict.Row(
      **row | {"walls": tuple(row["walls"]), "beside": bench.ours[""]}
    )
    for row in found["rows"]
  ]
  work = {"": found["work_of_a_step"]}
  assert verdict.table(rows, work) in page
  assert verdict.notes(rows) in page
  lines, _ = bench.summary({row.name: row for row in rows}, work)
  assert lines and "\n".join(lines) in page
  # What is timed is what is told of.
  assert [v.name for v in bench.variants] == [row.name for row in rows]


def test_the_page_of_padding():
  found, page = _read("padding")
  rows = [padding.Row(**row) for row in found["rows"]]
  assert padding.table(rows) in page
  assert "\n".join(padding.goals(rows)) in page


def test_the_page_of_images():
  found, page = _read("images")
  rows = [
    images.Row(
      **row
      | {
        "off": {k: math.inf if v is None else v for k, v in row["off"].items()}
      }
    )
    for row in found["rows"]
  ]
  assert images.table(rows, found["kilobytes"]) in page
  assert "\n".join(images.goals(rows)) in page


def test_the_page_of_growth():
  found, page = _read("growth")
  assert list(found["axes"]) == list(growth.AXES)
  for axis, one in found["axes"].items():
    points = [growth.Point(**point) for point in one["points"]]
    assert growth.describe(axis, points)[0] in page


def test_the_page_of_the_probe():
  found, page = _read("probe_cpu")
  # The first head is empty.
  page = page.replace("| | seconds", "|  | seconds")
  for block in probe_cpu.summary(found["found"], 900):
    assert block in page


def test_the_page_of_data():
  found, page = _read("data")
  blocks = tables.blocks(found["runs"])
  assert len(blocks) == 13
  for block in blocks:
    assert block in page


def test_the_page_of_restarts():
  found, page = _read("restart")
  starts = [restart.Start(**one) for one in found["starts"]]
  ends = [
    faults.Outcome(**one | {"codes": tuple(one["codes"])})
    for one in found["ends"]
  ]
  for block in restart.blocks(starts, ends, found["saves"]):
    assert block in page
  # What is disturbed is what is told of.
  plan = restart.QUICK if "--quick" in page.splitlines()[0] else restart.FULL
  assert {one.name for one in ends} == {one.name for one in plan.faults}


def test_the_page_of_processes():
  found, page = _read("processes")
  trainings = [processes.Trained(**one) for one in found["trainings"]]
  starts = [processes.Opened(**one) for one in found["starts"]]
  reads = [processes.Read(**one) for one in found["reads"]]
  numbers = found["artifact_megabytes"], found["cores"]
  for block in processes.blocks(trainings, starts, reads, *numbers):
    assert block in page
