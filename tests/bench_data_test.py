"""The benchmarks of data run, small, and count what they say they count."""

import json

import numpy as np
import pytest

from bench import padding
from bench.data import __main__ as data
from bench.data import files, runs, tables
from pivot_jax.data.sources import json_index, json_records

TINY = data.Plan(
  texts=20,
  pictures=4,
  measured=30,
  batch=8,
  updates=3,
  chosen=20,
  steps=4,
)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
  monkeypatch.setenv("PIVOT_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(json_index, "CACHED", 1000)
  monkeypatch.setattr(files, "_POOL", 20_000)
  monkeypatch.setattr(files, "SIDES", (64, 48))
  # Pairs of fewer tokens: the toy's tokenizer cuts words into many.
  short = {name: tokens / 8 for name, tokens in files.PAIR.items()}
  monkeypatch.setattr(files, "PAIR", short)


def here(name, *args, **kwargs):
  return runs.RUNS[name](*args, **kwargs)


def test_every_run_reports_and_the_page_has_no_path(tmp_path):
  paths = data.make(tmp_path / "files", 60, 66)
  done = data.measure(paths, "package:toy", TINY, run=here)
  ran = [one["run"] for one in done]
  assert ran == ["index"] * 2 + ["read"] * 2 + ["measure"] * 6 + [
    *["pack"] * 12,
    *["choose"] * 2,
    "lay_out",
  ]
  rows = {one["kind"]: one["found"]["rows"] for one in done[:2]}
  assert rows == {"llava": 60, "mmpr": 66}
  for one in tables.of(done, "pack"):
    assert one["rows"] == 24 and len(one["walls"]) == 2
    # Images take their tokens, seen or not.
    assert one["tokens"] > 8 * 0.6 * runs.PATCHES
  for one in tables.of(done, "choose"):
    assert one["chosen"] == 20 and one["of"] == 66
  text = "\n\n".join(tables.blocks(done))
  assert str(tmp_path) not in text + json.dumps(done)
  assert text.count("| mmpr |") == 1 + 2 + 3 + 6


def test_made_files_are_like_published_ones_and_the_same_every_time(tmp_path):
  for name in "ab":
    data.make(tmp_path / name, 300, 60)
  paths = [tmp_path / n / "llava-300" / "llava.json" for n in "ab"]
  assert paths[0].read_bytes() == paths[1].read_bytes()
  rows = json.loads(paths[0].read_bytes())
  assert len({row["id"] for row in rows}) == len(rows) == 300
  assert 0 < sum("image" not in row for row in rows) < 60
  source = json_records.LlavaJson(paths[0])
  assert source[0]["image"].shape == (48, 64, 3)
  turns = [row["conversations"] for row in rows]
  assert {len(one) for one in turns} >= {2, 4}
  words = [len(turn["value"].split()) for one in turns for turn in one]
  asked, answered = np.mean(words[::2]), np.mean(words[1::2])
  assert 18 < asked < 32 and 45 < answered < 75


def test_a_long_file_is_written_in_blocks(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "_BLOCK", 7)
  files.write_llava(tmp_path / "a" / "llava.json", 22)
  meta = files.write_mmpr(tmp_path, 50)
  assert len(json.loads((tmp_path / "a" / "llava.json").read_bytes())) == 22
  entries = json.loads(meta.read_text())
  lines = [
    (meta.parents[1] / entry["annotation"]).read_bytes().splitlines()
    for entry in entries.values()
  ]
  assert [len(one) for one in lines] == [8, 8, 9, 8, 8, 9]
  assert ["id" in json.loads(one[0]) for one in lines] == [True, False] * 3
  assert [one["length"] for one in entries.values()] == list(map(len, lines))


def test_padding_is_what_a_hand_counts(monkeypatch):
  monkeypatch.setattr(padding, "PATCHES", 4)
  # Two rows of 16 tokens: 4 + 2 + 3 + 5 fill 14, 4 + 2 + 1 + 1 fill 8.
  pair = [padding.example(2, (3, 5)), padding.example(2, (1, 1))]
  row = padding.measure("two", pair, 16, 2)
  assert (row.layout["rows"], row.layout["tokens"]) == (2, 16)
  assert row.shapes == 1 and row.longest == 14
  assert row.padding == pytest.approx(
    {
      "tokens": 100 * (1 - 22 / 32),
      "images": 0,
      "losses": 100 * (1 - 10 / 16),
      # Sequences of 9, 11, 7 and 7 tokens in four places of 11.
      "sequences": 100 * (1 - 34 / 44),
      "squares": 100 * (1 - 300 / 484),
    }
  )
  assert "31.2 %" in padding.table([row])
  missed, met, _ = padding.goals([row])
  assert missed.endswith("31.25, goal at most 8: missed") and "two at" in met


def test_groups_hold_all_pairs_and_conversations_one_answer():
  made = padding.groups(100)
  assert 100 <= sum(one.pairs for one in made) < 104
  assert {one.pairs for one in made} == {1, 2, 3, 4}
  spoken = padding.conversations(40, text_only=0.5)
  assert {(len(one.answers), one.pairs) for one in spoken} == {(1, 0)}
  assert {len(one.images) for one in spoken} == {0, 1}
