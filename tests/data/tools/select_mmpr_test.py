"""`data select-mmpr`: sets of MMPR as lists, and what it refuses."""

import json

import pytest

from pivot_jax.data.sources import mmpr_selection
from pivot_jax.data.tools import select_mmpr
from pivot_jax.errors import InputError
from tests.data.sources import mmpr_files
from tests.fixtures import published

row = mmpr_files.row


def run(meta, folder, *options):
  argv = [str(meta), f"--to={folder}", "--tokenizer=package:toy", *options]
  return select_mmpr.main(argv)


def test_a_set_is_written_once(tmp_path, capsys):
  made = published.make_mmpr(tmp_path, rows=30)
  out = tmp_path / "out"
  assert run(made.path, out, "--size=20", "--seed=3") == 0
  paths = [out / f"{kind}_mmpr_20_3.json" for kind in ("sft", "dpo")]
  said = capsys.readouterr().out.splitlines()
  assert said[:2] == [f"{path}: 20 rows" for path in paths]
  assert str(tmp_path) in said[2]
  assert sorted(out.iterdir()) == sorted([*paths, out / "selection.json"])
  selection = mmpr_selection.select_official(
    made.path, None, lambda text: len(text), size=20, seed=3
  )
  source = selection.open()
  sft, dpo = (json.loads(path.read_text()) for path in paths)
  for written in (sft, dpo):
    assert [one["id"] for one in written] == [
      source.text(i)["id"] for i in range(20)
    ]
  chosen = [one["conversations"][1]["value"] for one in sft]
  assert chosen == [one["chosen"] for one in dpo]
  told = json.loads((out / "selection.json").read_text())
  asked = ("set", "size", "seed", "fixed", "tokenizer", "rows")
  assert [told[name] for name in asked] == [
    *("official", 20, 3, False, "package:toy", 20)
  ]
  before = paths[0].read_bytes()
  with pytest.raises(InputError, match="out: exists and is not empty"):
    run(made.path, out, "--size=20", "--seed=4")
  assert paths[0].read_bytes() == before


def test_a_set_may_be_of_the_mended_selection(tmp_path):
  made = published.make_mmpr(tmp_path, rows=4)
  annotations = made.root / "annotations" / "ai2d_prefix_pair.jsonl"
  annotations.write_text("{broken\n" + annotations.read_text())
  moved = tmp_path / "elsewhere"
  moved.mkdir()
  (made.root / "images").rename(moved / "images")
  options = ["--size=8", "--fixed"]
  with pytest.raises(InputError, match="has no folder images"):
    run(made.path, tmp_path / "out", *options)
  assert not (tmp_path / "out").exists()
  assert run(made.path, tmp_path / "out", *options, f"--images={moved}") == 0
  found = json.loads((tmp_path / "out" / "sft_mmpr_8_777.json").read_text())
  assert sorted(one["conversations"][1]["value"] for one in found) == sorted(
    row["chosen"] for row in made.rows
  )


def test_the_set_holds_what_its_name_says(tmp_path):
  rows = [row(chosen="w " * (120 if i % 3 else 20)) for i in range(30)]
  meta = mmpr_files.write(tmp_path, {"a": rows})
  for name, new in (("under30", 0), ("new_50", 5), ("new_80", 8)):
    assert run(meta, tmp_path / name, f"--set={name}", "--size=10") == 0
    text = (tmp_path / name / "dpo_mmpr_10_777.json").read_text()
    answers = [one["chosen"] for one in json.loads(text)]
    assert sum(map(mmpr_selection.is_new, answers)) == new
  with pytest.raises(InputError, match="--set=some: choose one of official"):
    run(meta, tmp_path / "some", "--set=some")


def test_text_and_several_images_are_for_the_mended_selection(tmp_path):
  two = row(image=["x.png", "y.jpg"], question="<image> or <image> ?")
  meta = mmpr_files.write(tmp_path, {"a": [row(image=None), two]})
  options = ["--text-only", "--several", "--size=2"]
  assert run(meta, tmp_path / "out", "--fixed", *options) == 0
  with pytest.raises(InputError, match="are for --fixed"):
    run(meta, tmp_path / "other", *options)


def test_tokens_are_those_of_the_named_tokenizer(tmp_path):
  """The toy's takes a token for each letter of a word it does not know."""
  rows = [row(chosen="Q" * 1600), row(chosen="yes " * 100)]
  meta = mmpr_files.write(tmp_path, {"a": rows})
  assert run(meta, tmp_path / "out", "--size=1") == 0
  text = (tmp_path / "out" / "dpo_mmpr_1_777.json").read_text()
  assert json.loads(text)[0]["id"] == "a/1"


def test_what_cannot_be_read_or_written_is_named(tmp_path):
  made, out = published.make_mmpr(tmp_path), tmp_path / "out"
  llava = published.make_llava_pretrain(tmp_path)
  with pytest.raises(InputError, match="none: no such tokenizer folder"):
    select_mmpr.main(
      [str(made.path), f"--to={out}", f"--tokenizer={tmp_path / 'none'}"]
    )
  with pytest.raises(InputError, match="gone.json: no such file"):
    run(tmp_path / "gone.json", out)
  with pytest.raises(InputError, match="give MMPR's meta.json"):
    run(llava.path, out)
  with pytest.raises(InputError, match="--to=gs://"):
    run(made.path, "gs://bucket/set")
  # Nothing is looked at before.
  with pytest.raises(InputError, match="has no name; give the one of a new fo"):
    run(tmp_path / "gone.json", ".")
  assert not out.exists()
