"""Places examples in rows: two budgets, tokens and images, one shape.

Works on sizes only, never on tokens. `layout_for` finds the smallest rows that
hold a whole run, `place` the row of each example of one update; both decide
alike.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pivot_jax.errors import InputError

# Updates that are looked at to choose how many images a row may hold.
_SAMPLED = 32
# Rows of so many tokens have a multiple of 128.
_LONG = 2048
# How many times as many rows may be taken so that fewer image slots are empty.
_SHORTER = 1.15
_NEVER = np.iinfo(np.int64).max


class Size(NamedTuple):
  """The size of an example in a row.

  tokens: prompt and all answers, images expanded. sequence: the prompt and the
  longest answer. images: encoded for it. answers: its sequences, 1 or more.
  losses: loss positions. pairs: of chosen and rejected answers.
  """

  tokens: int
  sequence: int
  images: int
  answers: int
  losses: int
  pairs: int


@dataclasses.dataclass(frozen=True)
class Layout:
  """The static sizes of a Batch.

  `place` decides by them alone, and as `layout_for` did. `examples` is how many
  a row may hold, `copies` how many answers an example
  may have (at least 1).
  """

  rows: int
  examples: int
  tokens: int
  images: int
  image_size: int
  patches: int
  sequences: int
  sequence: int
  copies: int
  losses: int
  pairs: int


def layout_for(
  updates: Sequence[Sequence[Size]],
  *,
  patches: int,
  image_size: int,
  shards: int = 1,
  hosts: int = 1,
  row_tokens: int = 0,
  row_images: int = 0,
) -> Layout:
  """Return the smallest layout that holds each of the updates.

  Args:
    row_tokens: tokens that a row may have; it gets as few of them as hold the
      run. 0: as many as the longest example, rounded up to a multiple of 8.
    row_images: images that a row may hold; 0 chooses the number for which rows
      of tokens and images together waste least.
    shards: rows are a multiple of it (devices times accumulation).
    hosts: how many processes pack equal shares of each update.

  Raises:
    InputError: no example, or one that a row cannot hold.
  """
  sizes = [size for update in updates for size in update]
  longest, most = _largest(sizes, row_tokens, row_images)
  tokens = row_tokens or _up(longest, 8)
  parts = [part for update in updates for part in _shares(update, hosts)]
  # Those with most tokens are hardest: sizes are found for some of them, and
  # then the whole run is tried.
  hardest = sorted(parts, key=lambda part: -sum(s.tokens for s in part))
  hardest = hardest[:_SAMPLED]
  step = -(-shards // hosts)
  images = row_images or _choose_images(hardest, tokens, patches, step)
  images = max(images, most)
  rows = _up(_rows(hardest, tokens, images), step)
  tokens = _shortest(hardest, tokens, images, rows, longest)
  placed: list[list[Size]] = []
  while not placed:
    rows, placed = _place_all(parts, tokens, images, _up(rows, step))
  return Layout(
    rows=rows * hosts,
    examples=max(map(len, parts)),
    tokens=tokens,
    images=images,
    image_size=image_size,
    patches=patches,
    sequences=max(sum(size.answers for size in row) for row in placed),
    sequence=max(size.sequence for size in sizes),
    copies=max(size.answers for size in sizes),
    losses=max(1, max(sum(size.losses for size in row) for row in placed)),
    pairs=max(sum(size.pairs for size in row) for row in placed),
  )


def _largest(
  sizes: Sequence[Size], row_tokens: int, row_images: int
) -> tuple[int, int]:
  """Return the most tokens and images of an example, which a row must hold."""
  if not sizes:
    raise InputError("no examples to pack: the data is empty")
  longest = max(size.tokens for size in sizes)
  if row_tokens and row_tokens < longest:
    raise InputError(
      f"row_tokens={row_tokens} is shorter than the longest example ({longest} "
      "tokens with its image): raise row_tokens, or 0 to have it chosen"
    )
  most = max(size.images for size in sizes)
  if row_images and row_images < most:
    raise InputError(
      f"pack.row_images={row_images} is less than the {most} images of one "
      "example: raise it, or 0 to have it chosen"
    )
  return longest, most


def _up(number: int, step: int) -> int:
  return -(-number // step) * step


def _rows(parts, tokens: int, images: int) -> int:
  return max(len(assign(part, tokens=tokens, images=images)) for part in parts)


def _place_all(parts, tokens: int, images: int, rows: int):
  """Return how many rows every part fits in, at least `rows`, and all rows."""
  placed = []
  for part in parts:
    found = assign(part, tokens=tokens, images=images, rows=rows)
    if len(found) > rows:
      return rows + 1, []
    placed += [[part[i] for i in row] for row in found]
  return rows, placed


def _shortest(parts, tokens: int, images: int, rows: int, longest: int) -> int:
  """Return the fewest tokens a row needs so that every part takes `rows`."""
  step = 128 if tokens >= _LONG else 8
  total = max(sum(size.tokens for size in part) for part in parts)
  low = max(_up(longest, step), _up(-(-total // rows), step))
  for length in range(low, tokens, step):
    if all(
      len(assign(part, tokens=length, images=images, rows=rows)) <= rows
      for part in parts
    ):
      return length
  return tokens


def place(sizes: Sequence[Size], layout: Layout) -> list[list[int]]:
  """Return which examples each row of a layout holds."""
  return assign(
    sizes,
    tokens=layout.tokens,
    images=layout.images,
    examples=layout.examples,
    rows=layout.rows,
  )


def assign(
  sizes: Sequence[Size],
  *,
  tokens: int,
  images: int | None = None,
  examples: int | None = None,
  rows: int = 0,
) -> list[list[int]]:
  """Return rows of example indices, in stream order within a row.

  Rows are filled evenly; where that does not work out, first fit by decreasing
  length.

  Args:
    tokens, images, examples: what a row holds at most; None: no limit.
    rows: how many there are, and more only if those do not do; 0: as few as can
      be found.
  """
  table = np.array([(s.tokens, s.images) for s in sizes], np.int64).reshape(
    -1, 2
  )
  limits = _Limits(
    tokens,
    int(table[:, 1].sum()) if images is None else images,
    len(table) if examples is None else examples,
  )
  over = np.flatnonzero((table > limits[:2]).any(axis=1))
  if len(over):
    raise InputError(
      f"an example of {table[over[0], 0]} tokens and {table[over[0], 1]} images "
      f"is over the {tokens} tokens and {limits.images} images of a row"
    )
  order = sorted(range(len(sizes)), key=lambda i: (-sizes[i].tokens, i))
  fewest = rows or _fewest(table, limits)
  found = _balance(table, order, limits, fewest)
  if found is None:
    fallback = _first_fit(sizes, order, limits)
    counts = range(fewest + 1, len(fallback))
    tries = (_balance(table, order, limits, count) for count in counts)
    found = next((one for one in tries if one is not None), fallback)
  return [sorted(row) for row in found if row]


class _Limits(NamedTuple):
  tokens: int
  images: int
  examples: int


def _fewest(table: np.ndarray, limits: _Limits) -> int:
  """Return a number of rows that none can be fewer than."""
  have = (*table.sum(axis=0).tolist(), len(table))
  return max(-(-x // max(1, limit)) for x, limit in zip(have, limits))


def _first_fit(sizes, order, limits: _Limits) -> list[list[int]]:
  rows: list[list[int]] = []
  room: list[list[int]] = []
  for index in order:
    tokens, images = sizes[index].tokens, sizes[index].images
    spots = (
      place
      for place, free in enumerate(room)
      if free[0] >= tokens and free[1] >= images and free[2]
    )
    spot = next(spots, len(rows))
    if spot == len(rows):
      rows.append([])
      room.append(list(limits))
    rows[spot].append(index)
    room[spot][0] -= tokens
    room[spot][1] -= images
    room[spot][2] -= 1
  return rows


def _balance(
  table: np.ndarray, order: Sequence[int], limits: _Limits, count: int
) -> list[list[int]] | None:
  """Return `count` rows filled evenly, None if that does not work out.

  The longest example that is left goes to the emptiest row that has a place for
  it; afterwards examples are exchanged for shorter ones as long as the fullest
  row is over its limit.
  """
  loads = np.zeros((count, 3), np.int64)
  row_of = np.zeros(len(table), np.int64)
  weights = np.c_[table, np.ones(len(table), np.int64)]
  for index in order:
    full = (loads[:, 1:] + weights[index, 1:] > limits[1:]).any(axis=1)
    row = int(np.argmin(np.where(full, _NEVER, loads[:, 0])))
    if full[row]:
      return None
    loads[row] += weights[index]
    row_of[index] = row
  while loads[:, 0].max(initial=0) > limits.tokens:
    if not _exchange(weights, row_of, loads, limits):
      return None
  return [np.flatnonzero(row_of == row).tolist() for row in range(count)]


def _exchange(weights, row_of, loads, limits: _Limits) -> bool:
  """Relieve the fullest row as far as one exchange can; False if none does."""
  over = int(np.argmax(loads[:, 0]))
  mine = np.flatnonzero(row_of == over)
  theirs = np.flatnonzero(row_of != over)
  # An exchange for nothing is a move into a row.
  rows = np.r_[row_of[theirs], np.arange(len(loads))]
  taken = np.r_[weights[theirs], np.zeros((len(loads), 3), np.int64)]
  change = taken[None] - weights[mine][:, None]
  here, there = loads[over] + change, loads[rows][None] - change
  fits = (here[..., 1:] <= limits[1:]).all(-1) & (
    there[..., 1:] <= limits[1:]
  ).all(-1)
  fullest = np.maximum(here[..., 0], there[..., 0])
  fullest = np.where(fits & (rows != over), fullest, _NEVER)
  best = int(np.argmin(fullest))
  if fullest.flat[best] >= loads[over, 0]:
    return False
  out, back = np.unravel_index(best, fullest.shape)
  row = int(rows[back])
  loads[over] += change[out, back]
  loads[row] -= change[out, back]
  row_of[mine[out]] = row
  if back < len(theirs):
    row_of[theirs[back]] = over
  return True


def _shares(update: Sequence[Size], hosts: int) -> list[Sequence[Size]]:
  share = len(update) // hosts
  return [update[i * share : (i + 1) * share] for i in range(hosts)]


def _choose_images(parts, tokens: int, patches: int, step: int) -> int:
  """Return how many images a row should have room for."""
  most = max(size.images for part in parts for size in part)
  if not most:
    return 0
  free = max(
    sum(part[i].images for i in row)
    for part in parts
    for row in assign(part, tokens=tokens)
  )
  total = max(sum(size.tokens for size in part) for part in parts)
  longest = max(size.tokens for part in parts for size in part)
  fewest = _up(_rows(parts, tokens, free), step)
  found: list[tuple[int, int]] = []
  for images in range(most, free + 1):
    rows = _up(_rows(parts, tokens, images), step)
    # Rows get as short as holds their tokens; they should stay about as asked.
    if rows <= fewest * _SHORTER:
      held = max(_up(total, rows), rows * longest) + rows * images * patches
      found.append((held, images))
  return min(found)[1]
