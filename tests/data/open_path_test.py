"""Data by its path alone: every published format is told, opened and learnt."""

import numpy as np
import pytest

from pivot_jax.data import feed, open_path, opener, streams
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.data.tools import convert
from pivot_jax.errors import InputError
from pivot_jax.weights import checkpoint
from tests.fixtures import published, published_parts

TOKENIZER = load_tokenizer(checkpoint.tokenizer_folder("package:toy"))
SETS = {
  "llava_pretrain": (published.make_llava_pretrain, "conversation"),
  "onevision": (published.make_onevision, "conversation"),
  "llava_next": (published.make_llava_next, "conversation"),
  "mmpr": (published.make_mmpr, "preference"),
  "mixture": (published.make_onevision_mixture, "conversation"),
  "evaluation": (published.make_evaluation, "eval"),
  "image_folder": (published.make_image_folder, "classify"),
}


def coder(kind):
  return feed.Coder(
    tokenizer=TOKENIZER,
    template="qwen_1_5",
    mask="paper",
    pairs=kind == "preference",
    image_size=24,
    patches=9,
    max_length=2048,
  )


@pytest.fixture(params=SETS)
def found(request, tmp_path):
  """Return (name, what was written, kind, the source of its path)."""
  make, wanted = SETS[request.param]
  made = make(tmp_path)
  images = None
  if request.param in ("llava_pretrain", "mixture"):
    images = str(made.root)
  path = made.path
  if request.param == "image_folder":
    with pytest.raises(InputError, match="holds train and val; name one"):
      open_path.open_path(path)
    path = path / "train"
  kind, source = open_path.open_path(path, images=images)
  assert kind == wanted
  return request.param, made, kind, source


def test_a_published_set_is_told_and_read(found):
  name, made, _, source = found
  if name == "mixture":
    # All of the first file, 30 % of the second, two rows of the third.
    ids = [source.text(i)["id"] for i in range(len(source))]
    assert len(ids) == 10 + 3 + 2 and len(set(ids)) == 15
    assert source[12]["conversations"] == made.rows[12]["conversations"]
    return
  if name == "mmpr":
    # Its rows have no ids, and are numbered within their sets.
    ids = [source.text(i)["id"] for i in range(len(source))]
    assert ids[0] == "ai2d_prefix_pair/0" and len(set(ids)) == len(ids)
    extra = [
      {key: source.text(i)[key] for key in ("id", "data_source")}
      for i in range(len(source))
    ]
    made = made._replace(
      rows=[row | more for row, more in zip(made.rows, extra)]
    )
  published_parts.assert_reads(source, made)


def test_a_published_set_is_learnt_from(found):
  _, _, kind, source = found
  if kind not in ("conversation", "preference"):
    return
  stream = streams.Stream([(source, 1.0)], coder(kind), seed=0)
  count = len(source)
  examples = list(stream.examples(range(count), threads=2))
  assert {e.id for e in examples} == {
    source.text(i)["id"] for i in range(count)
  }
  assert all(image.shape == (24, 24, 3) for e in examples for image in e.images)


def test_a_converted_set_has_the_rows_and_files_it_had(found, tmp_path):
  name, made, kind, source = found
  out = tmp_path / "converted"
  convert.convert(source, out, kind=kind, origin=name, shards=2)
  again_kind, again = open_path.open_path(out)
  assert again_kind == kind and len(again) == len(source)
  for index in range(len(source)):
    assert again.encoded(index) == source.encoded(index)
    one, other = again[index], source[index]
    np.testing.assert_equal(one.pop("image"), other.pop("image"))
    # All fields are kept, `columns` of evaluation sets too.
    assert one == other and ("columns" in one) == (kind == "eval")


@pytest.mark.parametrize("make, kind", [
  (published.make_onevision, "preference"),
  (published.make_evaluation, "llava"),
])  # fmt: skip
def test_rows_of_another_kind_than_needed_are_refused(tmp_path, make, kind):
  path = str(make(tmp_path).path)
  with pytest.raises(InputError, match="rows are needed here"):
    opener.open_source(dict(kind=kind, path=path))


@pytest.mark.parametrize("task, kind", [
  ("chat", "conversation"), ("preference", "preference"), ("eval", "eval"),
  ("text", "conversation"), ("classify", "classify"), ("segment", "segment"),
])  # fmt: skip
def test_scenes_are_converted(tmp_path, task, kind):
  source = opener.open_source(dict(kind="scenes", task=task, size=4))
  convert.convert(source, tmp_path / "out", kind=kind, origin="scenes")
  _, again = open_path.open_path(tmp_path / "out")
  for index in range(4):
    one, other = again[index], source[index]
    other.pop("object_mask", None)
    np.testing.assert_equal(one, other)


def test_mixtures_and_mmpr_drop_long_rows_and_own_files_do_not(tmp_path):
  mixture = published.make_onevision_mixture(tmp_path)
  captions = published.make_llava_pretrain(tmp_path)
  specs = [dict(kind="llava", path=str(x.path)) for x in (mixture, captions)]
  assert [opener.long_rows("auto", [s]) for s in specs] == ["drop", "error"]
  assert opener.long_rows("auto", specs) == "drop"
  assert opener.long_rows("truncate_answer", specs) == "truncate_answer"


@pytest.mark.parametrize("name, text, message", [
  ("a.txt", "", "give .json, .jsonl, .yaml or .parquet, or a folder"),
  ("a.json", "[]", "no known kind of row"),
  ("a.jsonl", '{"x": 1}\n', "no known kind of row.* not x"),
  ("gone.json", None, "no such file or folder"),
])  # fmt: skip
def test_what_is_no_data_set_is_refused(tmp_path, name, text, message):
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(InputError, match=f"{name}: {message}"):
    open_path.open_path(tmp_path / name)
  empty = tmp_path / "empty"
  empty.mkdir()
  with pytest.raises(InputError, match="no data set"):
    open_path.open_path(empty)


def test_scenes_are_opened_by_their_task():
  kind, source = open_path.open_path("scenes:preference?size=3&new_fraction=1")
  assert kind == "preference" and len(source) == 3
  assert "<think>" in source[0]["chosen"]
  assert open_path.open_path("scenes:chat")[0] == "conversation"
  with pytest.raises(InputError, match="scenes have no field colour"):
    open_path.open_path("scenes:chat?colour=red")
  with pytest.raises(InputError, match="size must be a number"):
    open_path.open_path("scenes:chat?size=red")
