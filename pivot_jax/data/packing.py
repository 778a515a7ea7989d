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
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from pivot_jax.data import layouts
from pivot_jax.errors import InputError

Layout = layouts.Layout

# The id that stands for an image in a prompt (the paper's code uses the same).
IMAGE_TOKEN = -200


class Batch(NamedTuple):
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

  Arrays are of numpy as packed and of jax once placed or traced: `Any`, since
  nothing that measures rows may load jax.
  """

  tokens: Int[Any, "R T"]
  positions: Int[Any, "R T"]
  segments: Int[Any, "R T"]
  branches: Int[Any, "R T"]
  images: UInt8[Any, "R I H W 3"]
  image_index: Int[Any, "R T"]
  sequences: Int[Any, "R S L"]
  copies: Int[Any, "R T C"]
  loss_source: Int[Any, "R M"]
  loss_target: Int[Any, "R M"]
  loss_answer: Int[Any, "R M"]
  loss_weight: Float[Any, "R M"]
  pair_weight: Float[Any, "R Q"]
  reference: Float[Any, "R Q 2"]


@dataclasses.dataclass(frozen=True)
class Example:
  """One tokenized example. A token is a target iff its flag is set.

  images: one for each `IMAGE_TOKEN`, in the prompt first. Only the answer of an
    example with a single one may hold such a token.
  paired: whether answers 2k (chosen) and 2k + 1 (rejected) form pairs.
  pair_ids: what each pair is called in the reference columns.
  reference: the log-probabilities of each pair's answers.
  void: it takes its place and has no weight: its image could not be read.
  """

  id: str
  prompt: Int[np.ndarray, "p"]
  prompt_targets: np.ndarray
  answers: tuple[np.ndarray, ...]
  answer_targets: tuple[np.ndarray, ...]
  images: tuple[UInt8[np.ndarray, "H W 3"], ...] = ()
  paired: bool = True
  pair_ids: tuple[str, ...] = ()
  reference: Any = None
  void: bool = False

  @property
  def pairs(self) -> int:
    return len(self.answers) // 2 if self.paired else 0


@dataclasses.dataclass(frozen=True)
class Work:
  """The content of an update, however it is laid out: the basis of rates.

  images: encoded once each. tokens: not padding, prompts counted once.
  pairs: of a token and one that it may look at. targets: positions of the loss.
  """

  images: int = 0
  tokens: int = 0
  pairs: int = 0
  targets: int = 0

  def times(self, factor: int) -> "Work":
    """Return that many times the work."""
    return Work(*(factor * x for x in dataclasses.astuple(self)))


def size(example: Example, patches: int) -> layouts.Size:
  """Return what an example takes in a row, its images expanded."""
  prompt = expanded(example.prompt, patches)
  answers = [expanded(answer, patches) for answer in example.answers]
  return layouts.Size(
    tokens=prompt + sum(answers),
    sequence=prompt + max(answers, default=0),
    images=len(example.images),
    answers=max(1, len(answers)),
    losses=targets(example),
    pairs=example.pairs,
  )


def length(example: Example, patches: int) -> int:
  """Return the tokens an example takes in a row, its images expanded."""
  return size(example, patches).tokens


def targets(example: Example) -> int:
  """Return the number of loss positions an example takes.

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
  """Return the smallest layout that holds each of the updates.

  See `layouts.layout_for`. Raises InputError for an example over `max_length`,
  image tokens included.
  """
  for update in updates:
    for example in update:
      check_length(example, patches, max_length)
  return layouts.layout_for(
    [[size(example, patches) for example in update] for update in updates],
    patches=patches,
    image_size=image_size,
    shards=shards,
    row_tokens=row_tokens,
  )


def place(examples: Sequence[Example], layout: Layout) -> list[list[int]]:
  """Return which examples each row of a layout holds, as `pack` does it."""
  sizes = [size(example, layout.patches) for example in examples]
  for example, one in zip(examples, sizes):
    _check_fits(one.tokens, layout.tokens, "tokens", example.id)
    _check_fits(one.images, layout.images, "images", example.id)
  return layouts.place(sizes, layout)


def pack(
  examples: Sequence[Example],
  layout: Layout,
  *,
  sft_group: int = 0,
  pairs: int = 0,
  targets: int = 0,
  share: float = 1.0,
) -> Batch:
  """Return one update as a Batch.

  `sft_group` = 2 gives the paper's weights, a token mean in each group of two
  examples in stream order and the mean over groups (paper 2.4); 0 one token
  mean over the update. Where these examples are a `share` of an update, its
  `pairs` and `targets` are given; 0 counts them here. Each pair weighs 1/pairs.
  Raises InputError where the update does not fit the layout.
  """
  rows = place(examples, layout)
  if len(rows) > layout.rows:
    raise InputError(
      f"an update of {len(examples)} examples needs {len(rows)} rows of "
      f"{layout.tokens} tokens but the layout has {layout.rows}: set "
      "pack.tokens to 0 to have the layout chosen"
    )
  weights = _sft_weights(examples, sft_group, targets, share)
  total = pairs or sum(example.pairs for example in examples)
  batch = empty(layout)
  for row, indices in enumerate(rows):
    members = [(examples[i], weights[i]) for i in indices]
    _fill_row(batch, row, members, layout, 1.0 / max(1, total))
  return batch


def pack_in_order(examples: Sequence[Example], layout: Layout) -> Batch:
  """Return a batch with example i alone in row i, for generation."""
  batch = empty(layout)
  for row, example in enumerate(examples):
    _check_fits(
      length(example, layout.patches), layout.tokens, "tokens", example.id
    )
    _fill_row(batch, row, [(example, 0.0)], layout, 0.0)
  return batch


def _fill_row(batch, row, members, layout, pair_weight) -> None:
  """Write the members of one row, one after the other."""
  cursor = _Cursor()
  for segment, (example, weight) in enumerate(members, 1):
    _check_fits(len(example.answers), layout.copies, "copies", example.id)
    _check_images(example)
    _write_images(batch, row, example, layout, cursor)
    start = cursor.token
    ids, flags = example.prompt, example.prompt_targets
    prompt = _write(batch, row, (segment, 0), ids, flags, 0, layout, cursor)
    spot = np.arange(start, cursor.token)
    answers = example.answers or (np.zeros(0, np.int64),)
    targets = example.answer_targets or (np.zeros(0, bool),)
    for branch, (ids, flags) in enumerate(zip(answers, targets), 1):
      begin, offset = cursor.token, len(spot)
      answer = _write(
        batch, row, (segment, branch), ids, flags, offset, layout, cursor
      )
      own = np.arange(begin, cursor.token)
      _list_sequence(batch, row, branch, spot, own, layout, cursor)
      sequence = np.concatenate([spot, own])
      _write_losses(
        batch, row, example, sequence, (prompt, answer), weight, layout, cursor
      )
      cursor.sequence += 1
    _write_pairs(batch, row, example, pair_weight, layout, cursor)


@dataclasses.dataclass
class _Cursor:
  token: int = 0
  images: int = 0  # Whose pixels are written.
  image: int = 0  # Whose place among the tokens is.
  loss: int = 0
  sequence: int = 0


def _check_images(example: Example) -> None:
  tags = [int((x == IMAGE_TOKEN).sum()) for x in example.answers]
  total = int((example.prompt == IMAGE_TOKEN).sum()) + sum(tags)
  if total != len(example.images):
    raise InputError(
      f"row {example.id}: {total} <image> tags for {len(example.images)} "
      "images; give one tag for one image"
    )
  if len(tags) > 1 and any(tags):
    raise InputError(
      f"row {example.id}: an <image> in one of {len(tags)} answers; images "
      "belong to the question they share"
    )


def _write_images(batch, row, example, layout, cursor) -> None:
  end = cursor.images + len(example.images)
  _check_fits(end, layout.images, "images", example.id)
  for picture in example.images:
    batch.images[row, cursor.images] = picture
    cursor.images += 1


def _write(batch, row, part, ids, flags, offset, layout, cursor):
  """Write the tokens of a prompt or an answer, its images expanded.

  Image positions carry token 0: their embedding is never looked at. Returns the
  ids and target flags as written.
  """
  patches = layout.patches
  spots = np.flatnonzero(ids == IMAGE_TOKEN)
  counts = np.where(ids == IMAGE_TOKEN, patches, 1)
  written = np.repeat(np.where(ids == IMAGE_TOKEN, 0, ids), counts)
  targets = np.repeat(np.where(ids == IMAGE_TOKEN, False, flags), counts)
  index = np.full(len(written), -1)
  begins = np.cumsum(counts) - counts
  for spot in begins[spots]:
    first = cursor.image * patches
    index[spot : spot + patches] = np.arange(first, first + patches)
    cursor.image += 1
  _check_fits(cursor.token + len(written), layout.tokens, "tokens")
  span = slice(cursor.token, cursor.token + len(written))
  batch.tokens[row, span] = written
  batch.positions[row, span] = offset + np.arange(len(written))
  batch.segments[row, span], batch.branches[row, span] = part
  batch.image_index[row, span] = index
  cursor.token += len(written)
  return written, targets


def _list_sequence(batch, row, branch, prompt, own, layout, cursor) -> None:
  """List a prompt and one answer as a causal sequence, both ways."""
  size = len(prompt) + len(own)
  _check_fits(cursor.sequence + 1, layout.sequences, "sequences")
  _check_fits(size, layout.sequence, "sequence")
  batch.sequences[row, cursor.sequence, :size] = np.r_[prompt, own]
  places = cursor.sequence * layout.sequence + np.arange(size)
  batch.copies[row, prompt, branch - 1] = places[: len(prompt)]
  batch.copies[row, own, 0] = places[len(prompt) :]


def _write_losses(
  batch, row, example, sequence, parts, weight, layout, cursor
) -> None:
  """Write what a sequence predicts; its first token is never predicted."""
  ids, flags = (np.concatenate(x) for x in zip(*parts))
  position = np.flatnonzero(flags)
  position = position[position > 0]
  end = cursor.loss + len(position)
  _check_fits(end, layout.losses, "losses", example.id)
  span = slice(cursor.loss, end)
  batch.loss_source[row, span] = sequence[position - 1]
  batch.loss_target[row, span] = ids[position]
  batch.loss_answer[row, span] = cursor.sequence
  batch.loss_weight[row, span] = weight
  cursor.loss = end


def _write_pairs(batch, row, example, pair_weight, layout, cursor) -> None:
  """Answers 2q and 2q + 1 form pair q: a row holds pairs or single answers."""
  if not example.pairs:
    return
  first = (cursor.sequence - len(example.answers)) // 2
  span = slice(first, first + example.pairs)
  _check_fits(span.stop, layout.pairs, "pairs")
  batch.pair_weight[row, span] = 0.0 if example.void else pair_weight
  if example.reference is not None:
    batch.reference[row, span] = np.reshape(example.reference, (-1, 2))


def _sft_weights(examples, group, total, share) -> list[float]:
  """Return the weight that each target token of an example has.

  A void one keeps its part in the means: its tokens count, and weigh nothing.
  """
  counts = [targets(example) for example in examples]
  if not group:
    one = 1.0 / total if total else share / max(1, sum(counts))
    return [0.0 if example.void else one for example in examples]
  groups = [range(i, i + group) for i in range(0, len(examples), group)]
  weights = []
  for members in groups:
    held = [i for i in members if i < len(examples)]
    tokens = max(1, sum(counts[i] for i in held))
    weights += [
      0.0 if examples[i].void else share / (tokens * len(groups)) for i in held
    ]
  return weights


def empty(layout: Layout) -> Batch:
  """Return a batch of padding."""
  rows, tokens = layout.rows, layout.tokens
  size = layout.image_size

  def ints(*shape: int, fill: int = 0) -> np.ndarray:
    return np.full((rows, *shape), fill, np.int32)

  def floats(*shape: int) -> np.ndarray:
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
  """Raise InputError if one of an example's sequences is over `limit`."""
  prompt = expanded(example.prompt, patches)
  longest = size(example, patches).sequence
  if longest > limit:
    raise InputError(
      f"row {example.id}: {longest} tokens ({prompt} of prompt and image) are "
      f"over max_length={limit}: shorten the row or raise max_length"
    )


def expanded(tokens: np.ndarray, patches: int) -> int:
  """Return how many tokens these are with their images expanded."""
  return len(tokens) + int((tokens == IMAGE_TOKEN).sum()) * (patches - 1)


def count_work(batch: Batch, patches: int) -> Work:
  """Return the content of a batch of host arrays, without its padding."""
  present = batch.segments > 0
  return Work(
    images=int((batch.image_index >= 0).sum()) // patches,
    tokens=int(present.sum()),
    # A token sees itself and as many before it as its position says.
    pairs=int(((batch.positions + 1) * present).sum()),
    targets=int((batch.loss_answer >= 0).sum()),
  )
