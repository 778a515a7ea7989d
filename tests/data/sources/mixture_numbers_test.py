"""A mixture's file is bounded before anything is made of it."""

import json
import os

import pytest

from pivot_jax.data.sources import mixtures, mmpr
from pivot_jax.errors import InputError

ROW = {
  "id": "1",
  "conversations": [
    {"from": "human", "value": "q"},
    {"from": "gpt", "value": "a"},
  ],
}
# 10^9 elements if it is spelt out.
LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
  f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n"
  for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.fixture
def refused(tmp_path):
  (tmp_path / "a.json").write_text(json.dumps([ROW]))
  (tmp_path / "b.json").write_text(json.dumps([ROW] * 2))
  path = tmp_path / "mix.yaml"

  def refused(text, match):
    path.write_text(text)
    with pytest.raises(InputError, match=match) as found:
      mixtures.Mixture(path)
    assert str(path) in str(found.value) and len(str(found.value)) < 1000

  return refused


@pytest.mark.parametrize("text, match", [
  (LAUGHS + "datasets:\n- json_path: a.json\n  epochs: *i\n", "alias.*line"),
  ("x: &x {a: 1}\ny: {<<: [*x, *x]}\n", "alias.*line 1"),
  ("datasets: &a [*a]\n", "YAML"),
  ("[" * 5000, "YAML"),
  ("datasets: 2024-99-99\n", "YAML"),
  ("datasets: !!int ''\n", "YAML"),
  ("datasets: !!bool perhaps\n", "YAML"),
  ("datasets: !!timestamp x\n", "YAML"),
  (f"datasets: {'9' * 5000}\n", "YAML"),
  (" " * 2**20 + "a: 1\n", "more than the"),
])  # fmt: skip
def test_yaml_that_is_none_or_grows_is_one_line(refused, text, match):
  refused(text, match)


@pytest.mark.parametrize("field, match", [
  ("epochs: 1000000000000", "epochs: 1000000000000 .*up to 1000"),
  (f"epochs: {'9' * 4000}", "epochs: 99"),
  ("epochs: .inf", "epochs: inf"),
  (f"sampling_strategy: first:{'1' * 5000}", "sampling_strategy"),
  (f"sampling_strategy: random:{'1' * 5000}%", "sampling_strategy"),
  ("sampling_strategy: [all]", "sampling_strategy"),
  ("sampling_strategy: first:1000000000000", "of 1 rows cannot be"),
  ("expected: 1.0e+999", "expected: inf"),
])  # fmt: skip
def test_numbers_of_an_entry_are_bounded(refused, field, match):
  refused(f"datasets:\n- json_path: a.json\n  {field}\n", match)


def test_a_weight_repeats_no_row_without_end(refused, tmp_path):
  (tmp_path / "b.json").write_text(json.dumps([ROW] * 3000))
  entries = [
    {"json_path": "a.json", "weight": 1e9},
    {"json_path": "b.json", "weight": 1},
  ]
  refused(json.dumps({"datasets": entries}), "a.json: weight: .*1000 times")


def test_aliases_of_texts_stay(tmp_path):
  (tmp_path / "a.json").write_text(json.dumps([ROW]))
  path = tmp_path / "mix.yaml"
  path.write_text(
    "datasets:\n- {json_path: &a a.json, sampling_strategy: &s first:1}\n"
    "- {json_path: *a, sampling_strategy: *s}\n"
  )
  assert len(mixtures.Mixture(path)) == 2


@pytest.mark.parametrize("name, opened", [
  ("mix.yaml", mixtures.Mixture), ("meta.json", mmpr.Mmpr),
])  # fmt: skip
def test_pipes_devices_and_holes_are_no_lists_of_files(tmp_path, name, opened):
  path = tmp_path / name
  os.mkfifo(path)
  with pytest.raises(InputError, match="no regular file"):
    opened(path)
  path.unlink()
  path.symlink_to("/dev/zero")
  with pytest.raises(InputError, match="no regular file"):
    opened(path)
  path.unlink()
  path.touch()
  os.truncate(path, 20 << 30)
  with pytest.raises(InputError, match="more than the"):
    opened(path)


def test_numbers_of_a_meta_are_finite(tmp_path):
  path = tmp_path / "meta.json"
  for number in ("NaN", "1e999", "-Infinity"):
    path.write_text(
      f'{{"a": {{"root": "x", "annotation": "a.jsonl",'
      f' "repeat_time": {number}}}}}'
    )
    with pytest.raises(InputError, match="not readable as JSON"):
      mmpr.Mmpr(path)
