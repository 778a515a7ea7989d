"""Texts that come from outside: one form to compare, one to show.

Compared in canonical composition (NFC): the same letters have several spellings
in Unicode, macOS decomposes the names of files, and corpora of Korean or
Vietnamese decompose answers. Not for what must stay bytes: digests, ids that
rows are stored by, paths that are opened.

Shown with every control character spelt out: a name out of a file could
otherwise move the cursor, clear the screen or give a line that is not the
program's.
"""

import re
import unicodedata

# Characters of a line that is shown; the middle of a longer one is left out.
LONGEST_LINE = 2000
# Markdown shows such a word as it is, and makes no link of it.
_WORD = re.compile(r"(?!www\.)(?=.{1,60}$)[A-Za-z0-9]+([._-][A-Za-z0-9]+)*")
# Controls, formats (among them those that turn the direction of text), private
# and unassigned characters, and the separators of lines.
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def canonical(text: str) -> str:
  """Return a text in NFC, in which equal texts have equal characters."""
  return unicodedata.normalize("NFC", text)


def shown(text: str, *, longest: int = LONGEST_LINE) -> str:
  r"""Return a text as one line that a terminal shows and does not obey.

  Characters that are not shown are spelt as Python spells them (`\x1b`,
  `\u202e`, `\n`). Of a text of more than `longest` characters the middle is
  left out, and how much of it is said.
  """
  text = shortened(text, longest=longest)
  if text.isprintable():
    return text
  return "".join(_spelt(x) for x in text)


def shortened(text: str, *, longest: int = LONGEST_LINE) -> str:
  """Return a text without the middle of what is over `longest` characters."""
  if len(text) <= longest:
    return text
  kept = longest // 2
  gone = len(text) - 2 * kept
  return f"{text[:kept]} [{gone} characters left out] {text[-kept:]}"


def markdown(text: str) -> str:
  """Return a text in Markdown: a word as it is, any other as code."""
  return text if _WORD.fullmatch(text) else code_span(text)


def code_span(text: str, *, longest: int = 200) -> str:
  """Return a text as Markdown shows it in code: nothing in it is markup.

  The fence is longer than any of the text's own backticks. Bars are replaced,
  which would end the cell of a table even there.
  """
  line = shown(text, longest=longest).replace("|", "\N{BROKEN BAR}")
  runs = re.findall("`+", line)
  fence = "`" * (1 + max(map(len, runs), default=0))
  # A space is taken off both ends of what begins or ends with one.
  edge = " " if line[:1] in ("`", " ") or line[-1:] in ("`", " ") else ""
  return f"{fence}{edge}{line or '-'}{edge}{fence}"


def _spelt(character: str) -> str:
  if character == " " or unicodedata.category(character) not in _HIDDEN:
    return character
  return character.encode("unicode_escape").decode("ascii")
