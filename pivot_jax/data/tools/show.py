"""Shows rows of data files as the model sees them: pictures, tokens, targets.

  python -m pivot_jax.data show train.jsonl --images=DIR --tokenizer=hf:DIR
  python -m pivot_jax.data show train.jsonl --first --n=20 --html=rows.html

Rows are encoded by the code that trains (`shown_rows.py`). They are drawn here
for a terminal, or on a page (`shown_page.py`). Without colour a line of marks
below the text says where each token starts and whether it is learnt; with
colour, green bold tokens are learnt and every other token is underlined. The
status is 1 if a row could not be read or encoded; it is shown with its error.
"""

import argparse
import os
import pathlib
import random
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pivot_jax import addresses, files, output, texts
from pivot_jax.data import chat, opener, rows
from pivot_jax.data.scenes import scenes
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.data.tools import shown_page, shown_rows
from pivot_jax.errors import InputError

PICTURE = (40, 48)  # columns and half-lines that a picture may take
_RESET = "\x1b[0m"
_LEARNT, _READ, _SPECIAL, _EDGE = "1;32", "2", "7", "4"
_ERROR, _HEAD = "1;31", "1"


class Look(NamedTuple):
  """The abilities of a terminal; `pictures` needs 24-bit colour."""

  columns: int = 80
  colour: bool = False
  pictures: bool = False


class _Cell(NamedTuple):
  """A character with its token's number; `first` where a token starts."""

  text: str
  columns: int
  number: int
  first: bool


class Choice(NamedTuple):
  """The rows of a file to show: those named, the first, or any `count`."""

  count: int
  first: bool
  seed: int
  rows: tuple[int, ...]


class Opened(NamedTuple):
  """A file, the kind of its rows, and the indices of those to show."""

  path: str
  kind: str
  source: rows.Source
  rows: Sequence[int]

  @property
  def about(self) -> str:
    return f"{self.kind}, {len(self.rows)} of {len(self.source)} rows"

  def look(self, style: shown_rows.Style) -> Iterator[shown_rows.Shown]:
    """Yield the rows that are shown, each as it is read."""
    for index in self.rows:
      yield shown_rows.look(self.source, index, style)


def main(argv: Sequence[str]) -> int:
  """Show rows of the files that `argv` names; return the exit status.

  Raises:
    InputError: a file, tokenizer or row that is not there.
  """
  args = _parser().parse_args(argv)
  if args.html is not None:
    files.local_path(args.html, "--html")
  folder = addresses.tokenizer_folder(args.tokenizer)
  style = shown_rows.Style(
    tokenizer=load_tokenizer(folder),
    template=args.template,
    mask=args.mask,
    objective=args.objective,
    image_tokens=args.image_tokens,
  )
  choice = Choice(args.n, args.first, args.seed, tuple(args.row))
  opened = [_open(path, args.images, choice) for path in args.files]
  said = settings(args.tokenizer, style)
  if args.html is not None:
    return _write_page(args.html, said, opened, style)
  look = terminal(args.color, os.environ, is_terminal=sys.stdout.isatty())
  output.draw(f"{texts.shown(said)}\n{legend(look)}\n")
  bad = 0
  for file in opened:
    output.draw(f"\n{_line(file.path)}: {file.about}\n")
    for shown in file.look(style):
      output.draw("\n" + draw_row(shown, look))
      bad += bool(shown.errors)
  return 1 if bad else 0


def choose(source: rows.Source, choice: Choice, path: str) -> list[int]:
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
) -> Look:
  """Return how to draw; None for `colour` asks the terminal."""
  if colour is None:
    plain = environment.get("NO_COLOR") or environment.get("TERM") == "dumb"
    colour = is_terminal and not plain
  has_24_bits = environment.get("COLORTERM") in ("truecolor", "24bit")
  return Look(
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
    default=scenes.TOKENIZER,
    metavar="ADDRESS",
    help="folder or address of the language model's tokenizer (%(default)s)",
  )
  add("--template", choices=chat.TEMPLATES, default="qwen_1_5")
  add("--mask", choices=chat.MASKS, default="paper")
  add(
    "--objective",
    metavar="NAME",
    help="an objective of training, as sft or dpo; dpo for rows with a rejected answer and sft for others, if not set",
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
    files.write_text(path, shown_page.page(said, sections))
  except OSError as error:
    raise InputError(f"--html={path}: {error.strerror}") from None
  output.show([f"{path}: {count} rows, {bad} with an error"])
  return 1 if bad else 0


def legend(look: Look) -> str:
  """Return the meaning of the marks or the colours."""
  marks = "^~~ a token that is learnt, .   one that is only read"
  if look.colour:
    learnt, read = _paint("learnt", _LEARNT), _paint("only read", _READ)
    special = _paint("special", f"{_LEARNT};{_SPECIAL}")
    marks = f"{learnt} {special} {read}, every other token underlined"
  return (
    f"{marks}, {shown_rows.NEWLINE} a newline;"
    " the first token of a row is never predicted"
  )


def draw_row(shown: shown_rows.Shown, look: Look) -> str:
  """Return a row as text that ends in a newline."""
  name = _line(shown.name)
  lines = [_styled(f"== {name}", _HEAD, look)]
  if shown.id:
    lines.append(f"id {_line(shown.id)}")
  lines += [
    _styled(f"error: {_line(error)}", _ERROR, look) for error in shown.errors
  ]
  for picture in shown.pictures:
    lines.append(_line(picture.caption))
    if look.pictures:
      lines += half_blocks(picture.pixels)
  if shown.parts:
    lines.append(counts(shown))
  for part in shown.parts:
    lines.append(_styled(f"-- {part.title}", _HEAD, look))
    lines += draw(part.tokens, look)
  lines += [
    f"{_line(name)}: {shown_rows.one_line(text)}" for name, text in shown.fields
  ]
  return "\n".join(lines) + "\n"


def _line(text: str) -> str:
  return shown_rows.one_line(texts.shortened(text))


def counts(shown: shown_rows.Shown) -> str:
  """Return the sizes of a row's parts in words."""
  parts = ", ".join(
    f"{part.title} {part.length} tokens ({part.targets} learnt)"
    for part in shown.parts
  )
  return f"{parts}; {shown.size}"


def draw(tokens: Sequence[shown_rows.Token], look: Look) -> list[str]:
  """Return the lines of a text in tokens, with marks where no colour is."""
  lines = []
  for cells in _wrap(tokens, look.columns):
    if look.colour:
      lines.append("".join(_paint_cells(cells, tokens)))
      continue
    lines.append("".join(cell.text for cell in cells))
    lines.append("".join(_marks(cells, tokens)).rstrip())
  return lines


def half_blocks(pixels: UInt8[np.ndarray, "H W 3"]) -> list[str]:
  """Return a small picture of upper half blocks, two pixels a character."""
  height, width = pixels.shape[:2]
  scale = min(PICTURE[0] / width, PICTURE[1] / height)
  size = (max(1, round(width * scale)), 2 * max(1, round(height * scale / 2)))
  small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
  return [
    "".join(
      f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀"
      for a, b in zip(upper, lower)
    )
    + _RESET
    for upper, lower in zip(small[::2].tolist(), small[1::2].tolist())
  ]


def _wrap(
  tokens: Sequence[shown_rows.Token], columns: int
) -> Iterable[list[_Cell]]:
  """Yield lines of cells; a token is broken only where it is a whole line."""
  line: list[_Cell] = []
  used = 0
  for number, token in enumerate(tokens):
    cells = _cells(token.text, number)
    size = sum(cell.columns for cell in cells)
    if line and used + size > columns >= size:
      yield line
      line, used = [], 0
    for cell in cells:
      if cell.text == "\n" or (line and used + cell.columns > columns):
        yield line
        line, used = [], 0
      if cell.text != "\n":
        line.append(cell)
        used += cell.columns
  if line:
    yield line


def _cells(text: str, number: int) -> list[_Cell]:
  return [
    _Cell(c, 0 if c == "\n" else shown_rows.width(c), number, not i)
    for i, c in enumerate(shown_rows.visible(text))
  ]


def _marks(
  cells: Sequence[_Cell], tokens: Sequence[shown_rows.Token]
) -> Iterable[str]:
  for cell in cells:
    target = tokens[cell.number].target
    rest = "~" if target else " "
    first = ("^" if target else ".") if cell.first else rest
    yield (first + rest)[: cell.columns]


def _paint_cells(
  cells: Sequence[_Cell], tokens: Sequence[shown_rows.Token]
) -> Iterable[str]:
  """Yield the pieces of a line, one a token."""
  for number in dict.fromkeys(cell.number for cell in cells):
    token = tokens[number]
    text = "".join(cell.text for cell in cells if cell.number == number)
    codes = [_LEARNT if token.target else _READ]
    if token.special:
      codes.append(_SPECIAL)
    elif number % 2:
      codes.append(_EDGE)
    yield _paint(text, ";".join(codes))


def _styled(text: str, codes: str, look: Look) -> str:
  return _paint(text, codes) if look.colour else text


def _paint(text: str, codes: str) -> str:
  return f"\x1b[{codes}m{text}{_RESET}"
