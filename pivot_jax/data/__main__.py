"""Looks at data before it costs anything.

  python -m pivot_jax.data check CONFIG-or-FILES [--images=DIR]
  python -m pivot_jax.data show FILES [--n 5]
  python -m pivot_jax.data convert SRC DST
  python -m pivot_jax.data select-mmpr META --set=NAME --tokenizer=DIR --to=DIR

Each says more with --help.
"""

import importlib
import logging
import sys
from collections.abc import Sequence

from pivot_jax import output
from pivot_jax.errors import InputError

# Only the one that is asked for is imported.
COMMANDS = ("check", "show", "convert", "select-mmpr")


def main(argv: Sequence[str]) -> int:
  """Run a command; return the exit status."""
  if argv and argv[0] in ("-h", "--help"):
    sys.stdout.write(f"{__doc__}\n")
    return 0
  if not argv or argv[0] not in COMMANDS:
    said = f"no command {argv[0]!r}" if argv else "a command is missing"
    output.complain(f"error: {said}; use one of {', '.join(COMMANDS)}")
    return 2
  logging.basicConfig(level=logging.INFO, handlers=[output.handler()])
  module = argv[0].replace("-", "_")
  command = importlib.import_module(f"pivot_jax.data.tools.{module}")
  try:
    return command.main(argv[1:])
  except InputError as error:
    output.complain(str(error))
    return 2
  except MemoryError as error:
    output.complain(f"out of memory: {error or 'free some'}")
    return 2
  except BrokenPipeError:
    # The reader, as `head`, has seen enough.
    sys.stderr.close()
    return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
