"""Paths that a mixture or a `meta.json` names stay below its folder."""

import functools
import json
import os

import pytest

from pivot_jax.data import opener
from pivot_jax.data.sources import mixtures, mmpr
from pivot_jax.errors import InputError
from tests.data.sources import mmpr_files

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.fixture
def private(tmp_path):
  """Make a folder `set`, and beside it a file of rows; return the file."""
  (tmp_path / "set").mkdir()
  path = tmp_path / "private.json"
  path.write_text(json.dumps([{"id": "1", "conversations": TURNS}]))
  return path


def mixture(private, path):
  file = private.parent / "set" / "mix.yaml"
  file.write_text(json.dumps({"datasets": [{"json_path": str(path)}]}))
  return file


def refused(call, match):
  with pytest.raises(InputError, match=match):
    call()


def test_a_mixture_reads_no_file_outside_its_folder(private):
  for path in ("../private.json", private):
    file = mixture(private, path)
    opened = functools.partial(opener.open_path, file)
    refused(opened, "json_path: .*not below .*root")
  link = private.parent / "set" / "rows.json"
  link.symlink_to(private)
  file = mixture(private, "rows.json")
  refused(lambda: opener.open_path(file), "json_path: rows.json is not below")


def test_a_mixture_reads_what_lies_in_the_root_that_is_named(private):
  for path in ("private.json", private):
    file = mixture(private, path)
    assert len(mixtures.Mixture(file, root=private.parent)) == 1
  file = mixture(private, "../private.json")
  refused(
    lambda: mixtures.Mixture(file, root=private.parent / "set"), "not below"
  )


def test_a_linked_folder_is_a_folder(private):
  file = mixture(private, "rows.json")
  private.rename(private.parent / "set" / "rows.json")
  (private.parent / "link").symlink_to("set")
  assert len(opener.open_path(private.parent / "link" / file.name)) == 1


def test_a_meta_reads_no_annotation_outside_its_folder(tmp_path):
  meta = mmpr_files.write(tmp_path, {"a": [mmpr_files.row()]})
  inside = meta.parent / "annotations" / "0.jsonl"
  outside = inside.rename(tmp_path / "out.jsonl")
  entries = json.loads(meta.read_text())
  for path in ("../out.jsonl", "out.jsonl", str(outside)):
    entries["a"]["annotation"] = path
    meta.write_text(json.dumps(entries))
    refused(lambda: mmpr.Mmpr(meta), "a: annotation: .*out.jsonl is not below")
  inside.symlink_to(outside)
  entries["a"]["annotation"] = "annotations/0.jsonl"
  meta.write_text(json.dumps(entries))
  refused(lambda: mmpr.Mmpr(meta), "a: annotation: .*0.jsonl is not below")
  inside.unlink()
  outside.rename(inside)
  # That of another machine, by its name.
  entries["a"]["annotation"] = str(outside.with_name("0.jsonl"))
  outside.with_name("0.jsonl").write_text("{}\n")
  meta.write_text(json.dumps(entries))
  assert mmpr.Mmpr(meta).parts[0].file.path == inside


def test_a_meta_shows_no_image_outside_its_folder_unless_named(tmp_path):
  meta = mmpr_files.write(tmp_path, {"a": [mmpr_files.row()]})
  os.rename(meta.parent / "images" / "0", tmp_path / "others")
  entries = json.loads(meta.read_text())
  for root in ("others", "../others", str(tmp_path / "others")):
    entries["a"]["root"] = root
    meta.write_text(json.dumps(entries))
    refused(lambda: mmpr.Mmpr(meta), "root: .*others is not below.*image_root")
  entries["a"]["root"] = "others"
  meta.write_text(json.dumps(entries))
  assert mmpr.Mmpr(meta, tmp_path)[0]["image"].shape == (2, 3, 3)
