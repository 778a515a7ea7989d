"""The arrays of packed rows, by hand; weights, and what is refused."""

import dataclasses

import numpy as np
import pytest

from pivot_jax.data import packing
from pivot_jax.errors import InputError
from tests.data.packing_test import LAYOUT
from tests.fixtures import tiny


def _by_hand():
  """A pair with an image, then a pair of text alone."""

  def yes(n):
    return np.ones(n, bool)

  first = packing.Example(
    id="first",
    prompt=np.array([5, packing.IMAGE_TOKEN, 6]),
    prompt_targets=np.zeros(3, bool),
    answers=(np.array([7, 8]), np.array([9])),
    answer_targets=(yes(2), yes(1)),
    images=(np.full((16, 16, 3), 3, np.uint8),),
    reference=(-1.0, -2.0),
  )
  second = packing.Example(
    id="second",
    prompt=np.array([10, 11]),
    prompt_targets=np.array([True, False]),
    answers=(np.array([12]), np.array([13, 14])),
    answer_targets=(yes(1), np.array([False, True])),
    reference=(-3.0, -4.0),
  )
  return [first, second]


def _row(array):
  return np.asarray(array)[0].tolist()


def test_the_arrays_of_two_pairs_are_as_written_by_hand():
  examples = _by_hand()
  layout = packing.layout_for(
    [examples], patches=4, image_size=16, row_tokens=16
  )
  batch = packing.pack(examples, layout)
  assert batch.tokens.shape == (1, 16)
  # image prompt: 5 IIII 6 | 7 8 | 9; text: 10 11 | 12 | 13 14; two spare.
  assert _row(batch.tokens) == [
    5,
    *[0] * 4,
    6,
    7,
    8,
    9,
    10,
    11,
    12,
    13,
    14,
    0,
    0,
  ]
  assert _row(batch.positions) == [
    *(0, 1, 2, 3, 4, 5, 6, 7, 6),
    *(0, 1, 2, 2, 3),
    *(0, 0),
  ]
  assert _row(batch.segments) == [1] * 9 + [2] * 5 + [0] * 2
  assert _row(batch.branches) == [0] * 6 + [1, 1, 2] + [0, 0, 1, 2, 2] + [0, 0]
  assert _row(batch.image_index) == [-1, 0, 1, 2, 3] + [-1] * 11
  assert _row(batch.sequences) == [
    [0, 1, 2, 3, 4, 5, 6, 7],
    [0, 1, 2, 3, 4, 5, 8, -1],
    [9, 10, 11] + [-1] * 5,
    [9, 10, 12, 13] + [-1] * 4,
  ]
  # The last token of a prompt predicts the first token of both its answers.
  assert _row(batch.loss_source) == [5, 6, 5, 10, 12]
  assert _row(batch.loss_target) == [7, 8, 9, 12, 14]
  assert _row(batch.loss_answer) == [0, 0, 1, 2, 3]
  assert _row(batch.pair_weight) == [0.5, 0.5]
  assert _row(batch.reference) == [[-1, -2], [-3, -4]]
  assert (batch.images[0, 0] == 3).all()


def test_an_empty_row_weighs_nothing():
  batch = packing.pack(_by_hand(), LAYOUT, sft_group=2)
  for array in (batch.segments, batch.loss_weight, batch.pair_weight):
    assert (array[:2] != 0).any() and (array[2:] == 0).all()
  assert (batch.loss_answer[2:] == -1).all()
  assert (batch.sequences[2:] == -1).all()


def test_supervised_weights_are_a_token_mean_in_each_group_of_two():
  rng = np.random.default_rng(0)
  examples = [
    tiny.example(rng, prompt=1, answers=[1], image=False),
    tiny.example(rng, prompt=1, answers=[13], image=False),
    tiny.example(rng, prompt=1, answers=[5], image=True),
  ]
  counts = [packing.targets(example) for example in examples]
  batch = packing.pack(examples, LAYOUT, sft_group=2)
  weights = sorted(batch.loss_weight[batch.loss_weight > 0].tolist())
  first, second = 1 / (counts[0] + counts[1]) / 2, 1 / counts[2] / 2
  expected = [first] * (counts[0] + counts[1]) + [second] * counts[2]
  np.testing.assert_allclose(weights, sorted(expected), rtol=1e-6)
  flat = packing.pack(examples, LAYOUT)
  used = flat.loss_weight[flat.loss_weight > 0]
  np.testing.assert_allclose(used, 1 / sum(counts), rtol=1e-6)


def test_pair_weights_are_one_over_the_pairs_of_the_whole_update():
  batch = packing.pack(_by_hand(), LAYOUT, pairs=8)
  assert batch.pair_weight.sum() == pytest.approx(2 / 8)


def test_a_void_example_takes_its_place_and_weighs_nothing():
  rng = np.random.default_rng(0)
  examples = [
    tiny.example(rng, prompt=4, answers=[6, 5], image=True) for _ in range(4)
  ]
  voided = [dataclasses.replace(examples[0], void=True), *examples[1:]]
  full, batch = (packing.pack(x, LAYOUT) for x in (examples, voided))
  np.testing.assert_array_equal(batch.tokens, full.tokens)
  assert sorted(batch.pair_weight[batch.pair_weight > 0]) == [0.25] * 3
  answers = [dataclasses.replace(e, paired=False) for e in voided]
  flat = packing.pack(answers, LAYOUT)
  counts = [packing.targets(example) for example in answers]
  used = flat.loss_weight[flat.loss_weight > 0]
  assert len(used) == sum(counts[1:])
  # Its tokens stay in the mean, as its pair stays among the pairs.
  np.testing.assert_allclose(used, 1 / sum(counts), rtol=1e-6)
  grouped = packing.pack(answers, LAYOUT, sft_group=2)
  wanted = [1 / (counts[0] + counts[1]) / 2] * counts[1]
  wanted += [1 / (counts[2] + counts[3]) / 2] * (counts[2] + counts[3])
  used = grouped.loss_weight[grouped.loss_weight > 0]
  np.testing.assert_allclose(sorted(used), sorted(wanted), rtol=1e-6)


def test_several_images_lie_where_their_tags_are():
  tag = packing.IMAGE_TOKEN
  pictures = [np.full((16, 16, 3), i, np.uint8) for i in (1, 2)]
  example = packing.Example(
    id="two",
    prompt=np.array([5, tag, 6]),
    prompt_targets=np.array([False, False, True]),
    answers=(np.array([7, tag, 8]),),
    answer_targets=(np.array([True, False, True]),),
    images=tuple(pictures),
    paired=False,
  )
  assert packing.size(example, 4) == (12, 12, 2, 1, 3, 0)
  batch = packing.pack(
    [example], dataclasses.replace(LAYOUT, tokens=12, rows=1)
  )
  assert _row(batch.tokens) == [5, 0, 0, 0, 0, 6, 7, 0, 0, 0, 0, 8]
  spots = [-1, 0, 1, 2, 3, -1, -1, 4, 5, 6, 7, -1]
  assert _row(batch.image_index) == spots
  assert [int(image.max()) for image in batch.images[0]] == [1, 2, 0, 0, 0]
  # An answer's image is read before what follows it, and is no target.
  assert _row(batch.loss_source)[:3] == [4, 5, 10]
  assert _row(batch.loss_target)[:3] == [6, 7, 8]
  pair = dataclasses.replace(
    example,
    answers=(np.array([7, tag]), np.array([8])),
    answer_targets=(np.ones(2, bool), np.ones(1, bool)),
  )
  with pytest.raises(InputError, match="images belong to the question"):
    packing.pack([pair], LAYOUT)


# --- errors ------------------------------------------------------------------


def test_an_example_over_max_length_is_named():
  with pytest.raises(InputError, match="first.*max_length=7"):
    packing.layout_for([_by_hand()], patches=4, image_size=16, max_length=7)


def test_max_length_counts_a_sequence_and_not_both_answers():
  packing.layout_for([_by_hand()], patches=4, image_size=16, max_length=8)


def test_rows_shorter_than_an_example_are_refused():
  with pytest.raises(InputError, match="row_tokens=8"):
    packing.layout_for([_by_hand()], patches=4, image_size=16, row_tokens=8)


def test_more_rows_than_the_layout_has_are_refused():
  rng = np.random.default_rng(0)
  examples = [
    tiny.example(rng, prompt=9, answers=[40, 40], image=False) for _ in range(4)
  ]
  with pytest.raises(InputError, match="4 rows"):
    packing.pack(examples, LAYOUT)


def test_an_image_tag_without_an_image_is_refused():
  example = packing.Example(
    id="lonely",
    prompt=np.array([1, packing.IMAGE_TOKEN]),
    prompt_targets=np.zeros(2, bool),
    answers=(np.array([2]),),
    answer_targets=(np.ones(1, bool),),
  )
  with pytest.raises(InputError, match="lonely: 1 <image> tags for 0 images"):
    packing.pack([example], LAYOUT)


def test_no_examples_are_refused():
  with pytest.raises(InputError, match="empty"):
    packing.layout_for([[]], patches=4, image_size=16)


@pytest.mark.parametrize("group", [0, 2])
def test_shares_of_two_processes_weigh_what_the_whole_update_does(group):
  rng = np.random.default_rng(1)
  examples = [
    tiny.example(rng, prompt=4, answers=[n, 5], image=False, name=str(n))
    for n in (3, 9, 14, 2)
  ]

  def weights(members, **share):
    batch = packing.pack(members, LAYOUT, sft_group=group, **share)
    losses = batch.loss_weight[batch.loss_weight > 0].tolist()
    return sorted(losses), sorted(batch.pair_weight[batch.pair_weight > 0])

  whole = weights(examples)
  total = dict(pairs=4, targets=sum(map(packing.targets, examples)), share=0.5)
  halves = [weights(examples[i : i + 2], **total) for i in (0, 2)]
  for one, parts in zip(whole, zip(*halves)):
    np.testing.assert_allclose(sorted(sum(map(list, parts), [])), one, 1e-6)
