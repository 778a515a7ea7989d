"""Which examples share a row: two budgets, tokens and images, one shape.

It knows what an example takes (`Size`), and nothing of what it holds.
`layout_for` finds the smallest rows that hold a whole run, `place` who lies
where in one update; both decide alike.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from pivot_jax.errors import InputError

# Updates that are looked at to choose how many images a row may hold.
_SAMPLED = 32


class Size(NamedTuple):
  """What an example takes in a row.

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

  `examples` is how many a row may hold, `copies` how many answers an example
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
  """Returns the smallest layout that holds each of the updates.

  Args:
    row_tokens: tokens of a row; 0 makes it as long as the longest example,
      rounded up to a multiple of 8.
    row_images: images that a row may hold; 0 chooses the number for which rows
      of tokens and images together waste least.
    shards: rows are a multiple of it (devices times accumulation).
    hosts: how many processes pack equal shares of each update.

  Raises:
    InputError: no example, or one that a row cannot hold.
  """
  sizes = [size for update in updates for size in update]
  if not sizes:
    raise InputError("no examples to pack: the data is empty")
  longest = max(size.tokens for size in sizes)
  tokens = row_tokens or -(-longest // 8) * 8
  if tokens < longest:
    raise InputError(
      f"row_tokens={tokens} is shorter than the longest example ({longest} "
      "tokens with its image): raise row_tokens, or 0 to have it chosen"
    )
  most = max(size.images for size in sizes)
  if row_images and row_images < most:
    raise InputError(
      f"pack.row_images={row_images} is less than the {most} images of one "
      "example: raise it, or 0 to have it chosen"
    )
  parts = [part for update in updates for part in _shares(update, hosts)]
  images = row_images or _choose_images(parts, tokens, patches)
  rows = max(len(assign(part, tokens=tokens, images=images)) for part in parts)
  step = -(-shards // hosts)
  rows = -(-rows // step) * step
  placed = [
    [part[i] for i in row]
    for part in parts
    for row in assign(part, tokens=tokens, images=images, rows=rows)
  ]
  return Layout(
    rows=rows * hosts,
    examples=max(map(len, placed)),
    tokens=tokens,
    images=max(sum(size.images for size in row) for row in placed),
    image_size=image_size,
    patches=patches,
    sequences=max(sum(size.answers for size in row) for row in placed),
    sequence=max(size.sequence for size in sizes),
    copies=max(size.answers for size in sizes),
    losses=max(1, max(sum(size.losses for size in row) for row in placed)),
    pairs=max(sum(size.pairs for size in row) for row in placed),
  )


def place(sizes: Sequence[Size], layout: Layout) -> list[list[int]]:
  """Returns which examples each row of a layout holds."""
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
  """Returns rows of example indices, in stream order within a row.

  First fit by decreasing length; where that takes more than the fewest rows (or
  than `rows`), each example into the emptiest row that has room, with as few
  rows as that succeeds with.

  Args:
    tokens, images, examples: what a row holds at most; None: no limit.
    rows: how many are enough; 0: as few as can be found.
  """
  limits = _Limits(
    tokens,
    len(sizes) * max((size.images for size in sizes), default=0)
    if images is None
    else images,
    len(sizes) if examples is None else examples,
  )
  for size in sizes:
    if size.tokens > tokens or size.images > limits.images:
      raise InputError(
        f"an example of {size.tokens} tokens and {size.images} images is over "
        f"the {tokens} tokens and {limits.images} images of a row"
      )
  order = sorted(range(len(sizes)), key=lambda i: (-sizes[i].tokens, i))
  found = _first_fit(sizes, order, limits)
  for count in range(rows or _fewest(sizes, limits), len(found)):
    balanced = _balance(sizes, order, limits, count)
    if balanced is not None:
      found = balanced
      break
  return [sorted(row) for row in found]


class _Limits(NamedTuple):
  tokens: int
  images: int
  examples: int


def _fewest(sizes, limits: _Limits) -> int:
  """Returns a number of rows that none can be fewer than."""
  totals = (
    (sum(size.tokens for size in sizes), limits.tokens),
    (sum(size.images for size in sizes), limits.images),
    (len(sizes), limits.examples),
  )
  return max(-(-have // max(1, limit)) for have, limit in totals)


def _first_fit(sizes, order, limits: _Limits) -> list[list[int]]:
  rows: list[list[int]] = []
  room: list[list[int]] = []
  for index in order:
    tokens, images = sizes[index].tokens, sizes[index].images
    for row, free in zip(rows, room):
      if free[0] >= tokens and free[1] >= images and free[2]:
        break
    else:
      row, free = [], list(limits)
      rows.append(row)
      room.append(free)
    row.append(index)
    free[0] -= tokens
    free[1] -= images
    free[2] -= 1
  return rows


def _balance(sizes, order, limits: _Limits, count: int):
  """Returns `count` rows filled evenly, None if that does not work out."""
  rows: list[list[int]] = [[] for _ in range(count)]
  room = [list(limits) for _ in range(count)]
  for index in order:
    tokens, images = sizes[index].tokens, sizes[index].images
    best = None
    for place, free in enumerate(room):
      if (
        free[1] >= images
        and free[2]
        and (best is None or free[0] > room[best][0])
      ):
        best = place
    if best is None or room[best][0] < tokens:
      return None
    rows[best].append(index)
    free = room[best]
    free[0] -= tokens
    free[1] -= images
    free[2] -= 1
  return [row for row in rows if row]


def _shares(update: Sequence[Size], hosts: int) -> list[Sequence[Size]]:
  share = len(update) // hosts
  return [update[i * share : (i + 1) * share] for i in range(hosts)]


def _choose_images(parts, tokens: int, patches: int) -> int:
  """Returns how many images a row should have room for."""
  sample = parts[:: max(1, len(parts) // _SAMPLED)]
  total = sum(size.images for part in sample for size in part)
  if not total:
    return max(size.images for part in parts for size in part)
  every = sum(size.tokens for part in sample for size in part)
  fewest = max(size.images for part in parts for size in part)
  free = max(
    sum(part[i].images for i in row)
    for part in sample
    for row in assign(part, tokens=tokens)
  )
  low = max(fewest, total * tokens // every)

  def waste(images: int) -> int:
    rows = max(
      len(assign(part, tokens=tokens, images=images)) for part in sample
    )
    return rows * (tokens + images * patches)

  return min(range(low, max(low, free) + 1), key=waste)
