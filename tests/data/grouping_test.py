"""Pairs that share image and question become one example."""

import json
import pathlib
import random

import numpy as np
import pytest
from PIL import Image

from pivot_jax.data import coders, opener
from pivot_jax.errors import InputError
from tests.data.streams_test import coder, opened
from tests.fixtures import published


def grouped_rows(tmp_path, counts):
  """Write groups of pairs on one image and question each, shuffled."""
  Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a.png")
  rows = [
    dict(
      id=f"{g}-{k}",
      image="a.png",
      question=f"question {g}",
      chosen=f"right {k}",
      rejected=f"wrong {k}",
    )
    for g, count in enumerate(counts)
    for k in range(count)
  ]
  random.Random(0).shuffle(rows)
  path = tmp_path / "groups.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return dict(kind="preference", path=str(path)), rows


def test_pairs_on_one_image_become_one_example(tmp_path):
  spec, rows = grouped_rows(tmp_path, (1, 2, 3, 4, 6))
  source = opener.open_source(spec | dict(group=True))
  # Six pairs are over the four of a group.
  assert sorted(len(source.text(i)["chosen"]) for i in range(len(source))) == [
    1, 2, 2, 3, 4, 4,
  ]  # fmt: skip
  found = list(opened(spec, group=True).examples(range(6)))
  assert sorted(x for e in found for x in e.pair_ids) == sorted(
    row["id"] for row in rows
  )
  plain = {e.id: e for e in opened(spec).examples(range(len(rows)))}
  for group in found:
    for k, name in enumerate(group.pair_ids):
      alone = plain[name]
      np.testing.assert_array_equal(group.prompt, alone.prompt)
      for one, other in zip(group.answers[2 * k : 2 * k + 2], alone.answers):
        np.testing.assert_array_equal(one, other)
      assert coders.pair_crcs(group)[k] == coders.pair_crcs(alone)[0]
  # SFT learns the chosen answers of the same rows.
  how = coder(pairs=False)
  for group in opened(spec, how, group=True).examples(range(6)):
    assert len(group.answers) == len(group.pair_ids) and group.pairs == 0


def test_one_bad_pair_does_not_take_its_group_with_it(tmp_path):
  spec, rows = grouped_rows(tmp_path, (4, 3))
  rows[0]["rejected"] = rows[0]["chosen"]
  path = pathlib.Path(spec["path"])
  path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{oops\n")
  found = opened(spec, group=True, max_bad=0.5)
  seen = [x for e in found.examples(range(found.rows(0))) for x in e.pair_ids]
  assert sorted(seen) == sorted(row["id"] for row in rows[1:])


def test_groups_need_images_with_names(tmp_path):
  made = published.make_onevision(tmp_path)
  with pytest.raises(InputError, match="conversation rows; group=True is for"):
    opener.open_source(dict(kind="llava", path=str(made.path), group=True))
  scenes_pairs = dict(kind="scenes", task="preference", size=4, group=True)
  with pytest.raises(InputError, match="images without names"):
    opener.open_source(scenes_pairs)


def test_a_question_is_one_however_its_letters_are_composed(tmp_path):
  spec, _ = grouped_rows(tmp_path, (2,))
  path = pathlib.Path(spec["path"])
  composed, parts = "\u00d1and\u00fa?", "N\u0303andu\u0301?"
  rows = [
    dict(id=str(i), image="a.png", question=asked, chosen="a", rejected="b")
    for i, asked in enumerate((composed, parts))
  ]
  # Nothing is learnt from answers that are one.
  same = dict(chosen=composed, rejected=parts)
  rows.append(dict(rows[0], id="2", **same))
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  source = opener.open_source(spec | dict(group=True))
  groups = [source.text(i)["pair_ids"] for i in range(len(source))]
  assert groups == [["0", "1"], ["2"]]
