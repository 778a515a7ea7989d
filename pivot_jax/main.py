"""Flags, devices, mesh; hands over to `recipe.plan.run`.

  python -m pivot_jax.main --config=configs/pivot.py --workdir=runs/pivot
  python -m pivot_jax.main --config=configs/pivot.py:debug --workdir=runs/debug
  python -m pivot_jax.main --config=pivot:debug --workdir=runs/debug

The last finds the recipe of the package from any folder. What is changed in a
finished stage is made again with --rerun=STAGE (docs/workdir.md).

On several hosts the same command runs on each of them (docs/clusters.md); the
processes find one another by --processes=auto.

A user's mistake is one line and exit code 2; a preempted run saves and exits
with 75 (run the same command again to continue); a non-finite loss exits
with 1; a process that was lost, or waits for one that is stuck, with 70.
"""

import contextlib
import logging
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from pivot_jax import cluster, command_line, output, recipes
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
_PROCESSES = flags.DEFINE_string(
  "processes",
  "auto",
  "How this process joins others: auto, none, or ADDRESS:PORT,COUNT,INDEX.",
)

LOG = logging.getLogger("pivot_jax")
_OTHER_SIZE = (
  " (another image size is asked for in the address, as"
  " hf:DIR?image_size=378&positions=dinov2)"
)
EXIT_INPUT = command_line.EXIT_INPUT
EXIT_STOPPED, EXIT_NON_FINITE = 75, 1
_FLAGS = ("config", "workdir", "dry_run", "rerun", "processes")
_HELP = """usage: {command} [flags]

Run the stages of RECIPE: a name of the package's ({known}) or a file, each with
:VARIANT where it has some. The same command again continues or corrects a run.

  {example}

Exit code 2: a mistake, in one line; 75: stopped and saved; 1: a loss that is not
finite; 70: another process was lost or is stuck.
"""


def main(argv: Sequence[str]) -> None:
  """Run the recipe that the flags describe."""
  del argv
  output.log()
  # Imported here so that a wrong flag is answered at once.
  from pivot_jax import processes
  from pivot_jax.training import loop

  began = time.monotonic()
  try:
    _join(_CONFIG.value)
    report = _run(_CONFIG.value)
  except InputError as error:
    _leave(f"error: {error}", EXIT_INPUT)
  except MemoryError as error:
    _leave(f"error: out of memory: {error or 'free some'}", EXIT_INPUT)
  except processes.LostPeerError as error:
    _leave(f"error: {error}", processes.EXIT_LOST)
  except loop.Stopped as stopped:
    processes.finish()
    if processes.first():
      output.complain(str(stopped))
    sys.exit(EXIT_STOPPED)
  except loop.NonFiniteError as error:
    _leave(f"error: {error}", EXIT_NON_FINITE)
  processes.finish()
  if not _DRY_RUN.value:
    place = f"; open {report}" if report.exists() else ""
    LOG.info("finished in %.0f s%s", time.monotonic() - began, place)


def _join(config: ConfigDict) -> None:
  """Choose the platform, join the other processes, set the cache."""
  import jax

  from pivot_jax import processes

  wanted = config.get("platform", "")
  if wanted:
    jax.config.update("jax_platforms", wanted)
  # Before the first device, so that SIGTERM is not left to nobody.
  try:
    index, count = processes.start(_PROCESSES.value)
    backend = jax.default_backend()
  # jax's answer to a platform that it has not, too.
  except RuntimeError as error:
    said = " ".join(str(error).split())
    if processes.is_lost(error):
      raise processes.LostPeerError(said) from error
    raise InputError(f"jax cannot start: {said}") from error
  if index:
    logging.getLogger("pivot_jax").setLevel(logging.WARNING)
  cluster.check_platform(backend, wanted, cluster.environment())
  _keep_programs(count)


def _run(config: ConfigDict) -> pathlib.Path:
  """Check everything and run the stages; return where the report will be."""
  from pivot_jax import files, processes
  from pivot_jax.recipe import agreement, plan, preflight, run_folder
  from pivot_jax.training import loop

  if processes.count() == 1:
    # With others jax notices it, and a handler of ours would end that.
    loop.stop_on_sigterm()
  config = plan.resolve(config)
  workdir = files.local_path(_WORKDIR.value, "--workdir").absolute()
  plan.watch(config, workdir)
  processes.agree(
    "the command", {"dry_run": str(_DRY_RUN.value), "rerun": str(_RERUN.value)}
  )
  planned = plan.expand(config, workdir)
  _check_sizes(config)
  run_folder.check_folders(workdir, planned.steps)
  # In turn, so that an index is made once, by the one that keeps it.
  processes.in_turn("what is checked", lambda: preflight.check(planned.steps))
  agreement.check(planned.steps, config, plan.describe(planned))
  if _DRY_RUN.value:
    plan.allowed(planned, _RERUN.value)
    again = plan.changes(planned)
    lines = [f"  {name:28s} again: {why}" for name, why in again.items()]
    said = [preflight.describe(planned), *lines]
    if processes.first():
      output.show("\n".join(said).split("\n"))
    return workdir / "report.html"
  for line in plan.describe(planned).split("\n"):
    LOG.info("%s", line)
  for line in dict.fromkeys(
    line for step in planned.steps for line in preflight.label_gaps(step)
  ):
    LOG.warning("%s", line)
  plan.run(planned, workdir, config, _RERUN.value)
  return workdir / "report.html"


def _leave(message: str, code: int) -> NoReturn:
  """End the process with a line and a code, and the others with it."""
  from pivot_jax import processes

  if processes.count() == 1:
    command_line.leave(message, code)
  processes.fail(message, code)


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


def _keep_programs(count: int) -> None:
  """Turn the caches on; several processes have theirs beside WORKDIR.

  Only the first writes them, so that they have to lie where all read.
  """
  import jax

  beside = pathlib.Path(_WORKDIR.value).absolute().parent
  if count > 1:
    os.environ.setdefault("PIVOT_JAX_CACHE", str(beside / ".pivot_jax"))
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    home = pathlib.Path("~/.cache/pivot_jax/xla").expanduser()
    cache = beside / ".xla" if count > 1 else home
    jax.config.update("jax_compilation_cache_dir", str(cache))
  # Arms share executables; even a small one costs seconds to compile again.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _leave_unread(message: str, argv: Sequence[str]) -> NoReturn:
  """End over a wrong command line; the other processes hear of it.

  They would wait for this one for minutes.
  """
  words = " ".join(argv).replace("--processes ", "--processes=").split()
  told = [x for x in words if x.lstrip("-").startswith("processes=")]
  spec = told[-1].partition("=")[2] if told else "auto"
  with contextlib.suppress(InputError):
    if cluster.find(spec, cluster.environment()) is not None:
      # Imported here so that one process answers at once.
      from pivot_jax import processes

      processes.join(spec)
      processes.fail(message, EXIT_INPUT)
  command_line.leave(message, EXIT_INPUT)


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
    try:
      return command_line.parse(argv, missing=missing)
    except InputError as error:
      _leave_unread(f"error: {error}", argv)

  app.run(main, flags_parser=parse)


if __name__ == "__main__":
  run()
