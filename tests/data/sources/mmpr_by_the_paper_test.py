"""Holds the literal selection against outcomes that were derived by hand."""

import json
import os
import random

import pytest

from tests.data.sources import mmpr_by_the_paper as by_the_paper

# With seed 777 the swaps of a list of six are 5-1, 4-3, 3-3, 2-1 and 1-1:
# 012345 -> 052341 -> 052431 -> 052431 -> 025431 -> 025431.
ORDER_OF_SIX = [0, 2, 5, 4, 3, 1]


def _words(text: str) -> int:
  return len(text.split())


def _write(folder, files, images=()):
  """Write {name: rows}, each with the root images/NAME, and empty images."""
  top = folder / "MMPR-v1.2"
  top.mkdir()
  for image in images:
    (top / "images" / image).parent.mkdir(parents=True, exist_ok=True)
    (top / "images" / image).touch()
  for name, rows in files.items():
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (top / f"{name}.jsonl").write_text(lines, "utf-8")
  meta = {
    name: {"root": f"images/{name}", "annotation": f"{name}.jsonl"}
    for name in files
  }
  (top / "meta.json").write_text(json.dumps(meta), "utf-8")
  return top / "meta.json"


def _row(image, question="What?", chosen="yes", rejected="no"):
  return {
    "id": "own", "image": image, "question": question, "chosen": chosen,
    "rejected": rejected,
  }  # fmt: skip


@pytest.fixture
def six(tmp_path):
  """Two files of which six rows are read: 0 to 2 of zebra, 3 to 5 of ant."""
  limit = "w " * 1497 + "end"  # 1498 words; with "<image> What?" 1500
  files = {
    "zebra": [
      _row("a.png"),
      _row("b.gif", question="Where is <image> from?", chosen="here"),
      _row("a.png", chosen="see <image>"),
      _row(["a.png", "a.png"]),
      _row("a.png", question="After the list?"),
    ],
    "ant": [
      _row("c.jpeg", chosen=limit),
      _row("none.jpg"),
      _row("deep/d.jpg", question="<image>\nHow?", rejected="no " * 1600),
    ],
  }
  images = ("zebra/a.png", "zebra/b.jpg", "ant/c.jpeg", "ant/deep/d.jpg")
  return _write(tmp_path, files, images)


def test_six_rows_come_out_as_derived_by_hand(six, tmp_path):
  sft, dpo = by_the_paper.select(six, tmp_path, _words)
  limit = "w " * 1497 + "end"
  image = "MMPR-v1.2/images/"
  # Walked: 0 kept, 2 <image> in chosen, 5 kept, 4 missing, 3 kept, 1 kept.
  wanted = [
    ("zebra", image + "zebra/a.png", "<image>\nWhat?", "yes", "no"),
    ("ant", image + "ant/deep/d.jpg", "<image>\nHow?", "yes", "no " * 1600),
    ("ant", image + "ant/c.jpeg", "<image>\nWhat?", limit, "no"),
    ("zebra", image + "zebra/b.jpg", "Where is <image> from?", "here", "no"),
  ]
  assert sft == [
    {
      "id": str(number),
      "image": image,
      "conversations": [
        {"from": "human", "value": prompt},
        {"from": "gpt", "value": chosen},
      ],
      "data_source": name,
    }
    for number, (name, image, prompt, chosen, _) in enumerate(wanted)
  ]
  assert dpo == [
    {
      "id": str(number),
      "prompt": prompt,
      "chosen": chosen,
      "rejected": rejected,
      "image": image,
    }
    for number, (_, image, prompt, chosen, rejected) in enumerate(wanted)
  ]


def test_the_walk_ends_with_the_last_pair_that_is_wanted(six, tmp_path):
  sft, dpo = by_the_paper.select(six, tmp_path, _words, size=2)
  assert [record["id"] for record in sft] == ["0", "1"]
  assert dpo[1]["prompt"] == "<image>\nHow?" and len(dpo) == 2


def test_the_order_is_that_of_pythons_own_shuffle():
  rows = list(range(6))
  random.seed(777)
  random.shuffle(rows)
  assert rows == ORDER_OF_SIX
  random.Random(777).shuffle(rows := list(range(6)))
  assert rows == ORDER_OF_SIX


def test_another_seed_gives_another_order(tmp_path):
  rows = [_row("a.png", question=str(number)) for number in range(3)]
  meta = _write(tmp_path, {"one": rows}, ["one/a.png"])
  # Of three rows, 777 swaps 2-0 and 1-1, and 1111 swaps 2-0 and 1-0.
  for seed, wanted in ((777, "210"), (1111, "120")):
    _, dpo = by_the_paper.select(meta, tmp_path, _words, seed=seed)
    assert [row["prompt"][-1] for row in dpo] == list(wanted)


def test_prompt_and_chosen_are_counted_with_the_placeholder(tmp_path):
  rows = [
    _row("a.png", chosen="w " * 1499),  # <image> What? + 1499 = 1501
    _row("a.png", question="w " * 1497 + "?", chosen="yes"),  # 1500
  ]
  meta = _write(tmp_path, {"one": rows}, ["one/a.png"])
  counted = []
  _, dpo = by_the_paper.select(
    meta, tmp_path, lambda text: counted.append(text) or _words(text)
  )
  assert [row["chosen"] for row in dpo] == ["yes"]
  assert counted == [  # two rows change places with seed 777
    "<image>\n" + "w " * 1497 + "? yes",
    "<image>\nWhat? " + "w " * 1499,
  ]


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_a_placeholder_in_an_answer_drops_the_row(tmp_path, field):
  rows = [_row("a.png", **{field: "an <image>."}), _row("a.png")]
  meta = _write(tmp_path, {"one": rows}, ["one/a.png"])
  _, dpo = by_the_paper.select(meta, tmp_path, _words)
  assert [row[field] for row in dpo] == [rows[1][field]]


def test_a_gif_needs_the_jpg_and_becomes_it(tmp_path):
  rows = [_row("a.gif"), _row("b.gif")]
  meta = _write(tmp_path, {"one": rows}, ["one/a.gif", "one/b.jpg"])
  _, dpo = by_the_paper.select(meta, tmp_path, _words)
  assert [row["image"] for row in dpo] == ["MMPR-v1.2/images/one/b.jpg"]


def test_duplicates_are_both_kept(tmp_path):
  meta = _write(tmp_path, {"one": [_row("a.png")] * 2}, ["one/a.png"])
  _, dpo = by_the_paper.select(meta, tmp_path, _words)
  assert [row.pop("id") for row in dpo] == ["0", "1"]
  assert dpo[0] == dpo[1]


def test_a_row_that_is_not_reached_aborts_nothing(tmp_path):
  # Two rows change places, so the good one is walked first.
  meta = _write(tmp_path, {"one": [{}, _row("a.png")]}, ["one/a.png"])
  assert len(by_the_paper.select(meta, tmp_path, _words, size=1)[0]) == 1
  with pytest.raises(TypeError):
    by_the_paper.select(meta, tmp_path, _words, size=2)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mmpr")
  return by_the_paper.make_copy(folder, rows_per_file=30), folder


def test_each_situation_of_the_copy_ends_as_it_is_named(copy):
  meta, folder = copy
  _, dpo = by_the_paper.select(meta, folder, _words)
  kept = {
    (row["prompt"].removeprefix("<image>\n"), row["chosen"]) for row in dpo
  }
  found = {True: set(), False: set()}
  for name in ("z_vqa", "more/captions", "a_charts"):
    path = meta.parent / "annotations" / f"{name}.jsonl"
    for row in map(json.loads, path.read_bytes().splitlines()):
      question = row["question"].removeprefix("<image>\n")
      passed = (question, row["chosen"]) in kept
      found[passed].add(row["id"].rpartition("-")[2])
  assert found[True] | {"duplicate"} == set(by_the_paper.KEPT)
  assert found[False] == set(by_the_paper.DROPPED)


def test_the_copy_stops_its_files_and_repeats_a_row(copy):
  meta, folder = copy
  sft, dpo = by_the_paper.select(meta, folder, _words)
  sources = [record["data_source"] for record in sft]
  whole = {sources.count(name) for name in ("vqa_rules", "captions", "charts")}
  assert 0 < sources.count("albums") < min(whole)
  assert "albums_only" not in sources and "albums_only" in meta.read_text()
  assert len({row["prompt"] + row["chosen"] for row in dpo}) < len(dpo)
  for record, pair in zip(sft, dpo, strict=True):
    human, gpt = record["conversations"]
    assert (record["id"], record["image"]) == (pair["id"], pair["image"])
    assert (human["value"], gpt["value"]) == (pair["prompt"], pair["chosen"])
    assert os.path.exists(folder / pair["image"])


def test_a_copy_is_a_function_of_its_seed(copy, tmp_path):
  meta, folder = copy
  again = by_the_paper.make_copy(tmp_path, rows_per_file=30)
  files = [path for path in folder.rglob("*") if path.is_file()]
  assert len(files) == 6 + 3 * 10
  for path in files:
    twin = tmp_path / path.relative_to(folder)
    assert twin.read_bytes() == path.read_bytes()
  other = by_the_paper.make_copy(tmp_path / "other", rows_per_file=30, seed=1)
  line = "annotations/z_vqa.jsonl"
  assert (other.parent / line).read_bytes() != (
    again.parent / line
  ).read_bytes()


@pytest.mark.parametrize("situation", by_the_paper.CRASHING)
def test_crashing_rows_abort_the_selection(tmp_path, situation):
  meta = by_the_paper.make_copy(tmp_path, 20, crashing=[situation])
  error = TypeError if situation.endswith("_image") else ValueError
  with pytest.raises(error):
    by_the_paper.select(meta, tmp_path, _words)


def test_a_copy_that_cannot_be_made_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"crashing has \['x'\]; it knows"):
    by_the_paper.make_copy(tmp_path, crashing=["x"])
  with pytest.raises(ValueError, match="rows_per_file must be 18 or more"):
    by_the_paper.make_copy(tmp_path, rows_per_file=17)
