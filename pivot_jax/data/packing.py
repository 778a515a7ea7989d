"""Examples -> Batch: packed rows with branches. The one batch layout there is.

An example is a prompt, computed once, and the answers that continue it, each of
which sees the prompt and itself but never a sibling. Loss and gradients are
those of separate sequences. This file places tokens and sets weights; it knows
no template, no model and no device.

R rows, T tokens of a row, I images of a row, S sequences (prompt + one answer)
of a row, L tokens of a sequence, C copies of a token among the sequences, M loss
positions of a row, Q pairs of a row.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import numpy as np
from jaxtyping import Float, Int, UInt8

from pivot_jax.errors import InputError

# The id that stands for an image in a prompt (the paper's code uses the same).
IMAGE_TOKEN = -200


@flax.struct.dataclass
class Batch:
  """Packed rows; a row owns its images, so nothing is gathered across devices.

  `segments` numbers the examples of a row from 1, 0 is padding. `branches` is 0
  on a prompt and 1.. on the answers of that example, whose positions restart
  where their prompt ends. `image_index` points into the row's own I*P patch
  features, -1 on text. `sequences` lists the row's plain causal sequences as
  token indices, and `copies` the other way round the places s * L + l at which a
  token lies in them (-1 fills both up): a prompt once for each of its answers. A
  loss position reads the hidden state at `loss_source` and
  predicts `loss_target`; the last token of a prompt predicts the first token of
  *every* answer. `loss_answer` numbers the answers of the row (-1 = padding);
  pair q is made of the answers 2q (chosen) and 2q + 1 (rejected).
  """

  tokens: Int[np.ndarray, "R T"]
  positions: Int[np.ndarray, "R T"]
  segments: Int[np.ndarray, "R T"]
  branches: Int[np.ndarray, "R T"]
  images: UInt8[np.ndarray, "R I H W 3"]
  image_index: Int[np.ndarray, "R T"]
  sequences: Int[np.ndarray, "R S L"]
  copies: Int[np.ndarray, "R T C"]
  loss_source: Int[np.ndarray, "R M"]
  loss_target: Int[np.ndarray, "R M"]
  loss_answer: Int[np.ndarray, "R M"]
  loss_weight: Float[np.ndarray, "R M"]
  pair_weight: Float[np.ndarray, "R Q"]
  reference: Float[np.ndarray, "R Q 2"]


@dataclasses.dataclass(frozen=True)
class Example:
  """One tokenized example. A token is a target iff its flag is set."""

  id: str
  prompt: Int[np.ndarray, "p"]
  prompt_targets: np.ndarray
  answers: tuple[np.ndarray, ...]
  answer_targets: tuple[np.ndarray, ...]
  image: UInt8[np.ndarray, "H W 3"] | None = None
  reference: tuple[float, float] | None = None


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


def length(example: Example, patches: int) -> int:
  """Returns the tokens an example takes in a row, its image expanded."""
  return _prompt_length(example, patches) + sum(map(len, example.answers))


def targets(example: Example) -> int:
  """Returns the number of loss positions an example takes.

  The first token of a sequence is never predicted; the targets of a prompt
  count once for each of its answers.
  """
  shared = int(example.prompt_targets[1:].sum())
  answers = sum(int(flags.sum()) for flags in example.answer_targets)
  return shared * max(1, len(example.answers)) + answers


def layout_for(
  updates: Sequence[Sequence[Example]],
  *,
  patches: int,
  image_size: int,
  shards: int = 1,
  row_tokens: int = 0,
  max_length: int = 2048,
) -> Layout:
  """Returns the smallest layout that holds each of the updates.

  `row_tokens` = 0 makes a row as long as the longest example, rounded up to a
  multiple of 8. Rows are a multiple of `shards` (devices times accumulation).
  Raises InputError for an example over `max_length`, image tokens included.
  """
  examples = [example for update in updates for example in update]
  if not examples:
    raise InputError("no examples to pack: the data is empty")
  for example in examples:
    check_length(example, patches, max_length)
  longest = max(length(example, patches) for example in examples)
  tokens = row_tokens or -(-longest // 8) * 8
  if tokens < longest:
    raise InputError(
      f"row_tokens={tokens} is shorter than the longest example ({longest} "
      "tokens with its image): raise row_tokens, or 0 to have it chosen"
    )
  packed = [
    (update, assign(update, patches=patches, tokens=tokens))
    for update in updates
  ]
  rows = max(len(bins) for _, bins in packed)
  every = [[update[i] for i in b] for update, bins in packed for b in bins]
  return Layout(
    rows=-(-rows // shards) * shards,
    examples=max(len(b) for b in every),
    tokens=tokens,
    images=max(sum(e.image is not None for e in b) for b in every),
    image_size=image_size,
    patches=patches,
    sequences=max(sum(max(1, len(e.answers)) for e in b) for b in every),
    sequence=max(
      _prompt_length(e, patches) + max(map(len, e.answers), default=0)
      for e in examples
    ),
    copies=max(max(1, len(e.answers)) for e in examples),
    losses=max(1, max(sum(targets(e) for e in b) for b in every)),
    pairs=max(sum(len(e.answers) == 2 for e in b) for b in every),
  )


def assign(
  examples: Sequence[Example], *, patches: int, tokens: int, limit: int = 0
) -> list[list[int]]:
  """Returns rows of example indices, first fit by decreasing length.

  Within a row the indices are in stream order. A row holds at most `limit`
  examples (0: as many as fit).
  """
  order = sorted(
    range(len(examples)), key=lambda i: (-length(examples[i], patches), i)
  )
  bins: list[list[int]] = []
  room: list[int] = []
  for index in order:
    size = length(examples[index], patches)
    fits = (
      b
      for b, free in enumerate(room)
      if free >= size and (not limit or len(bins[b]) < limit)
    )
    spot = next(fits, None)
    if spot is None:
      _check_fits(size, tokens, "tokens", examples[index].id)
      bins.append([])
      room.append(tokens)
      spot = len(bins) - 1
    bins[spot].append(index)
    room[spot] -= size
  return [sorted(bin_) for bin_ in bins]


def place(examples: Sequence[Example], layout: Layout) -> list[list[int]]:
  """Returns which examples each row of a layout holds, as `pack` does it."""
  return assign(
    examples,
    patches=layout.patches,
    tokens=layout.tokens,
    limit=layout.examples,
  )


def pack(
  examples: Sequence[Example],
  layout: Layout,
  *,
  sft_group: int = 0,
  pairs: int = 0,
  share: float = 1.0,
) -> Batch:
  """Returns one update as a Batch.

  `sft_group` = 2 gives the paper's weights, a token mean in each group of two
  examples in stream order and the mean over groups (paper 2.4); 0 one token
  mean over the update. `pairs` is the number of pairs of the whole update (0:
  count them here); each weighs 1/pairs. `share` scales the supervised weights
  where these examples are that share of an update.
  Raises InputError where the update does not fit the layout.
  """
  rows = place(examples, layout)
  if len(rows) > layout.rows:
    raise InputError(
      f"an update of {len(examples)} examples needs {len(rows)} rows of "
      f"{layout.tokens} tokens but the layout has {layout.rows}: set "
      "pack.tokens to 0 to have the layout chosen"
    )
  weights = [share * w for w in _sft_weights(examples, sft_group)]
  total = pairs or sum(len(example.answers) == 2 for example in examples)
  batch = empty(layout)
  for row, indices in enumerate(rows):
    members = [(examples[i], weights[i]) for i in indices]
    _fill_row(batch, row, members, layout, 1.0 / max(1, total))
  return batch


def pack_in_order(examples: Sequence[Example], layout: Layout) -> Batch:
  """Returns a batch with example i alone in row i, for generation."""
  batch = empty(layout)
  for row, example in enumerate(examples):
    size = length(example, layout.patches)
    _check_fits(size, layout.tokens, "tokens", example.id)
    _fill_row(batch, row, [(example, 0.0)], layout, 0.0)
  return batch


def _fill_row(batch, row, members, layout, pair_weight) -> None:
  """Writes the members of one row, one after the other."""
  cursor = _Cursor()
  for segment, (example, weight) in enumerate(members, 1):
    _check_fits(len(example.answers), layout.copies, "copies", example.id)
    start = cursor.token
    written = _write_prompt(batch, row, segment, example, layout, cursor)
    prompt_ids, prompt_flags = written
    prompt = np.arange(start, cursor.token)
    prompt_loss = np.flatnonzero(prompt_flags[1:]) + 1
    for branch in range(1, max(1, len(example.answers)) + 1):
      tokens, flags = _answer(example, branch)
      begin = cursor.token
      _write_answer(batch, row, segment, branch, tokens, len(prompt), cursor)
      sequence = np.concatenate([prompt, np.arange(begin, cursor.token)])
      _check_fits(cursor.sequence + 1, layout.sequences, "sequences")
      _check_fits(len(sequence), layout.sequence, "sequence")
      batch.sequences[row, cursor.sequence, : len(sequence)] = sequence
      places = cursor.sequence * layout.sequence + np.arange(len(sequence))
      batch.copies[row, prompt, branch - 1] = places[: len(prompt)]
      batch.copies[row, begin : cursor.token, 0] = places[len(prompt) :]
      ids = np.concatenate([prompt_ids, tokens])
      position = np.concatenate(
        [prompt_loss, len(prompt) + np.flatnonzero(flags)]
      ).astype(np.int64)
      position = position[position > 0]
      end = cursor.loss + len(position)
      _check_fits(end, layout.losses, "losses", example.id)
      span = slice(cursor.loss, end)
      batch.loss_source[row, span] = sequence[position - 1]
      batch.loss_target[row, span] = ids[position]
      batch.loss_answer[row, span] = cursor.sequence
      batch.loss_weight[row, span] = weight
      cursor.loss, cursor.sequence = end, cursor.sequence + 1
    if len(example.answers) == 2:
      # Answers 2q and 2q + 1 form pair q: a row holds pairs or single answers.
      pair = (cursor.sequence - 2) // 2
      _check_fits(pair + 1, layout.pairs, "pairs")
      batch.pair_weight[row, pair] = pair_weight
      if example.reference is not None:
        batch.reference[row, pair] = example.reference


@dataclasses.dataclass
class _Cursor:
  token: int = 0
  image: int = 0
  loss: int = 0
  sequence: int = 0


def _write_prompt(batch, row, segment, example, layout, cursor):
  """Writes the prompt with its image expanded; returns its ids and targets."""
  ids, flags, index = _expand(example, layout.patches)
  if (index >= 0).any():
    _check_fits(cursor.image + 1, layout.images, "images")
    batch.images[row, cursor.image] = example.image
    index = np.where(index >= 0, index + cursor.image * layout.patches, -1)
    cursor.image += 1
  span = slice(cursor.token, cursor.token + len(ids))
  batch.tokens[row, span] = ids
  batch.positions[row, span] = np.arange(len(ids))
  batch.segments[row, span] = segment
  batch.image_index[row, span] = index
  cursor.token += len(ids)
  return ids, flags


def _write_answer(batch, row, segment, branch, tokens, offset, cursor) -> None:
  span = slice(cursor.token, cursor.token + len(tokens))
  batch.tokens[row, span] = tokens
  batch.positions[row, span] = offset + np.arange(len(tokens))
  batch.segments[row, span] = segment
  batch.branches[row, span] = branch
  cursor.token += len(tokens)


def _expand(example: Example, patches: int):
  """Returns (ids, target flags, image index) with the image's patches in place.

  Image positions carry token 0: their embedding is never looked at.
  """
  spots = np.flatnonzero(example.prompt == IMAGE_TOKEN)
  images = int(example.image is not None)
  if len(spots) != images:
    raise InputError(
      f"row {example.id}: {len(spots)} <image> tags for {images} images; give "
      "one tag for one image"
    )
  if not images:
    index = np.full(len(example.prompt), -1)
    return example.prompt, example.prompt_targets, index
  at = int(spots[0])

  def around(values, filling):
    return np.concatenate([values[:at], filling, values[at + 1 :]])

  none = np.full(len(example.prompt), -1)
  return (
    around(example.prompt, np.zeros(patches, np.int64)),
    around(example.prompt_targets, np.zeros(patches, bool)),
    around(none, np.arange(patches)),
  )


def _answer(example: Example, branch: int):
  if not example.answers:
    return np.zeros(0, np.int64), np.zeros(0, bool)
  return example.answers[branch - 1], example.answer_targets[branch - 1]


def _sft_weights(examples, group) -> list[float]:
  """Returns the weight that each target token of an example has."""
  size = group or len(examples)
  groups = [examples[i : i + size] for i in range(0, len(examples), size)]
  weights = []
  for members in groups:
    tokens = sum(targets(example) for example in members)
    weights += [1.0 / (max(1, tokens) * len(groups))] * len(members)
  return weights


def empty(layout: Layout) -> Batch:
  """Returns a batch of padding."""
  rows, tokens = layout.rows, layout.tokens
  size = layout.image_size

  def ints(*shape, fill=0):
    return np.full((rows, *shape), fill, np.int32)

  def floats(*shape):
    return np.zeros((rows, *shape), np.float32)

  return Batch(
    tokens=ints(tokens),
    positions=ints(tokens),
    segments=ints(tokens),
    branches=ints(tokens),
    images=np.zeros((rows, layout.images, size, size, 3), np.uint8),
    image_index=ints(tokens, fill=-1),
    sequences=ints(layout.sequences, layout.sequence, fill=-1),
    copies=ints(tokens, layout.copies, fill=-1),
    loss_source=ints(layout.losses),
    loss_target=ints(layout.losses),
    loss_answer=ints(layout.losses, fill=-1),
    loss_weight=floats(layout.losses),
    pair_weight=floats(layout.pairs),
    reference=floats(layout.pairs, 2),
  )


def _check_fits(needed: int, have: int, name: str, example: str = "") -> None:
  if needed > have:
    holding = f" with {example}" if example else ""
    raise InputError(
      f"a row{holding} needs {needed} {name} but the layout has {have}: raise "
      "it in `pack`, or set pack.tokens to 0 to have the layout chosen"
    )


def check_length(example: Example, patches: int, limit: int) -> None:
  """Raises InputError if one of an example's sequences is over `limit`."""
  prompt = _prompt_length(example, patches)
  longest = prompt + max(map(len, example.answers), default=0)
  if longest > limit:
    raise InputError(
      f"row {example.id}: {longest} tokens ({prompt} of prompt and image) are "
      f"over max_length={limit}: shorten the row or raise max_length"
    )


def _prompt_length(example: Example, patches: int) -> int:
  image = int((example.prompt == IMAGE_TOKEN).sum())
  return len(example.prompt) + image * (patches - 1)
