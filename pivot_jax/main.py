"""Flags, devices, mesh; hands over to `recipe.plan.run`.

  python -m pivot_jax.main --config=configs/pivot.py --workdir=runs/pivot
  python -m pivot_jax.main --config=configs/pivot.py:debug --workdir=runs/debug
  python -m pivot_jax.main --config=pivot:debug --workdir=runs/debug

The last finds the recipe of the package from any folder. What is changed in a
finished stage is made again with --rerun=STAGE (docs/workdir.md).

A user's mistake is one line and exit code 2; a preempted run saves and exits
with 75 (run the same command again to continue); a non-finite loss exits
with 1.
"""

import logging
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

from absl import app, flags
from ml_collections import config_flags

from pivot_jax import command_line, output, recipes
from pivot_jax.errors import InputError

_CONFIG = recipes.define(
  "The recipe, as pivot:debug or configs/pivot.py:debug; --config.KEY=VALUE "
  "sets a value of it, as --config.seeds=3."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Print stages, shapes, memory and row counts, and exit."
)
_RERUN = flags.DEFINE_list(
  "rerun",
  [],
  "Stages, or all, whose results of other settings may be replaced, with all "
  "that read them.",
)

LOG = logging.getLogger("pivot_jax")
_OTHER_SIZE = (
  " (another image size is asked for in the address, as"
  " hf:DIR?image_size=378&positions=dinov2)"
)
EXIT_INPUT = command_line.EXIT_INPUT
EXIT_STOPPED, EXIT_NON_FINITE = 75, 1
_FLAGS = ("config", "workdir", "dry_run", "rerun")
_HELP = """usage: {command} [flags]

Run the stages of RECIPE: a name of the package's ({known}) or a file, each with
:VARIANT where it has some. The same command again continues or corrects a run.

  {example}

Exit code 2: a mistake, in one line; 75: stopped and saved; 1: a loss that is not
finite.
"""


def main(argv: Sequence[str]) -> None:
  """Run the recipe that the flags describe."""
  del argv
  output.log()
  # Imported here so that a wrong flag is answered at once.
  from pivot_jax import files
  from pivot_jax.recipe import plan, preflight, run_folder
  from pivot_jax.training import loop

  try:
    _setup_jax()
    loop.stop_on_sigterm()
    config = plan.resolve(_CONFIG.value)
    workdir = files.local_path(_WORKDIR.value, "--workdir").absolute()
    began = time.monotonic()
    planned = plan.expand(config, workdir)
    _check_sizes(config)
    run_folder.check_folders(workdir, planned.steps)
    preflight.check(planned.steps)
    if _DRY_RUN.value:
      plan.allowed(planned, _RERUN.value)
      again = plan.changes(planned)
      lines = [f"  {name:28s} again: {why}" for name, why in again.items()]
      said = [preflight.describe(planned), *lines]
      output.show("\n".join(said).split("\n"))
      return
    for line in plan.describe(planned).split("\n"):
      LOG.info("%s", line)
    for line in dict.fromkeys(
      line for step in planned.steps for line in preflight.label_gaps(step)
    ):
      LOG.warning("%s", line)
    plan.run(planned, workdir, config, _RERUN.value)
  except InputError as error:
    command_line.leave(f"error: {error}", EXIT_INPUT)
  except MemoryError as error:
    said = f"error: out of memory: {error or 'free some'}"
    command_line.leave(said, EXIT_INPUT)
  except loop.Stopped as stopped:
    command_line.leave(str(stopped), EXIT_STOPPED)
  except loop.NonFiniteError as error:
    command_line.leave(f"error: {error}", EXIT_NON_FINITE)
  _farewell(workdir, time.monotonic() - began)


def _check_sizes(config) -> None:
  """Raise for sizes on the command line that given weights would override."""
  changed = _overrides()
  for part in ("vision", "llm"):
    init = config[part].init
    sizes = [
      k for k in changed if k.startswith(f"{part}.") and k != f"{part}.init"
    ]
    if sizes and init and not init.startswith("@"):
      raise InputError(
        f"--config.{sizes[0]} has no effect: sizes come from the weights"
        f" (--config.{part}.init={init}). Remove one."
        f"{_OTHER_SIZE if 'vision.image_size' in sizes else ''}"
      )


def _overrides() -> Mapping[str, object]:
  """Return what the command line set in the config, by dotted key."""
  return config_flags.get_override_values(flags.FLAGS["config"])


def _setup_jax() -> None:
  """Turn the compilation cache on and join a cluster if there is one."""
  import jax

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = pathlib.Path("~/.cache/pivot_jax/xla").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
  # Arms share executables; even a small one costs seconds to compile again.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  if "JAX_COORDINATOR_ADDRESS" in os.environ:
    jax.distributed.initialize()


def _farewell(workdir: pathlib.Path, seconds: float) -> None:
  report = workdir / "report.html"
  place = f"; open {report}" if report.exists() else ""
  LOG.info("finished in %.0f s%s", seconds, place)


def run(command: str = "python -m pivot_jax.main --config=RECIPE") -> None:
  """Parse flags, answering a wrong one in a line, and run `main`.

  `command` is how the command line begins, for messages.
  """
  example = f"{command.replace('RECIPE', 'pivot:debug')} --workdir=runs/debug"
  known = ", ".join(recipes.known())
  text = _HELP.format(command=command, example=example, known=known)
  command_line.answer_help(sys.argv, text, _FLAGS)
  recipe = "--config" if "--config" in command else "a RECIPE"
  missing = {
    "config": f"{recipe} is missing; give it as in: {example}",
    "workdir": "--workdir is missing: give the folder of the run",
  }

  def parse(argv: Sequence[str]) -> list[str]:
    return command_line.parse(argv, missing=missing)

  app.run(main, flags_parser=parse)


if __name__ == "__main__":
  run()
