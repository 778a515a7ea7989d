"""The command `pivot-jax`: one word for each thing to do.

  pivot-jax run pivot:debug --workdir=runs/debug
  pivot-jax data check FILES
  pivot-jax export --from=runs/debug/detach_dpo --to=DIR --format=hf

Each says more with --help. `run RECIPE` is `python -m pivot_jax.main
--config=RECIPE`; the other words are `python -m pivot_jax.WORD`.
"""

import sys

import pivot_jax

WORDS = ("run", "data", "export")


def main() -> None:
  """Run the word of the command line; a wrong one is a line and exit 2."""
  arguments = sys.argv[1:]
  word = arguments[0] if arguments else ""
  if word in ("-h", "--help"):
    sys.stdout.write(f"{__doc__}\n")
    return
  if word == "--version":
    sys.stdout.write(f"{pivot_jax.__version__}\n")
    return
  if word not in WORDS:
    said = f"no command {word!r}" if word else "a command is missing"
    sys.stderr.write(f"error: {said}; use one of {', '.join(WORDS)}\n")
    sys.exit(2)
  # The words' own parsers see what stands behind it.
  sys.argv = [f"pivot-jax {word}", *arguments[1:]]
  _WORDS[word]()


def _run() -> None:
  from pivot_jax import main as command

  # As `python -m` has it: modules of the current folder are found, and absl
  # lists the flags of the module that has them.
  sys.path.insert(0, "")
  sys.argv[0] = command.__name__
  for place in range(1, len(sys.argv)):
    before, text = sys.argv[place - 1], sys.argv[place]
    value = place > 1 and before.startswith("-") and "=" not in before
    if not text.startswith("-") and not value:
      sys.argv[place] = f"--config={text}"
      break
  command.run()


def _data() -> None:
  from pivot_jax.data import __main__ as command

  sys.exit(command.main(sys.argv[1:]))


def _export() -> None:
  from pivot_jax.weights import export

  export.run()


_WORDS = {"run": _run, "data": _data, "export": _export}


if __name__ == "__main__":
  main()
