"""Read the flags of a command: help, wrong ones, words that are no flags.

absl lists the flags of the main module alone, ends with 1 after --help and
ignores words that stand alone; a user gets each of these as the other commands
of this package have it. A mistake is one line and exit code 2.
"""

import difflib
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import NoReturn

from absl import flags

from pivot_jax import output
from pivot_jax.errors import InputError

EXIT_INPUT = 2
_HELP = ("-h", "-help", "--help", "-?", "--helpshort")
# What flags and settings of a recipe raise where a word does not fit.
_REFUSALS = (flags.Error, AttributeError, LookupError, TypeError, ValueError)


def read(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
  """Set flags from a command line; return the words that are no flags.

  Raises:
    InputError: a flag or its value is wrong.
  """
  try:
    return values(list(argv))[1:]
  except _REFUSALS as error:
    raise InputError(_said(error)) from error


def parse(argv: Sequence[str], *, missing: Mapping[str, str]) -> list[str]:
  """Set the flags of a command and return its name.

  Args:
    argv: the command line, the command's name first.
    missing: what to say of each flag that has to be given.

  Raises:
    InputError: one is wrong or missing.
  """
  given = _given(argv)
  absent = [text for name, text in missing.items() if name not in given]
  # First of all: without a recipe no setting is known.
  if absent:
    raise InputError("; ".join(absent))
  stray = read(argv, flags.FLAGS)
  if stray:
    raise InputError(_said_of_stray(stray[0]))
  return list(argv[:1])


def answer_help(argv: Sequence[str], text: str, names: Sequence[str]) -> None:
  """Write a text and the flags of these names, and leave, if help is asked."""
  if not set(_HELP) & set(argv[1:]):
    return
  lines = [text.strip(), "", "flags:"]
  for name in names:
    flag = flags.FLAGS[name]
    shown = f"--[no]{name}" if flag.boolean else f"--{name}=VALUE"
    default = f" ({flag.default})" if flag.default else ""
    lines.append(
      textwrap.fill(
        f"{shown}  {flag.help}{default}",
        width=80,
        initial_indent="  ",
        subsequent_indent="    ",
      )
    )
  sys.stdout.write("\n".join(lines) + "\n")
  sys.exit(0)


def leave(message: str, code: int) -> NoReturn:
  """End the process with a message in one line."""
  output.complain(message)
  sys.exit(code)


def _given(argv: Sequence[str]) -> set[str]:
  """Return the names of the flags that have a value."""
  try:
    words = flags.FLAGS.read_flags_from_files(list(argv[1:]))
  except flags.Error as error:
    raise InputError(_said(error)) from error
  found = (w.lstrip("-").partition("=") for w in words if w.startswith("-"))
  return {name for name, sign, value in found if value or not sign}


def _said_of_stray(word: str) -> str:
  """Return the answer to a word that is neither a flag nor a flag's value."""
  close = difflib.get_close_matches(word, list(flags.FLAGS), 1)
  guess = f" (did you mean --{close[0]}?)" if close else ""
  return (
    f"{word!r} is no flag{guess}: flags begin with --, and values of one flag"
    " have commas between them (see --help)"
  )


def _said(error: BaseException) -> str:
  """Return the words of an error, the user's own where absl wrapped them."""
  inner: BaseException | None = error
  while inner is not None:
    if isinstance(inner, InputError):
      return str(inner)
    inner = inner.__cause__ or inner.__context__
  # A KeyError shows its words quoted.
  words = error.args[0] if isinstance(error, KeyError) else error
  return f"{' '.join(str(words).split())} (see --help)"
