"""The ends at which lines reach a terminal or a log.

Paths, names and messages are made of data in many places and come out at these
few. Here they become lines in which nothing acts on a terminal and none is
endless (`texts.shown`). What is drawn, as rows by `data show`, cleans its
pieces itself.
"""

import logging
import sys
from collections.abc import Iterable

from absl import logging as absl_logging

from pivot_jax import texts


class Formatter(logging.Formatter):
  """Formats a message as one line; an error's traceback keeps its lines."""

  def formatMessage(self, record: logging.LogRecord) -> str:
    """Return the line of a record."""
    return texts.shown(super().formatMessage(record))


def handler() -> logging.Handler:
  """Return what writes records to the terminal, a line each."""
  found = logging.StreamHandler(sys.stderr)
  found.setFormatter(Formatter("%(message)s"))
  return found


def log() -> None:
  """Show the project's own lines, and of libraries only warnings."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  own = logging.getLogger("pivot_jax")
  own.setLevel(logging.INFO)
  own.propagate = False
  own.addHandler(handler())


def show(lines: Iterable[str]) -> None:
  """Write lines to the output."""
  draw("".join(f"{texts.shown(line)}\n" for line in lines))


def draw(text: str) -> None:
  """Write text as it is; what the terminal's encoding lacks is escaped."""
  encoding = sys.stdout.encoding or "utf-8"
  sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


def complain(message: str) -> None:
  """Write why a command ends, in one line."""
  sys.stderr.write(texts.shown(" ".join(message.split())) + "\n")
  sys.stderr.flush()


def label(doing: str, name: str) -> str:
  """Return what a bar says of a file or a column that data names."""
  return f"{doing} {texts.shown(name, longest=60)}"
