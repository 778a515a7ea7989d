"""Examples share rows: nothing lost, no budget passed, little padding."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivot_jax.data import layouts
from pivot_jax.errors import InputError


def size(tokens, images=1, pairs=1):
  return layouts.Size(tokens, tokens, images, 2, tokens // 2, pairs)


def like_mmpr(count, seed=0, patches=576):
  """Return sizes of pairs whose texts are as long as MMPR's are on average.

  Log-normal lengths, sigma 0.6; 91 tokens of question, 280 and 309 of answers.
  """
  rng = np.random.default_rng(seed)
  question, chosen, rejected = (
    rng.lognormal(np.log(mean) - 0.18, 0.6, count).astype(int) + 1
    for mean in (91, 280, 309)
  )
  return [
    layouts.Size(
      tokens=int(patches + q + c + r),
      sequence=int(patches + q + max(c, r)),
      images=1,
      answers=2,
      losses=int(c + r),
      pairs=1,
    )
    for q, c, r in zip(question, chosen, rejected)
  ]


SIZES = st.lists(
  st.builds(size, st.integers(1, 50), st.integers(0, 3)), max_size=40
)


@given(sizes=SIZES, images=st.integers(3, 9), examples=st.integers(1, 9))
@settings(deadline=None)
def test_rows_hold_every_example_once_and_keep_their_budgets(
  sizes, images, examples
):
  rows = layouts.assign(sizes, tokens=60, images=images, examples=examples)
  assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
  for row in rows:
    assert row == sorted(row) and 0 < len(row) <= examples
    assert sum(sizes[i].tokens for i in row) <= 60
    assert sum(sizes[i].images for i in row) <= images


def test_even_rows_are_found_where_first_fit_needs_one_more():
  # First fit takes 6+4, 5+3, 3+3 ... and is left with a fourth row.
  sizes = [size(n, 0) for n in (6, 5, 4, 4, 4, 3, 2, 2)]
  assert len(layouts.assign(sizes, tokens=10)) == 3


def test_an_exchange_relieves_a_row_that_is_over():
  # Longest first into the emptiest row gives 9+4+4 and 7+6+5, of 18.
  sizes = [size(n, 0) for n in (9, 7, 6, 5, 4, 4)]
  rows = layouts.assign(sizes, tokens=18, rows=2)
  assert sorted(sum(sizes[i].tokens for i in row) for row in rows) == [17, 18]


@pytest.mark.parametrize(
  "tokens",
  [8192, *(pytest.param(x, marks=pytest.mark.nightly) for x in (16384, 32768))],
)
def test_padding_stays_small_on_lengths_like_those_of_the_paper(tokens):
  updates = np.array(like_mmpr(20 * 256), object).reshape(20, 256, 6)
  updates = [[layouts.Size(*one) for one in update] for update in updates]
  layout = layouts.layout_for(
    updates, patches=576, image_size=384, row_tokens=tokens
  )
  held = sum(one.tokens for update in updates for one in update)
  slots = 20 * layout.rows
  assert 0.8 * tokens <= layout.tokens <= tokens
  assert 1 - held / (slots * layout.tokens) < 0.08
  assert 1 - 20 * 256 / (slots * layout.images) < 0.10


@pytest.mark.parametrize("hosts, shards", [(1, 4), (2, 4), (2, 2)])
def test_a_layout_holds_the_share_of_every_process(hosts, shards):
  updates = [like_mmpr(32, seed=i) for i in range(6)]
  layout = layouts.layout_for(
    updates,
    patches=576,
    image_size=384,
    row_tokens=8192,
    hosts=hosts,
    shards=shards,
  )
  assert layout.rows % shards == 0 and layout.rows % hosts == 0
  count = 32 // hosts
  for update in updates:
    for start in range(0, 32, count):
      share = update[start : start + count]
      rows = layouts.assign(
        share,
        tokens=layout.tokens,
        images=layout.images,
        examples=layout.examples,
        rows=layout.rows // hosts,
      )
      assert len(rows) <= layout.rows // hosts


def test_rows_without_images_have_no_room_for_any():
  updates = [[size(9, 0), size(5, 0), size(4, 0)]] * 2
  layout = layouts.layout_for(updates, patches=4, image_size=8, row_tokens=16)
  assert (layout.rows, layout.images, layout.tokens) == (2, 0, 16)


def test_few_rows_are_not_made_more_to_save_image_slots():
  # Two rows of two; three rows would leave fewer slots empty, half as long.
  updates = [[size(n) for n in (22, 23, 19, 17)]]
  layout = layouts.layout_for(updates, patches=4, image_size=8, row_tokens=80)
  assert (layout.rows, layout.images, layout.tokens) == (2, 2, 48)


def test_what_no_row_can_hold_is_refused():
  with pytest.raises(InputError, match="1 images is over the 60 tokens"):
    layouts.assign([size(61)], tokens=60)
  with pytest.raises(InputError, match=r"row_images=1 is less than the 2"):
    layouts.layout_for(
      [[size(9, 2)]], patches=1, image_size=8, row_images=1, row_tokens=64
    )
  with pytest.raises(InputError, match="empty"):
    layouts.layout_for([[]], patches=1, image_size=8)


@given(
  updates=st.lists(
    st.lists(
      st.builds(
        layouts.Size,
        tokens=st.integers(1, 50),
        sequence=st.just(9),
        images=st.integers(0, 4),
        answers=st.integers(1, 8),
        losses=st.integers(1, 30),
        pairs=st.integers(0, 4),
      ),
      min_size=1,
      max_size=14,
    ),
    min_size=1,
    max_size=5,
  ),
  hosts=st.sampled_from([1, 2]),
  row=st.integers(50, 120),
)
@settings(deadline=None, max_examples=300)
def test_every_update_lies_as_its_layout_was_made_for(updates, hosts, row):
  """The choices of `place` stay within all sizes that `layout_for` found."""
  updates = [update[: len(update) // hosts * hosts] for update in updates]
  updates = [update for update in updates if update]
  if not updates:
    return
  layout = layouts.layout_for(
    updates, patches=4, image_size=8, hosts=hosts, row_tokens=row
  )
  local = dataclasses.replace(layout, rows=layout.rows // hosts)
  for update in updates:
    share = len(update) // hosts
    for start in range(0, len(update), share):
      part = update[start : start + share]
      rows = layouts.place(part, local)
      assert len(rows) <= local.rows
      for members in rows:
        held = [part[i] for i in members]
        assert len(held) <= local.examples
        assert sum(one.images for one in held) <= local.images
        assert sum(one.answers for one in held) <= local.sequences
        assert sum(one.losses for one in held) <= local.losses
        assert sum(one.pairs for one in held) <= local.pairs
