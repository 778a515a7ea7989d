"""Shows rows of data files as the model sees them: pictures, tokens, targets.

  python -m pivot_jax.data show train.jsonl --images=DIR --tokenizer=hf:DIR
  python -m pivot_jax.data show train.jsonl --first --n=20 --html=rows.html

What is shown is encoded by the code that trains. The status is 1 if a row could
not be read or encoded; such a row is shown with its error.
"""

import argparse
import os
import pathlib
import random
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pivot_jax import addresses, files
from pivot_jax.data import chat, opener
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.data.tools import shown_page, shown_rows, shown_text
from pivot_jax.errors import InputError


class Choice(NamedTuple):
  """Which rows of a file are shown: those named, the first, or any `count`."""

  count: int
  first: bool
  seed: int
  rows: tuple[int, ...]


class Opened(NamedTuple):
  """A file, what it holds, and which of its rows are shown."""

  path: str
  kind: str
  source: Any
  rows: Sequence[int]

  @property
  def about(self) -> str:
    return f"{self.kind}, {len(self.rows)} of {len(self.source)} rows"

  def look(self, style: shown_rows.Style) -> Iterator[shown_rows.Shown]:
    """Yield the rows that are shown, each as it is read."""
    for index in self.rows:
      yield shown_rows.look(self.source, index, style)


def main(argv: Sequence[str]) -> int:
  """Show rows of the files that `argv` names; returns the exit status.

  Raises:
    InputError: a file, tokenizer or row that is not there.
  """
  given = _parser().parse_args(argv)
  if given.html is not None:
    files.local_path(given.html, "--html")
  folder = addresses.tokenizer_folder(given.tokenizer)
  style = shown_rows.Style(
    tokenizer=load_tokenizer(folder),
    template=given.template,
    mask=given.mask,
    objective=given.objective,
    image_tokens=given.image_tokens,
  )
  choice = Choice(given.n, given.first, given.seed, tuple(given.row))
  opened = [_open(path, given.images, choice) for path in given.files]
  said = settings(given.tokenizer, style)
  if given.html is not None:
    return _write_page(given.html, said, opened, style)
  look = terminal(given.color, os.environ, is_terminal=sys.stdout.isatty())
  _say(f"{said}\n{shown_text.legend(look)}\n")
  bad = 0
  for file in opened:
    _say(f"\n{shown_rows.one_line(file.path)}: {file.about}\n")
    for shown in file.look(style):
      _say("\n" + shown_text.row(shown, look))
      bad += bool(shown.errors)
  return 1 if bad else 0


def choose(source: Any, choice: Choice, path: str) -> list[int]:
  """Return the indices of the rows to show, in order.

  Raises:
    InputError: a row that the file does not have.
  """
  size = len(source)
  absent = [row for row in choice.rows if not 0 <= row < size]
  if absent:
    raise InputError(
      f"{path}: has no row {absent[0]}; give 0 to {size - 1}, counted from 0"
    )
  if choice.rows:
    return list(choice.rows)
  count = min(choice.count, size)
  if choice.first:
    return list(range(count))
  return sorted(random.Random(choice.seed).sample(range(size), count))


def terminal(
  colour: bool | None, environment: Mapping[str, str], *, is_terminal: bool
) -> shown_text.Look:
  """Return how to draw; None for `colour` asks the terminal."""
  if colour is None:
    plain = environment.get("NO_COLOR") or environment.get("TERM") == "dumb"
    colour = is_terminal and not plain
  has_24_bits = environment.get("COLORTERM") in ("truecolor", "24bit")
  return shown_text.Look(
    columns=max(20, shutil.get_terminal_size().columns),
    colour=colour,
    pictures=colour and has_24_bits,
  )


def settings(address: str, style: shown_rows.Style) -> str:
  """Return in words how the rows are encoded."""
  return (
    f"tokenizer {address} ({style.tokenizer.vocab_size} tokens), template"
    f" {style.template}, mask {style.mask}, objective"
    f" {style.objective or 'by kind of row'}, {style.image_tokens} tokens an"
    " image"
  )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m pivot_jax.data show",
    description="Shows rows as the model sees them: pictures, tokens, targets.",
  )
  add = parser.add_argument
  add("files", nargs="+", metavar="FILE", help="data files or folders")
  add("--n", type=_count, default=5, help="rows of each file (5)")
  which = parser.add_mutually_exclusive_group().add_argument
  which("--seed", type=int, default=0, help="of the choice of rows (0)")
  which("--first", action="store_true", help="the first rows, not any")
  which(
    "--row",
    type=int,
    action="append",
    default=[],
    metavar="N",
    help="this row, counted from 0; may be given again",
  )
  add("--images", metavar="DIR", help="the folder that image paths are in")
  add(
    "--tokenizer",
    default="package:toy",
    metavar="ADDRESS",
    help="folder or address of the language model's tokenizer (package:toy)",
  )
  add("--template", choices=chat.TEMPLATES, default="qwen_1_5")
  add("--mask", choices=chat.MASKS, default="paper")
  add(
    "--objective",
    choices=shown_rows.OBJECTIVES,
    help="dpo for rows with a rejected answer and sft for others, if not given",
  )
  add(
    "--image-tokens",
    type=_count,
    default=576,
    metavar="N",
    help="tokens that an image takes, for the counts (576)",
  )
  add("--html", type=pathlib.Path, metavar="OUT", help="write a page instead")
  add("--color", action=argparse.BooleanOptionalAction, help="on terminals")
  return parser


def _count(text: str) -> int:
  number = int(text)
  if number < 1:
    raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
  return number


def _open(path: str, images: str | None, choice: Choice) -> Opened:
  source = opener.open_path(path, image_root=images, flawed=True)
  return Opened(path, source.kind, source, choose(source, choice, path))


def _write_page(
  path: pathlib.Path,
  said: str,
  opened: Sequence[Opened],
  style: shown_rows.Style,
) -> int:
  count, bad, sections = 0, 0, []
  for file in opened:
    found = list(file.look(style))
    count, bad = count + len(found), bad + sum(bool(r.errors) for r in found)
    sections.append(shown_page.section(file.path, file.about, found))
  try:
    path.write_text(shown_page.page(said, sections), "utf-8")
  except OSError as error:
    raise InputError(f"--html={path}: {error.strerror}") from None
  _say(f"{path}: {count} rows, {bad} with an error\n")
  return 1 if bad else 0


def _say(text: str) -> None:
  """Write text; what the terminal's encoding lacks is escaped."""
  encoding = sys.stdout.encoding or "utf-8"
  sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
