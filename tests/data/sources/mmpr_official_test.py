"""The official selection, row for row, against its independent re-computation.

`mmpr_by_the_paper.py` was written from paper.md 4.5 alone.
"""

import functools
import json

import pytest

from pivot_jax.data.sources import mmpr_selection
from pivot_jax.errors import InputError
from tests.data.sources import mmpr_by_the_paper


def count(text):
  return len(text.split())


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
  """Return (meta.json, the folder that holds MMPR-v1.2)."""
  folder = tmp_path_factory.mktemp("datasets")
  return mmpr_by_the_paper.make_copy(folder, rows_per_file=120), folder


@pytest.mark.parametrize("size, seed", [(100, 777), (60, 1111), (7, 0)])
def test_the_same_rows_in_the_same_order(copy, tmp_path, size, seed):
  meta, datasets = copy
  wanted = mmpr_by_the_paper.select(meta, datasets, count, size=size, seed=seed)
  found = mmpr_selection.select_official(
    meta, datasets, count, size=size, seed=seed
  )
  assert len(found.indices) == size == len(wanted[0])
  mmpr_selection.write(found, tmp_path, {})
  for kind, records in zip(("sft", "dpo"), wanted):
    path = tmp_path / f"{kind}_mmpr_{size}_{seed}.json"
    written = json.loads(path.read_text("utf-8"))
    # What pairs are called is open: there by number, here as in their files.
    assert len({one["id"] for one in written}) == size
    for one, other in zip(written, records, strict=True):
      assert {k: v for k, v in one.items() if k != "id"} == {
        k: v for k, v in other.items() if k != "id"
      }


def test_both_sets_are_in_lock_step(copy, tmp_path):
  meta, datasets = copy
  found = mmpr_selection.select_official(meta, datasets, count, size=50)
  mmpr_selection.write(found, tmp_path, {})
  sft, dpo = (
    json.loads((tmp_path / f"{kind}_mmpr_50_777.json").read_text("utf-8"))
    for kind in ("sft", "dpo")
  )
  for one, other in zip(sft, dpo, strict=True):
    turns = [turn["value"] for turn in one["conversations"]]
    assert turns == [other["prompt"], other["chosen"]]
    assert one["image"] == other["image"]


def _kept(select, *given, size):
  """Return the pairs that a selection keeps, None if it stops at a row."""
  try:
    found = select(*given, count, size=size)
  except (InputError, TypeError, ValueError):
    return None
  if isinstance(found, tuple):
    pairs = [(one["prompt"], one["chosen"], one["image"]) for one in found[1]]
    return pairs if len(pairs) == size else None
  source = found.open()
  rows = [source.text(i) for i in range(len(source))]
  return [
    (mmpr_selection.prompt(row), row["chosen"], f"MMPR-v1.2/{row['image']}")
    for row in rows
  ]


@pytest.mark.parametrize("situations", [
  (), *((one,) for one in mmpr_by_the_paper.CRASHING),
  mmpr_by_the_paper.CRASHING,
])  # fmt: skip
def test_every_planted_row_is_judged_alike(tmp_path, situations):
  """The walk passes all rows or stops at the same one, by the last two sizes."""
  meta = mmpr_by_the_paper.make_copy(tmp_path, 20, crashing=situations)
  theirs = functools.partial(_kept, mmpr_by_the_paper.select, meta, tmp_path)
  mine = functools.partial(
    _kept, mmpr_selection.select_official, meta, tmp_path
  )
  # The largest set that can be had; one more passes or meets what stops it.
  most = next(size for size in range(1, 100) if theirs(size=size + 1) is None)
  for size in (most // 2, most):
    assert len(theirs(size=size)) == size
    assert mine(size=size) == theirs(size=size)
  assert mine(size=most + 1) is None


@pytest.mark.parametrize("situation", mmpr_by_the_paper.CRASHING)
def test_the_row_that_stops_the_walk_is_named(tmp_path, situation):
  meta = mmpr_by_the_paper.make_copy(tmp_path, 20, crashing=[situation])
  with pytest.raises(InputError, match=r"z_vqa\.jsonl:\d+: .*script stops"):
    mmpr_selection.select_official(meta, tmp_path, count)


def test_fewer_rows_than_asked_for_are_an_error_and_not_a_smaller_set(copy):
  meta, datasets = copy
  with pytest.raises(InputError, match="10000"):
    mmpr_selection.select_official(meta, datasets, count, size=10_000)
