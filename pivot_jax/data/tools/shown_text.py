"""Shown rows as lines for a terminal or a file: tokens, marks, small pictures.

Without colour a line of marks below the text says where each token starts and
whether it is learnt; with colour, green bold tokens are learnt and every other
token is underlined. Pure functions from rows to text; nothing is written here.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pivot_jax.data.tools import shown_rows

PICTURE = (40, 48)  # columns and half-lines that a picture may take
_RESET = "\x1b[0m"
_LEARNT, _READ, _SPECIAL, _EDGE = "1;32", "2", "7", "4"
_ERROR, _HEAD = "1;31", "1"


class Look(NamedTuple):
  """What the terminal can do; `pictures` needs 24-bit colour."""

  columns: int = 80
  colour: bool = False
  pictures: bool = False


class _Cell(NamedTuple):
  """A character with its token's number; `first` where a token starts."""

  text: str
  columns: int
  number: int
  first: bool


def legend(look: Look) -> str:
  """Return what the marks or the colours mean."""
  marks = "^~~ a token that is learnt, .   one that is only read"
  if look.colour:
    learnt, read = _paint("learnt", _LEARNT), _paint("only read", _READ)
    special = _paint("special", f"{_LEARNT};{_SPECIAL}")
    marks = f"{learnt} {special} {read}, every other token underlined"
  return (
    f"{marks}, {shown_rows.NEWLINE} a newline;"
    " the first token of a row is never predicted"
  )


def row(shown: shown_rows.Shown, look: Look) -> str:
  """Return a row as text that ends in a newline."""
  name = shown_rows.one_line(shown.name)
  lines = [_styled(f"== {name}", _HEAD, look)]
  if shown.id:
    lines.append(f"id {shown_rows.one_line(shown.id)}")
  lines += [
    _styled(f"error: {shown_rows.one_line(error)}", _ERROR, look)
    for error in shown.errors
  ]
  for picture in shown.pictures:
    lines.append(shown_rows.one_line(picture.caption))
    if look.pictures:
      lines += half_blocks(picture.pixels)
  if shown.parts:
    lines.append(counts(shown))
  for part in shown.parts:
    lines.append(_styled(f"-- {part.title}", _HEAD, look))
    lines += draw(part.tokens, look)
  lines += [
    f"{shown_rows.one_line(name)}: {shown_rows.one_line(text)}"
    for name, text in shown.fields
  ]
  return "\n".join(lines) + "\n"


def counts(shown: shown_rows.Shown) -> str:
  """Return the sizes of a row's parts in words."""
  parts = ", ".join(
    f"{part.title} {part.length} tokens ({part.targets} learnt)"
    for part in shown.parts
  )
  return f"{parts}; {total(shown)}"


def total(shown: shown_rows.Shown) -> str:
  """Return the size of a row in words."""
  images = sum(part.images for part in shown.parts)
  plural = "" if images == 1 else "s"
  return f"{shown.length} tokens with {images} image{plural}"


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
