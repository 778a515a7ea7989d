"""The arithmetic of the side-by-side benchmarks; nothing is timed here."""

import math

import numpy as np
import pytest

from bench import growth, verdict
from bench.update import peers, toy


def _row(name, walls, cpus, **fields):
  values = dict(
    label=name.upper(),
    settings="",
    first=(1.0,),
    again=None,
    errors={},
    load=(0.0, 0.0),
  )
  return verdict.Row(name=name, walls=walls, cpus=cpus, **(values | fields))


def test_gate_takes_the_worst_of_each_kind():
  right = {"logps": np.array([-100.0, -200.0]), "loss": np.array(0.5)}
  left = {"logps": np.array([-100.0, -200.2]), "loss": np.array(0.5)}
  found = verdict.errors(left, right)
  assert found["logps"] == pytest.approx(1e-3)
  assert found["loss"] == 0.0
  limits = {"logps": 1e-4, "loss": 1e-4}
  assert len(verdict.failures(found, limits)) == 1
  assert verdict.failures(found, {"loss": 0.0}) == []


def test_gate_compares_updates_as_vectors():
  right = {"update/a": np.array([3.0, 4.0, 0.0]), "update/b": np.ones(2)}
  left = {"update/a": np.array([3.0, 4.0, 0.05]), "update/b": np.ones(2)}
  assert verdict.errors(left, right)["update"] == pytest.approx(0.01)


@pytest.mark.parametrize(
  "left",
  [
    {},
    {"loss": np.array([1.0])},
    {"loss": np.array([1.0, np.nan])},
  ],
)
def test_gate_refuses_what_is_missing_misshapen_or_not_finite(left):
  found = verdict.errors(left, {"loss": np.array([1.0, 2.0])})
  assert math.isinf(found["loss"])
  assert verdict.failures(found, {"loss": 1.0})


def test_gate_refuses_a_kind_that_nobody_gave():
  assert verdict.failures({}, {"logps": 1e-4})


def test_table_gives_work_per_second_and_how_much_faster_ours_is():
  rows = [
    _row("peer", (1.0, 2.0, 9.0), (3.0, 3.0, 3.0), beside="ours"),
    _row(
      *("ours", (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)),
      **dict(again=(0.6, 1.0), beside="ours"),
    ),
    _row("half", (0.1,), (0.1,), part=True),
  ]
  work = {"": {"pairs": 8}}
  _, _, peer, ours, half = verdict.table(rows, work).split("\n")
  assert "| 2.000 |" in peer and "| 4 |" in peer
  assert peer.endswith("| 4.00x | 3.00x |")
  assert "| 16 |" in ours and ours.endswith("|  |  |")
  assert half.endswith("|  |  |")
  assert "20 % off" in verdict.notes(rows)


def test_other_work_on_the_machine_is_said():
  quiet = _row("a", (1.0,), (1.0,), other_work=0.02)
  busy = _row("b", (1.0,), (1.0,), other_work=0.5)
  assert verdict.warning([quiet]) == []
  assert "1 of 2 rows (B)" in verdict.warning([quiet, busy])[0]


def test_goals_are_met_or_missed():
  assert verdict.goal("speed", 1.7, 1.7).endswith(": met")
  assert verdict.goal("speed", 1.6, 1.7).endswith(": missed")
  assert verdict.goal("seconds", 16, 15, least=False).endswith(": missed")


def test_fastest_looks_only_at_rows_that_ran():
  rows = {name: _row(name, (w,), (w,)) for name, w in (("a", 2.0), ("b", 1.0))}
  assert peers.fastest(rows, ["a", "b", "c"]).name == "b"
  assert peers.fastest(rows, ["c"]) is None


def test_flops_of_a_pair_share_image_and_prompt():
  both = toy.flops(toy.OPTIONS, 2)
  assert both == pytest.approx(5.34e9, rel=1e-3)
  assert both < 2 * toy.flops(toy.OPTIONS, 1)


def test_a_straight_line_is_found_with_its_exponent():
  line = growth.fit([1.0, 2.0, 4.0], [3.0, 5.0, 9.0])
  assert line.a == pytest.approx(1.0)
  assert line.b == pytest.approx(2.0)
  assert line.left == pytest.approx(0.0, abs=1e-12)
  power = growth.fit([1.0, 2.0, 4.0], [2.0, 8.0, 32.0])
  assert power.exponent == pytest.approx(2.0)
  assert power.left > 0.01
