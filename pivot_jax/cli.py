"""The command `pivot-jax`: one word for each thing to do.

  pivot-jax run pivot:debug --workdir=runs/debug
  pivot-jax data check FILES
  pivot-jax export --from=runs/debug/detach_dpo --to=DIR --format=hf

Each says more with --help. `run RECIPE` is `python -m pivot_jax.main
--config=RECIPE`; the other words are `python -m pivot_jax.WORD`.
"""

import sys
from typing import TYPE_CHECKING

import pivot_jax

if TYPE_CHECKING:
  from absl import flags

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
  from absl import flags

  from pivot_jax import main as command

  # As `python -m` has it: modules of the current folder are found.
  sys.path.insert(0, "")
  words = sys.argv[1:]
  named = [word for word in words if word.split("=")[0].lstrip("-") == "config"]
  places = [
    place
    for place, word in enumerate(words)
    if not word.startswith("-")
    and not _takes_a_word(words[place - 1] if place else "", flags.FLAGS)
  ]
  if places and not named:
    # Settings of the recipe may stand before it.
    recipe = words.pop(places[0])
    sys.argv[1:] = [f"--config={recipe}", *words]
  command.run("pivot-jax run RECIPE")


def _takes_a_word(text: str, known: "flags.FlagValues") -> bool:
  """Return whether the word after this one is the value of a flag."""
  if not text.startswith("-") or "=" in text:
    return False
  name = text.lstrip("-")
  switches = [x for x in (name, name.removeprefix("no")) if x in known]
  return not any(known[x].boolean for x in switches)


def _data() -> None:
  from pivot_jax.data import __main__ as command

  sys.exit(command.main(sys.argv[1:]))


def _export() -> None:
  from pivot_jax.weights import export

  export.run("pivot-jax export")


_WORDS = {"run": _run, "data": _data, "export": _export}


if __name__ == "__main__":
  main()
