"""The share of padding in packed rows, on lengths like MMPR's.

  python -m bench.padding

Sizes are drawn, and examples of them packed by the package's own code, whose
batches are then counted: tokens, image slots, loss slots, and the sequences
that attention looks at. Nothing runs on a device.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from bench import results, verdict
from bench.data import files
from pivot_jax.data import layouts, packing

PAIRS, BATCH, PATCHES = 20_000, 256, 576
ROWS = (8192, 16384, 32768)
# Tokens on average, question and template together, and the spread of logs.
PROMPT, CHOSEN, REJECTED, SPREAD = 91, 280, 309, 0.6
TEXT_ONLY, MAX_LENGTH = 0.1, 2048
TOKENS_LIMIT, IMAGES_LIMIT = 8.0, 10.0
KINDS = ("tokens", "images", "losses", "sequences", "squares")

Examples = list[packing.Example]


@dataclasses.dataclass(frozen=True)
class Row:
  """A set of examples in rows of at most `asked` tokens.

  padding: percent of tokens, image slots, loss slots and tokens of sequences
    that hold nothing; of "squares", the lengths of sequences squared.
  shapes: different shapes that the updates have, each of which is compiled.
  longest: tokens of the longest example; seconds: of finding the layout.
  """

  name: str
  asked: int
  layout: dict[str, int]
  updates: int
  padding: dict[str, float]
  shapes: int
  longest: int
  seconds: float


def pairs(count: int, *, text_only: float = 0.0) -> Examples:
  """Return preference pairs, one on an image; a share has no image."""
  rng = np.random.default_rng(0)
  prompts, chosen, rejected = (
    files.lengths(rng, mean, SPREAD, count)
    for mean in (PROMPT, CHOSEN, REJECTED)
  )
  seen = rng.random(count) >= text_only
  rows = zip(prompts.tolist(), chosen.tolist(), rejected.tolist(), seen)
  return [example(p, (c, r), image=bool(i)) for p, c, r, i in rows]


def groups(count: int, most: int = 4) -> Examples:
  """Return as many pairs, 1 to `most` of them on an image and question."""
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, most + 1, count)
  sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), count)) + 1]
  prompts = files.lengths(rng, PROMPT, SPREAD, len(sizes))
  answers = np.stack(
    [
      files.lengths(rng, mean, SPREAD, int(sizes.sum()))
      for mean in (CHOSEN, REJECTED)
    ],
    axis=1,
  )
  ends = np.cumsum(sizes)
  return [
    example(int(prompt), tuple(answers[end - size : end].ravel().tolist()))
    for prompt, size, end in zip(prompts, sizes, ends)
  ]


def conversations(count: int, *, text_only: float = 0.0) -> Examples:
  """Return the pairs' questions and chosen answers, as SFT sees them."""
  return [
    dataclasses.replace(
      one,
      answers=one.answers[:1],
      answer_targets=one.answer_targets[:1],
      paired=False,
    )
    for one in pairs(count, text_only=text_only)
  ]


def example(
  prompt: int, answers: Sequence[int], *, image: bool = True
) -> packing.Example:
  """Return an example of so many tokens, all of its answers targets."""
  tokens = np.ones(prompt, np.int32)
  shown: tuple[np.ndarray, ...] = ()
  if image:
    tokens = np.r_[np.int32(packing.IMAGE_TOKEN), tokens]
    shown = (np.zeros((1, 1, 3), np.uint8),)
  return packing.Example(
    id="drawn",
    prompt=tokens,
    prompt_targets=np.zeros(len(tokens), bool),
    answers=tuple(np.ones(length, np.int32) for length in answers),
    answer_targets=tuple(np.ones(length, bool) for length in answers),
    images=shown,
  )


def short(count: int) -> Examples:
  """Return the pairs whose sequences have at most `MAX_LENGTH` tokens."""
  return [
    one
    for one in pairs(count)
    if packing.size(one, PATCHES).sequence <= MAX_LENGTH
  ]


SETS: dict[str, Callable[[int], Examples]] = {
  "pairs": pairs,
  "pairs of at most 2048": short,
  "1–4 pairs on an image": groups,
  "pairs, 10 % text-only": lambda count: pairs(count, text_only=TEXT_ONLY),
  "SFT": conversations,
  "SFT, 10 % text-only": lambda count: conversations(
    count, text_only=TEXT_ONLY
  ),
}


def measure(name: str, examples: Examples, asked: int, batch: int) -> Row:
  """Lay whole updates out, pack them all and count what they hold."""
  count = max(1, len(examples) // batch)
  updates = [examples[i * batch : (i + 1) * batch] for i in range(count)]
  began = time.perf_counter()
  layout = layouts.layout_for(
    [[packing.size(one, PATCHES) for one in update] for update in updates],
    patches=PATCHES,
    image_size=1,
    row_tokens=asked,
  )
  seconds = time.perf_counter() - began
  held = dict.fromkeys(KINDS, 0)
  slots = dict(held)
  shapes = set()
  for update in updates:
    made = packing.pack(update, layout, sft_group=0)
    shapes.add(tuple(leaf.shape for leaf in jax.tree.leaves(made)))
    for kind, (have, room) in _count(made).items():
      held[kind] += have
      slots[kind] += room
  return Row(
    name=name,
    asked=asked,
    layout=dataclasses.asdict(layout),
    updates=len(updates),
    padding={k: 100 * (1 - held[k] / slots[k]) for k in held},
    shapes=len(shapes),
    longest=max(packing.length(one, PATCHES) for one in examples),
    seconds=seconds,
  )


def _count(batch: packing.Batch) -> dict[str, tuple[int, int]]:
  """Return filled and available places of a batch, by kind."""
  lengths = (batch.sequences >= 0).sum(axis=-1).astype(np.int64)
  longest = batch.sequences.shape[-1]
  shown = int((batch.image_index >= 0).sum()) // PATCHES
  return {
    "tokens": (int((batch.segments > 0).sum()), batch.segments.size),
    "images": (shown, batch.images.shape[0] * batch.images.shape[1]),
    "losses": (int((batch.loss_answer >= 0).sum()), batch.loss_answer.size),
    "sequences": (int(lengths.sum()), lengths.size * longest),
    "squares": (int((lengths**2).sum()), lengths.size * longest**2),
  }


def table(rows: Sequence[Row]) -> str:
  """Return the rows as a Markdown table."""
  head = ["set", "tokens asked", "rows of tokens", "images", "sequences"]
  head += ["shapes", "empty: tokens", *KINDS[1:], "layout, s"]
  lines = [
    [
      row.name,
      row.asked,
      f"{row.layout['rows']} of {row.layout['tokens']}",
      row.layout["images"],
      f"{row.layout['sequences']} of {row.layout['sequence']}",
      row.shapes,
      *[f"{x:.1f} %" for x in row.padding.values()],
      f"{row.seconds:.1f}",
    ]
    for row in rows
  ]
  return verdict.markdown([head, *lines])


def goals(rows: Sequence[Row]) -> list[str]:
  """Return a line for the worst of each goal."""
  lines = []
  for kind, limit in (("tokens", TOKENS_LIMIT), ("images", IMAGES_LIMIT)):
    worst = max(rows, key=lambda row: row.padding[kind])
    said = f"% of {kind} empty at worst ({worst.name} at {worst.asked})"
    lines.append(verdict.goal(said, worst.padding[kind], limit, least=False))
  shapes = max(row.shapes for row in rows)
  return [*lines, verdict.goal("shapes of a set", shapes, 1, least=False)]


def main() -> None:
  """Pack every set at every width and write padding.md and padding.json."""
  parser = argparse.ArgumentParser(prog="python -m bench.padding")
  parser.add_argument("--out", type=pathlib.Path, default="bench/results")
  parser.add_argument("--pairs", type=int, default=PAIRS)
  flags = parser.parse_args()
  report = results.Report(
    results.command("padding", flags, {"pairs": PAIRS}),
    software=results.versions(("numpy",)),
  )
  rows = []
  for name, make in SETS.items():
    examples = make(flags.pairs)
    for asked in ROWS:
      rows.append(measure(name, examples, asked, BATCH))
      print(table(rows[-1:]).splitlines()[-1], flush=True)
  report.publish(
    flags.out,
    "padding",
    table(rows),
    "\n".join(goals(rows)),
    f"{flags.pairs:,} pairs in updates of {BATCH} examples, of log-normal"
    f" lengths (sigma {SPREAD}): {PROMPT} tokens of question and template,"
    f" {CHOSEN} and {REJECTED} of answers, {PATCHES} of an image; SFT has the"
    " chosen answers alone. *Sequences* is how many prompts with one answer a"
    " row has room for, and for how many tokens each; of these tokens a share"
    " is empty, and of their squares, which attention costs where it does not"
    " look at lengths.",
    pairs=flags.pairs,
    batch=BATCH,
    rows=[dataclasses.asdict(row) for row in rows],
  )


if __name__ == "__main__":
  main()
