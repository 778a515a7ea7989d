"""The share of a run's time that was of use."""

import json

import pytest

from pivot_jax import goodput
from pivot_jax.errors import InputError


def line(event, time, **spent):
  seconds = dict.fromkeys(goodput.SPENT, 0.0) | spent
  return dict(
    event=event, time=time, stage="", step=-1, again=0, seconds=seconds
  )


def test_a_straight_run_is_of_use_but_for_what_it_spent():
  lines = [line("start", 10), line("end", 110, compile=20.0, save=5.0)]
  found = goodput.summary(lines)
  assert (found["wall"], found["useful"], found["starts"]) == (100, 75, 1)


def test_what_a_killed_run_did_after_its_last_line_is_lost():
  lines = [
    line("start", 0),
    line("save", 50, save=2.0),
    line("start", 80),
    line("end", 100, restore=3.0) | {"again": 4},
  ]
  found = goodput.summary(lines)
  assert found["wall"] == 100
  assert found["lost"] == 30
  assert found["useful"] == 65
  assert (found["again"], found["starts"]) == (4, 2)


def test_the_time_after_a_run_that_ended_counts_nowhere():
  lines = [
    line("start", 0),
    line("end", 10),
    line("start", 1000),
    line("end", 1010),
  ]
  assert goodput.summary(lines)["wall"] == 20


def test_nothing_noted_is_nothing():
  assert goodput.summary([])["wall"] == 0


def test_lines_are_noted_and_read_and_half_a_line_is_dropped(tmp_path):
  goodput.begin(tmp_path)
  goodput.spent("save", 1.5)
  goodput.note("save", stage="a", step=3)
  goodput.note("end")
  goodput.note("stop")
  with (tmp_path / "goodput.jsonl").open("a") as file:
    file.write('{"event": "sta')
  found = goodput.read(tmp_path)
  assert [one["event"] for one in found] == ["start", "save", "end"]
  assert found[1]["seconds"]["save"] == 1.5
  assert found[1]["step"] == 3


def test_a_line_that_lacks_a_field_is_an_error(tmp_path):
  (tmp_path / "goodput.jsonl").write_text(json.dumps({"event": "start"}) + "\n")
  with pytest.raises(InputError, match="goodput"):
    goodput.summary([*goodput.read(tmp_path), line("end", 3)])
