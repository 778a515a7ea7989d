"""The paper's sets as sources, config entries and the paper's own files."""

import functools
import json

import pytest

from configs import paper_data
from pivot_jax import addresses
from pivot_jax.data import opener
from pivot_jax.data.sources import mmpr_choice, mmpr_sets
from pivot_jax.errors import InputError
from tests.data.sources import mmpr_files

TOKENIZER = addresses.tokenizer_folder("package:toy")
row, numbered, words = mmpr_files.row, mmpr_files.numbered, mmpr_files.words


@pytest.fixture
def write(tmp_path):
  """Write {name: rows} as MMPR is published; returns its meta.json."""
  return functools.partial(mmpr_files.write, tmp_path)


@pytest.fixture
def mixed(write):
  """60 rows: every third is long, every fourth thinks aloud, short or not."""
  return write({
    "a": [
      row(
        chosen=("<think> </think> " if i % 4 == 0 else "")
        + "w " * (120 if i % 3 == 0 else 20 + i % 30)
      )
      for i in range(60)
    ]
  })  # fmt: skip


@pytest.mark.parametrize("selection", ["official", "fixed"])
def test_a_config_entry_opens_as_the_rows_chosen(mixed, selection):
  spec = paper_data.mmpr(
    str(mixed), tokenizer=str(TOKENIZER), name="new_50", selection=selection,
    size=20,
  )  # fmt: skip
  source = opener.open_source(spec | dict(image_size=8))
  assert len(source) == 20 and source[0]["image"].shape == (8, 8, 3)
  again = opener.open_source(spec)
  for i in range(20):
    assert source.text(i) == again.text(i)
    assert source.name(i) == again.name(i)
  assert (
    sum(mmpr_choice.is_new(source.text(i)["chosen"]) for i in range(20)) == 10
  )
  with pytest.raises(IndexError):
    source.text(20)


def test_tokens_are_those_of_the_named_tokenizer(write):
  """The toy's takes a token for each letter of a word it does not know."""
  rows = [row(chosen="Q" * 1600), row(chosen="yes " * 100)]
  source = mmpr_sets.open_set(
    write({"a": rows}), tokenizer=TOKENIZER, selection="official", size=1
  )
  assert source.text(0)["id"] == "a/1"


def test_all_rows_need_no_tokenizer(mixed):
  assert len(mmpr_sets.open_set(mixed)) == 60
  with pytest.raises(InputError, match="tokenizer: give the folder"):
    mmpr_sets.open_set(mixed, selection="official")
  with pytest.raises(InputError, match="selection='some': choose one of"):
    mmpr_sets.open_set(mixed, selection="some")
  with pytest.raises(InputError, match="are for selection='fixed'"):
    mmpr_sets.open_set(
      mixed, tokenizer=TOKENIZER, selection="official", several=True
    )


def test_the_papers_files_hold_the_same_rows_in_lock_step(write, tmp_path):
  meta = write({"a": numbered(5), "b": [row(question="so <image>\nwhat ?")]})
  selection = mmpr_choice.select_official(meta, meta.parents[1], words, size=6)
  mmpr_sets.write_paper_files(selection, tmp_path / "out")
  sft, dpo = (
    json.loads((tmp_path / f"out/{kind}_mmpr_6_777.json").read_text())
    for kind in ("sft", "dpo")
  )
  place = selection.rows.index((0, 2))
  assert sft[place] == {
    "id": "a/2",
    "image": "MMPR-v1.2/images/0/x.png",
    "conversations": [
      {"from": "human", "value": "<image>\nwhat 2 ?"},
      {"from": "gpt", "value": "a cat"},
    ],
    "data_source": "a",
  }
  assert dpo[place] == {
    "id": "a/2",
    "prompt": "<image>\nwhat 2 ?",
    "chosen": "a cat",
    "rejected": "a dog",
    "image": "MMPR-v1.2/images/0/x.png",
  }
  assert dpo[selection.rows.index((1, 0))]["prompt"] == "so <image>\nwhat ?"
  for one, two in zip(sft, dpo, strict=True):
    assert (one["id"], one["image"]) == (two["id"], two["image"])
    asked, answered = (turn["value"] for turn in one["conversations"])
    assert (asked, answered) == (two["prompt"], two["chosen"])


def test_the_papers_files_are_whole_or_not_there(write, tmp_path):
  meta = write({"a": numbered(5)})
  selection = mmpr_choice.select_official(meta, meta.parents[1], words, size=5)
  out = tmp_path / "out"
  out.mkdir()
  (out / "dpo_mmpr_5_777.json").write_text("mine")
  with pytest.raises(InputError, match="dpo_mmpr_5_777.json: exists; remove"):
    mmpr_sets.write_paper_files(selection, out)
  assert (out / "dpo_mmpr_5_777.json").read_text() == "mine"
  assert len(list(out.iterdir())) == 1
  with pytest.raises(InputError, match="meta.json: cannot be written: .*exist"):
    mmpr_sets.write_paper_files(selection, meta)
  # A row that cannot be read any more.
  path = meta.parent / "annotations" / "0.jsonl"
  path.write_text(path.read_text().replace("a cat", "3")[:-20])
  with pytest.raises(InputError):
    mmpr_sets.write_paper_files(selection, tmp_path / "other")
  assert not list((tmp_path / "other").iterdir())


def test_a_selection_must_be_named(write):
  with pytest.raises(InputError, match="selection='all': choose official or"):
    mmpr_sets.choose(
      write({"a": [row()]}), tokenizer=TOKENIZER, selection="all", wish={}
    )


def test_every_set_of_the_paper_is_an_entry(tmp_path):
  names = {"origin", "new_0", "new_50", "new_80", "under30", "nothink"}
  assert set(paper_data.MMPR) == names
  entries = [
    paper_data.mmpr("m.json", tokenizer="t", name=name) for name in names
  ]
  assert all((e["size"], e["seed"]) == (20_000, 777) for e in entries)
  with pytest.raises(ValueError, match="choose one of"):
    paper_data.mmpr("m.json", tokenizer="t", name="new_20")
