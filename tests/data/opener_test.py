"""The kinds of source that a config can name, and what is no source."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from pivot_jax.data import feed, lengths, opener
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError
from pivot_jax.weights import checkpoint
from tests.fixtures import published

TOKENIZER = load_tokenizer(checkpoint.tokenizer_folder("package:toy"))


def test_an_empty_source_is_refused_by_name(tmp_path):
  path = tmp_path / "none.jsonl"
  path.write_text("")
  with pytest.raises(InputError, match=r"none\.jsonl: the data is empty"):
    opener.open_source(dict(kind="preference", path=str(path)))


def test_a_kind_that_is_not_there_is_answered_with_the_kinds():
  with pytest.raises(InputError, match=r"'lava': choose one of .*'llava'"):
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
  assert "rows.jsonl:2: " in said[0] and said[1] == "1 of 4 rows left out"


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
    return opener.open_stream([(spec, 1.0)], coder, seed=0)

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
