"""From sources to placed updates: order, mixing, sizes, and whose fault it is."""

import collections
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from pivot_jax import addresses, sharding
from pivot_jax.data import coders, feed, images, opener, packing
from pivot_jax.data.scenes import scenes
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError

TOKENIZER = load_tokenizer(addresses.tokenizer_folder("package:toy"))
PATCHES = 36
ALONE = dict(tokens=0, losses=0, images=1)


def coder(**fields):
  return feed.Coder(
    **dict(
      tokenizer=TOKENIZER,
      template="qwen_1_5",
      mask="paper",
      pairs=False,
      image_size=48,
      patches=PATCHES,
    )
    | fields
  )


def source(task="caption", size=7, **fields):
  return scenes.Scenes(task=task, size=size, **fields)


def stream(*parts, seed=3, **fields):
  parts = parts or ((source(), 1.0),)
  return feed.Stream(parts, coder(**fields), seed=seed)


def places(found, count, start=0):
  return [found.place(i) for i in range(start, start + count)]


def two():
  return ((source(size=5), 3.0), (source("chat", size=7), 1.0))


def mesh():
  return sharding.make_mesh({"data": -1})


# --- the order ---------------------------------------------------------------


@pytest.mark.parametrize("parts", [(), two()], ids=["one source", "two"])
def test_a_resumed_stream_goes_on_where_the_first_would_have(parts):
  straight = places(stream(*parts), 60)
  for start in (1, 7, 31):
    assert places(stream(*parts), 60 - start, start) == straight[start:]


def test_the_order_follows_the_seed():
  wide = source(size=50)
  orders = [places(stream((wide, 1.0), seed=s), 50) for s in (3, 3, 4)]
  assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("parts", [(), two()], ids=["one source", "two"])
def test_every_epoch_of_a_source_is_another_full_permutation(parts):
  found = stream(*parts)
  rows = collections.defaultdict(list)
  for part, index in places(found, 120):
    rows[part].append(index)
  for part, size in enumerate([len(s) for s, _ in parts] or [7]):
    epochs = [
      tuple(rows[part][i : i + size])
      for i in range(0, len(rows[part]) - size + 1, size)
    ]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len(epochs) >= 4 and len(set(epochs)) > 1


def test_sources_are_mixed_by_weight_in_any_stretch():
  found = stream((source(size=5), 7.0), (source("chat", size=9), 1.0))
  for start in (0, 333):
    parts = [part for part, _ in places(found, 80, start)]
    assert abs(parts.count(1) - 10) <= 1


def tokens(example):
  return [x.tolist() for x in (example.prompt, *example.answers)]


# --- rows become examples ----------------------------------------------------


def test_an_image_is_framed_unless_it_has_the_size_already():
  image = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
  wanted = images.resize(image, 48, resample="bilinear")
  (got,) = coder(resample="bilinear").pixels(image)
  np.testing.assert_array_equal(got, wanted)
  np.testing.assert_array_equal(coder().pixels(wanted)[0], wanted)
  # A crop from a larger edge cuts into an image of the size, too.
  (cut,) = coder(resample="crop_bicubic:56").pixels(wanted)
  np.testing.assert_array_equal(
    cut, images.resize(wanted, 56, resample="bicubic")[4:52, 4:52]
  )
  assert coder().pixels(None) == ()


def test_a_stand_in_has_the_tokens_of_the_example_and_no_pixels():
  found = stream()
  full, text = found.example(4), found.example(4, pixels=False)
  assert [x.shape for x in full.images] == [(48, 48, 3)]
  assert [x.shape for x in text.images] == [(1, 1, 3)]
  assert full.id == text.id and tokens(full) == tokens(text)


def test_a_preference_row_without_pairs_is_its_chosen_answer():
  row = source("preference")[0]
  said = TOKENIZER.decode(coder().encode(row).answers[0])
  assert row["chosen"] in said and row["rejected"] not in said
  pair = coder(pairs=True).encode(row)
  assert [
    row[k] in TOKENIZER.decode(a)
    for k, a in zip(("chosen", "rejected"), pair.answers)
  ] == [True, True]
  # What a prompt predicts is the same under both answers: no pair learns it.
  assert (
    not pair.prompt_targets.any() and coder().encode(row).prompt_targets.any()
  )


@pytest.mark.parametrize("task, pairs", [("chat", True), ("eval", False)])
def test_rows_of_another_kind_are_refused_by_field(task, pairs):
  found = stream((source(task), 1.0), pairs=pairs)
  with pytest.raises(
    InputError, match=f"scenes/{task}/.*: '(question|chosen)'"
  ):
    found.example(0)


# --- mistakes in files -------------------------------------------------------


def written(tmp_path, kind, records, name="rows.jsonl"):
  Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a.png")
  path = tmp_path / name
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return opener.open_source(
    dict(kind=kind, path=str(path), image_root="", given_by="set a flag")
  )


def pair(**fields):
  good = dict(image="a.png", question="Which?", chosen="red", rejected="blue")
  return good | fields


def assert_names_once(error, found, index):
  message = str(error.value)
  assert message.count(found.name(index)) == 1 and "\n" not in message
  assert message.startswith(found.name(index))


@pytest.mark.parametrize(
  "wrong, pixels",
  [
    (dict(rejected="red"), True),
    (dict(rejected="red"), False),
    (dict(chosen="red <|im_end|>"), True),
    (dict(question="<image> <image>"), False),
    (dict(chosen=3), False),
    (dict(image="b.png"), True),
  ],
  ids=str,
)
def test_a_bad_row_is_named_once(tmp_path, wrong, pixels):
  found = written(tmp_path, "preference", [pair(**wrong)])
  with pytest.raises(InputError) as error:
    stream((found, 1.0), pairs=True).example(0, pixels=pixels)
  assert_names_once(error, found, 0)


def question(**fields):
  return dict(image="a.png", question="Which?", answer="red") | fields


@pytest.mark.parametrize(
  "wrong, choices",
  [
    (dict(question="<image><image>"), {}),
    (dict(image="b.png"), {}),
    (dict(), dict(resample="guess")),
  ],
  ids=str,
)
def test_a_bad_question_is_named_once(tmp_path, wrong, choices):
  found = written(tmp_path, "eval", [question(**wrong)])
  with pytest.raises(InputError) as error:
    feed.prompts(found, [0], coder(**choices), tokens=80, patches=PATCHES)
  assert_names_once(error, found, 0)


def test_a_bad_question_is_named_before_its_picture_is_read(tmp_path):
  found = written(tmp_path, "eval", [question(question="<image><image>")])
  with pytest.raises(InputError) as error:
    feed.longest_prompt(found, coder(), PATCHES)
  assert_names_once(error, found, 0)


# --- reference log-probabilities ---------------------------------------------


def reference():
  rows = source("preference")
  found = [
    coder(pairs=True).example(rows.text(i), pixels=False)
    for i in range(len(rows))
  ]
  return {
    e.id: ((-float(i), -2.0), coders.pair_crcs(e)[0])
    for i, e in enumerate(found)
  }


def scored(columns):
  return feed.Stream(
    ((source("preference"), 1.0),), coder(pairs=True), seed=0, reference=columns
  )


def test_each_row_gets_its_own_reference():
  found = scored(reference())
  for position in range(7):
    _, index = found.place(position)
    logps = found.example(position).reference
    assert logps.tolist() == [[-float(index), -2.0]]


def test_a_row_that_was_not_scored_is_named():
  found, columns = scored({}), reference()
  name = found.example
  with pytest.raises(InputError, match="has no reference .*score stage again"):
    name(0)
  _, index = found.place(0)
  del columns[source("preference").name(index)]
  with pytest.raises(InputError, match=source("preference").name(index)):
    scored(columns).example(0)


def test_another_text_under_the_same_id_is_refused():
  columns = {
    key: (logps, f"{int(crc, 16) ^ 1:08x}")
    for key, (logps, crc) in reference().items()
  }
  with pytest.raises(InputError, match="is not the text that was scored"):
    scored(columns).example(0)


def test_the_crc_tells_answers_apart_from_each_other_and_from_the_prompt():
  base = packing.Example(
    id="x",
    prompt=np.array([1, 2]),
    prompt_targets=np.zeros(2, bool),
    answers=(np.array([3]), np.array([4])),
    answer_targets=(np.ones(1, bool),) * 2,
  )
  others = [
    dict(answers=base.answers[::-1]),
    dict(prompt=np.array([1]), answers=(np.array([2, 3]), np.array([4]))),
    dict(answers=(np.array([3, 4]), np.array([], int))),
  ]
  crcs = {
    coders.pair_crcs(dataclasses.replace(base, **o))[0] for o in ({}, *others)
  }
  assert len(crcs) == 4


# --- sizes -------------------------------------------------------------------


def chosen(found, how, **choices):
  settings = dict(batch=6, steps=5, shards=4, pack=ALONE)
  return feed.choose_layout(found, how, **settings | choices)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_chosen_layout_holds_every_update_and_is_the_smallest(pairs):
  task = "preference" if pairs else "chat"
  found = stream((source(task, size=40), 1.0), pairs=pairs)
  how = coder(pairs=pairs)
  layout = chosen(found, how)
  updates = [
    [found.example(i) for i in range(u * 6, u * 6 + 6)] for u in range(5)
  ]
  # Nothing raises: `pack` refuses what does not fit.
  packed = [packing.pack(members, layout) for members in updates]
  lengths = [[packing.length(e, PATCHES) for e in u] for u in updates]
  for batch, sizes in zip(packed, lengths):
    assert (batch.segments > 0).sum() == sum(sizes)
  longest = max(map(max, lengths))
  assert longest <= layout.tokens < longest + 8 and layout.tokens % 8 == 0
  assert layout.rows % 4 == 0
  # Each size is taken to the last slot by some update.
  assert any((b.loss_answer[:, -1] >= 0).any() for b in packed)
  assert any((b.sequences[:, :, -1] >= 0).any() for b in packed)


def test_an_example_over_max_length_is_refused_by_its_id():
  with pytest.raises(InputError, match=r"scenes/caption/.* max_length=40"):
    chosen(stream(max_length=40), coder(max_length=40))


def test_rows_of_one_example_read_nothing_ahead():
  class Unread(feed.Stream):
    def example(self, position, *, pixels=True):
      raise AssertionError("the stream was read")

  found = Unread(((source(size=8), 1.0),), coder(), seed=0)
  pack = dict(tokens=128, losses=96, images=1)
  layout = chosen(found, coder(), pack=pack, batch=8)
  assert (layout.rows, layout.examples, layout.pairs) == (8, 1, 0)
  layout = chosen(found, coder(pairs=True), pack=pack | dict(images=0), batch=8)
  assert (layout.sequences, layout.pairs, layout.images) == (2, 1, 0)
  with pytest.raises(InputError, match="batch=6 .*nearest are 4 and 8"):
    chosen(found, coder(), pack=pack)


def test_an_example_that_does_not_fit_its_row_is_named():
  pack = dict(tokens=48, losses=48, images=1)
  found = stream((source(size=8), 1.0))
  layout = chosen(found, coder(), pack=pack, batch=8)
  batches = feed.updates(
    found, layout, batch=8, start=0, mesh=mesh(), sft_group=2
  )
  with pytest.raises(InputError, match=r"scenes/caption/train/0/\d.*48"):
    next(batches)


# --- updates -----------------------------------------------------------------


def test_updates_follow_the_stream_from_any_start():
  found = stream((source(size=20), 1.0))
  layout = chosen(found, coder(), batch=8, shards=8)
  for start in (0, 16):
    batches = feed.updates(
      found, layout, batch=8, start=start, mesh=mesh(), sft_group=2
    )
    for number, update in enumerate(itertools.islice(batches, 2)):
      first = start + 8 * number
      members = [found.example(i) for i in range(first, first + 8)]
      assert update.ids == tuple(e.id for e in members)
      wanted = packing.pack(members, layout, sft_group=2)
      jax.tree.map(np.testing.assert_array_equal, update.batch, wanted)
      assert all(
        leaf.sharding.is_equivalent_to(sharding.over_rows(mesh()), leaf.ndim)
        for leaf in jax.tree.leaves(update.batch)
      )
