"""A run's checks open every kind of data that the documents name."""

import json

import pytest

from pivot_jax.data import opener
from pivot_jax.data.tools import convert
from pivot_jax.errors import InputError
from pivot_jax.recipe import preflight
from tests.fixtures import published


def check(**spec):
  return preflight._check_source(spec)


@pytest.mark.parametrize("make, kind", [
  (published.make_llava_pretrain, "llava"),
  (published.make_llava_pretrain, "llava_text"),
  (published.make_onevision_mixture, "llava"),
  (published.make_onevision, "llava"),
  (published.make_mmpr, "preference"),
  (published.make_evaluation, "eval"),
])  # fmt: skip
def test_every_format_is_opened_and_looked_at(tmp_path, make, kind):
  made = make(tmp_path)
  # Parquet has its images inside.
  root = "" if made.path.is_dir() else str(made.root)
  assert check(kind=kind, path=str(made.path), image_root=root) > 0


def test_wrappers_are_opened_and_looked_at(tmp_path):
  made = published.make_mmpr(tmp_path)
  spec = dict(kind="preference", path=str(made.path))
  whole = check(**spec)
  assert check(**spec, group=True) <= whole
  first = opener.open_source(spec).name(0)
  file, _, line = first.rpartition(":")
  bad = tmp_path / "bad.jsonl"
  fault = dict(file=file, row=int(line) - 1, kind="schema")
  bad.write_text(json.dumps(fault) + "\n")
  assert check(**spec, bad=str(bad)) == whole - 1


def test_a_missing_image_of_a_mixture_is_found_before_anything_runs(tmp_path):
  made = published.make_onevision_mixture(tmp_path)
  next(made.root.rglob("*.jpg")).unlink()
  with pytest.raises(InputError, match="no such file"):
    check(kind="llava", path=str(made.path), image_root=str(made.root))


def test_converted_splits_are_not_each_other(tmp_path):
  made = published.make_image_folder(tmp_path)
  for split in ("train", "val"):
    source = opener.open_path(made.path / split)
    out = tmp_path / "converted" / split
    convert.convert(source, out, kind=source.kind, origin=split)
  ids = [
    {source[i]["image"].tobytes() for i in range(len(source))}
    for source in (
      opener.open_source(
        dict(kind="classify", path=str(tmp_path / "converted"), split=split)
      )
      for split in ("train", "val")
    )
  ]
  assert ids[0] and ids[1] and not ids[0] & ids[1]


@pytest.mark.parametrize("kind", ["classify", "eval"])
def test_a_mixture_is_no_other_kind_of_data(tmp_path, kind):
  made = published.make_onevision_mixture(tmp_path)
  spec = dict(kind=kind, path=str(made.path))
  with pytest.raises(InputError, match=f"a mixture is no {kind} data"):
    check(**spec)
