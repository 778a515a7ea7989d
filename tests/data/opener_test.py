"""Data by an entry of a config or by its path: told, opened and learnt."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from pivot_jax import addresses
from pivot_jax.data import feed, lengths, opener, streams
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.data.tools import convert
from pivot_jax.errors import InputError
from tests.fixtures import published, published_parts

TOKENIZER = load_tokenizer(addresses.tokenizer_folder("package:toy"))
SETS = {
  "llava_pretrain": (published.make_llava_pretrain, "conversation"),
  "onevision": (published.make_onevision, "conversation"),
  "llava_next": (published.make_llava_next, "conversation"),
  "mmpr": (published.make_mmpr, "preference"),
  "mixture": (published.make_onevision_mixture, "conversation"),
  "evaluation": (published.make_evaluation, "eval"),
  "image_folder": (published.make_image_folder, "classify"),
}


def test_an_empty_source_is_refused_by_name(tmp_path):
  path = tmp_path / "none.jsonl"
  path.write_text("")
  with pytest.raises(InputError, match=r"none\.jsonl: the data is empty"):
    opener.open_source(dict(kind="preference", path=str(path)))


def test_a_kind_that_is_not_there_is_answered_with_the_kinds():
  with pytest.raises(InputError, match=r"'lava': choose one of .*, llava,"):
    opener.open_source(dict(kind="lava", path="x.json"))


@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_conversations_without_images_keep_their_words(tmp_path, keys):
  roles = ("human", "gpt") if keys[0] == "from" else ("user", "assistant")
  turns = [
    dict(zip(keys, turn)) for turn in zip(roles, ("<image>\nHow many?", "two"))
  ]
  record = dict(id="x", image="nowhere.png", conversations=turns)
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps(record) + "\n")
  found = opener.open_source(dict(kind="llava_text", path=str(path)))
  row = found[0]
  assert row == found.text(0) and row["id"] == "x" and row["image"] is None
  coder = feed.Coder(
    tokenizer=TOKENIZER,
    template="qwen_1_5",
    mask="paper",
    pairs=False,
    image_size=48,
  )
  example = feed.Stream([(found, 1.0)], coder, seed=0).example(0)
  said = TOKENIZER.decode(example.prompt)
  assert example.images == () and "<image>" not in said
  assert "user\nHow many?" in said


@pytest.fixture
def half_bad(tmp_path):
  """A file of four questions; the image of the second is lost."""
  pixels = np.zeros((4, 4, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "there.png")
  rows = [
    dict(image=image, question="q", answer="a")
    for image in ("there.png", "gone.png", "there.png", "there.png")
  ]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return dict(kind="eval", path=str(path))


def test_a_row_that_cannot_be_read_is_an_error_unless_allowed(half_bad):
  source = opener.open_source(half_bad)
  assert len(source) == 4
  with pytest.raises(InputError, match=r"rows\.jsonl:2: .*gone\.png"):
    source[1]
  with pytest.raises(InputError, match=r"1 of 4 .* share of 0\.2: .*jsonl:2"):
    opener.open_source(half_bad | dict(max_bad=0.2))


def test_rows_left_out_are_named_and_the_others_keep_their_places(
  half_bad, caplog
):
  with caplog.at_level(logging.WARNING, "pivot_jax"):
    source = opener.open_source(half_bad | dict(max_bad=0.25))
  assert [source.name(i)[-2:] for i in range(len(source))] == [":1", ":3", ":4"]
  assert source[1]["image"].shape == (4, 4, 3)
  assert source.text(1)["id"] == "rows-2"
  said = [record.getMessage() for record in caplog.records]
  assert "rows.jsonl:2: " in said[0] and said[1] == "1 of 4 rows skipped"


@pytest.mark.parametrize("share", [-0.1, 1])
def test_all_rows_cannot_be_allowed_to_be_bad(half_bad, share):
  with pytest.raises(InputError, match="give a share, 0 or more and under 1"):
    opener.open_source(half_bad | dict(max_bad=share))


def test_lengths_of_large_files_are_measured_once(tmp_path, monkeypatch):
  monkeypatch.setenv("PIVOT_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(lengths, "KEPT", 1)
  mixture = published.make_onevision_mixture(tmp_path)
  paths = dict(path=str(mixture.path), image_root=str(mixture.root))
  spec = dict(kind="llava", **paths)
  coder = feed.Coder(
    tokenizer=TOKENIZER,
    template="qwen_1_5",
    mask="paper",
    pairs=False,
    image_size=48,
    patches=36,
    max_length=180,
    long="drop",
  )

  def opened():
    return streams.open_stream([(spec, 1.0)], coder, seed=0)

  first = opened()
  assert 0 < first.rows(0) < 15

  def refuse(*_):
    raise AssertionError("measured again")

  with monkeypatch.context() as patch:
    patch.setattr(lengths, "part", refuse)
    assert opened().every() == first.every()
  # Another text is measured anew.
  path = mixture.path.parent / "llava_next_738k.json"
  path.write_text(path.read_text().replace("the", "of the"))
  with monkeypatch.context() as patch:
    patch.setattr(lengths, "part", refuse)
    with pytest.raises(AssertionError, match="measured again"):
      opened()


def test_rows_that_are_in_no_file_cannot_be_listed_as_bad(tmp_path):
  spec = dict(kind="scenes", task="chat", size=3, bad=str(tmp_path / "b.jsonl"))
  with pytest.raises(InputError, match="rows of scenes are in no file"):
    opener.open_source(spec)


def test_bad_rows_are_told_however_their_file_is_composed(tmp_path):
  path = tmp_path / "nin\u0303o.jsonl"
  row = dict(id="a", question="q", chosen="x", rejected="y")
  lines = [json.dumps(row | dict(id=str(i))) for i in range(3)]
  path.write_text("\n".join(lines))
  bad = tmp_path / "bad.jsonl"
  named = str(tmp_path / "ni\u00f1o.jsonl")
  bad.write_text(json.dumps(dict(file=named, row=1)) + "\n")
  source = opener.open_source(
    dict(kind="preference", path=str(path), bad=str(bad))
  )
  assert [source.text(i)["id"] for i in range(len(source))] == ["0", "2"]


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
  """Return (name, the files as written, kind, the source of their path)."""
  make, wanted = SETS[request.param]
  made = make(tmp_path)
  root = None
  if request.param in ("llava_pretrain", "mixture"):
    root = str(made.root)
  path = made.path
  if request.param == "image_folder":
    with pytest.raises(InputError, match="holds train and val; name one"):
      opener.open_path(path)
    path = path / "train"
  source = opener.open_path(path, image_root=root)
  assert source.kind == wanted
  return request.param, made, source


def test_a_published_set_is_told_and_read(found):
  name, made, source = found
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
  _, _, source = found
  if source.kind not in ("conversation", "preference"):
    return
  stream = streams.Stream([(source, 1.0)], coder(source.kind), seed=0)
  count = len(source)
  examples = list(stream.examples(range(count), threads=2))
  assert {e.id for e in examples} == {
    source.text(i)["id"] for i in range(count)
  }
  assert all(image.shape == (24, 24, 3) for e in examples for image in e.images)


def test_a_converted_set_has_the_rows_and_files_it_had(found, tmp_path):
  name, _, source = found
  out, kind = tmp_path / "converted", source.kind
  convert.convert(source, out, kind=kind, origin=name, shards=2)
  again = opener.open_path(out)
  assert again.kind == kind and len(again) == len(source)
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
  again = opener.open_path(tmp_path / "out")
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
    opener.open_path(tmp_path / name)
  empty = tmp_path / "empty"
  empty.mkdir()
  with pytest.raises(InputError, match="no data set"):
    opener.open_path(empty)


def test_scenes_are_opened_by_their_task():
  source = opener.open_path("scenes:preference?size=3&new_fraction=1")
  assert source.kind == "preference" and len(source) == 3
  assert "<think>" in source[0]["chosen"]
  assert opener.open_path("scenes:chat").kind == "conversation"
  with pytest.raises(InputError, match="scenes have no field colour"):
    opener.open_path("scenes:chat?colour=red")
  with pytest.raises(InputError, match="size must be a number"):
    opener.open_path("scenes:chat?size=red")
