"""A recipe is data that flows one way: expand, check edges, run, resume.

A stage is a named section of the config with a kind, inputs ("@stage" edges or
addresses) and numbers. Each gets paths and leaves one folder, whose `done.json`
is renamed into place last; a finished stage is skipped on rerun, and made again
only where its settings changed and `--rerun` says so. This file knows the order
of things and nothing of what a stage does.
"""

import contextlib
import copy
import dataclasses
import importlib
import json
import logging
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict

from pivot_jax import (
  addresses,
  files,
  goodput,
  metrics,
  names,
  processes,
  texts,
)
from pivot_jax.errors import InputError
from pivot_jax.recipe import agreement, lock, run_folder, sections, shipped
from pivot_jax.recipe.inputs import Inputs, Step
from pivot_jax.training import loop

LOG = logging.getLogger("pivot_jax")

KINDS = (
  "train",
  "score",
  "detach",
  "linear_probe",
  "segment_probe",
  "gradcam",
  "evaluate",
  "report",
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """The stages that will run, in order, and those skipped with the reason."""

  steps: tuple[Step, ...]
  left_out: Mapping[str, str]


# Why an attempt goes whose settings are taken back.
_BACK = "its checkpoints go and the result before it comes back"


def runner(kind: str, what: str = "kind") -> Callable:
  """Return `run(config, inputs, out) -> metrics` of a kind of stage.

  Raises InputError for a kind that is none of `KINDS`, and no name of a user's
  own (`pivot_jax.names`).
  """
  if kind in KINDS:
    return importlib.import_module(f"pivot_jax.stages.{kind}").run
  found = names.named(kind, dict.fromkeys(KINDS), what)
  names.check_call(f"{what}={kind!r}", found, ("config", "inputs", "out"))
  return found


def resolve(config: ConfigDict) -> ConfigDict:
  """Return a copy of a config with what follows from its tokenizer."""
  # A deep copy, as inputs of stages refer to fields that change here.
  config = copy.deepcopy(config)
  shipped.take_apart(config)
  return config.copy_and_resolve_references()


def expand(config: ConfigDict, workdir: pathlib.Path) -> Plan:
  """Return the stages that will run, seeds repeated, each skip with its reason.

  A stage is skipped if the config has no data for it, if a stage that it needs
  is skipped, or if it only makes weights that the config names. Raises
  InputError for an edge to a stage that does not run before.
  """
  config = resolve(config)
  if config.seeds < 1:
    raise InputError(f"seeds={config.seeds}: give 1 or more")
  left_out: dict[str, str] = {}
  steps: list[Step] = []
  used = _edges(config)
  given = shipped.taken(config)
  left_out |= {
    name: f"shipped, made with these settings ({address})"
    for name, address in given.items()
  }
  for seed in range(config.seeds):
    for name in config.order:
      if name not in config:
        raise InputError(
          f"order names {name!r}, which the config does not hold"
        )
      if name in ("lock", "shared", "stuck", "logs") or re.fullmatch(
        r"seed\d+", name
      ):
        raise InputError(
          f"order names a stage {name!r}: a run has a file or folder of that "
          "name; call the stage otherwise"
        )
      if config[name].kind not in KINDS:
        runner(config[name].kind, f"{name}.kind")
      if config[name].kind == "report" or (seed and name in config.shared):
        continue
      if name in given:
        continue
      reason = _reason(config, name, left_out, used, given)
      if reason:
        left_out[name] = reason
        continue
      steps.append(_step(config, name, seed, workdir, steps, left_out, given))
  for name in config.order:
    if config[name].kind == "report":
      report = _step(config, name, 0, workdir, steps, left_out, given)
      # A report reads every stage that ran, of every seed.
      inputs = {step.name: str(step.folder) for step in steps}
      steps.append(dataclasses.replace(report, inputs=inputs))
  return Plan(tuple(steps), left_out)


def changes(plan: Plan) -> dict[str, str]:
  """Return the finished or begun stages that would be made again, and why.

  A stage that reads one of them is among them: whether its inputs change is
  known once that one is made.
  """
  inputs = Inputs()
  making: dict[str, str] = {}
  found: dict[str, str] = {}
  for step in plan.steps:
    fed = {
      name: making[folder]
      for name, folder in _folders(step).items()
      if folder in making
    }
    replaced = {n for n, said in found.items() if said != _BACK}
    why = _why_again(step, inputs, fed, replaced)
    if why:
      found[step.name] = why
    if (
      why
      or not run_folder.is_done(step)
      or run_folder.change(step, inputs, unknown=tuple(fed))
    ):
      making[str(step.folder)] = step.name
  return found


def _why_again(
  step: Step,
  inputs: Inputs,
  fed: Mapping[str, str],
  replaced: set[str],
) -> str:
  """Return why a stage that is there would be made again, "" if it is not.

  `fed` has by input the stages that are to be made, `replaced` those of them
  whose result is replaced.
  """
  unknown = tuple(fed)
  why = run_folder.change(step, inputs, unknown=unknown)
  done = run_folder.is_done(step)
  there = done or run_folder.is_begun(step)
  if (why or not done) and run_folder.can_restore(
    step, inputs, unknown=unknown
  ):
    return _BACK if there else ""
  read = [name for name in fed.values() if name in replaced]
  if not why and there and read:
    return f"reads {', '.join(dict.fromkeys(read))}"
  if (
    not why
    and not there
    and run_folder.replaces_old(step, inputs, unknown=unknown)
  ):
    return f"replaces {run_folder.old(step).folder.name}"
  return why


def _folders(step: Step) -> dict[str, str]:
  """Return the folders that a stage reads, by the input's name."""
  return {
    name: str(addresses.parse(address).path)
    for name, address in step.inputs.items()
  }


def allowed(plan: Plan, rerun: Sequence[str]) -> set[str]:
  """Return the stages that may be made again: those named, and their readers.

  A name stands for the stage in every seed, "all" for every stage. A report is
  always allowed, as nothing is lost with it.

  Raises InputError for a name that is no stage's.
  """
  short = {step.name: step.name.rpartition("/")[2] for step in plan.steps}
  known = {*short, *short.values(), "all"}
  for name in rerun:
    if name not in known:
      raise InputError(
        f"--rerun={name}: no such stage; the run has "
        f"{', '.join(dict.fromkeys(short.values()))}"
      )
  found: set[str] = set()
  folders: set[str] = set()
  for step in plan.steps:
    said = {"all", step.name, short[step.name]} & set(rerun)
    reads = folders & set(_folders(step).values())
    if said or reads or step.kind == "report":
      found.add(step.name)
    if said or reads:
      folders.add(str(step.folder))
  return found


def check_changes(plan: Plan, rerun: Sequence[str]) -> None:
  """Raise InputError if a stage would be made again that may not be."""
  may, found = allowed(plan, rerun), changes(plan)
  lost = {name: why for name, why in found.items() if name not in may}
  if lost:
    roots = [n for n, why in lost.items() if not why.startswith("reads ")]
    said = "; ".join(f"{name} ({why})" for name, why in lost.items())
    back = _BACK in lost.values()
    raise InputError(
      f"these stages are there and would run again: {said}. Add "
      f"--rerun={','.join(roots)} (or all) to replace them, use another "
      f"--workdir, or {'give' if back else 'take'} the settings "
      f"{'of what is there' if back else 'back'}"
    )
  for step in plan.steps:
    if step.name in found:
      run_folder.check_whole(step)


def run(
  plan: Plan,
  workdir: pathlib.Path,
  config: ConfigDict,
  rerun: Sequence[str] = (),
) -> None:
  """Run the plan; raise what a stage raises, having kept what is finished.

  `rerun` are the stages that may replace a result of other settings or inputs,
  with all that read them.
  """
  run_folder.check_folders(workdir, plan.steps)
  processes.decide("the work folder", lambda: _make_folder(workdir))
  agreement.check_shared(workdir)
  with contextlib.ExitStack() as held:
    if processes.first():
      held.enter_context(lock.hold(workdir))
      check_changes(plan, rerun)
      now = json.loads(json.dumps(resolve(config).to_dict(), default=list))
      files.write_json(workdir / "config.json", now)
      files.write_text(workdir / "plan.txt", describe(plan) + "\n")
    # Anew: what stages make is read by later ones, as files and as sources.
    inputs, may = Inputs(), allowed(plan, rerun)
    held.callback(goodput.note, "stop")
    total = len(plan.steps)
    for number, step in enumerate(plan.steps, 1):
      if loop.stop_requested():
        raise loop.Stopped(f"stopped before {step.name}; rerun to continue")
      _make(step, workdir, inputs, f"[{number}/{total}]", may=step.name in may)
    goodput.note("end")


def watch(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Have the processes watched, beginning with what is checked first."""
  processes.beat("checking settings and files", allow=processes.SLOW)
  processes.watch(_watchdog(config), workdir / "stuck")


def _watchdog(config: ConfigDict) -> float:
  """Return after how many seconds without progress a run ends; 0: never."""
  seconds = config.get("watchdog", 0)
  if not isinstance(seconds, int | float) or seconds < 0:
    raise InputError(
      f"watchdog={seconds!r}: give seconds, or 0 for no watchdog"
    )
  return seconds


def _make_folder(workdir: pathlib.Path) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"{workdir}: cannot be made ({error.strerror})") from error


def _make(
  step: Step, workdir: pathlib.Path, inputs: Inputs, place: str, *, may: bool
) -> None:
  """Run a stage unless it is done; the first process decides, for all."""
  processes.beat(f"beginning {step.name}", allow=processes.SLOW)
  runs, seen = processes.decide(
    step.name,
    lambda: [_prepare(step, inputs, place, may=may), agreement.marks(step)],
  )
  if not runs:
    return
  agreement.wait_for(step, seen)
  if not goodput.is_begun():
    goodput.begin(workdir)
  began = time.monotonic()
  run_stage = runner(step.kind, f"{step.name}.kind")
  measured = run_stage(step.config, step.inputs, step.folder)
  numbers = metrics.numbers(measured, f"{step.name}.kind={step.kind!r}")
  # One that fails in it has no result.
  processes.barrier(f"the end of {step.name}")
  if processes.first():
    seconds = time.monotonic() - began
    run_folder.finish(step, inputs, numbers, seconds)
    run_folder.discard_old(step)
  goodput.note("stage", stage=step.name)


def _prepare(step: Step, inputs: Inputs, place: str, *, may: bool) -> bool:
  """Return whether a stage runs, its folder begun.

  What is there is replaced only if it may be.
  """
  why, done = run_folder.change(step, inputs), run_folder.is_done(step)
  back = (why or not done) and run_folder.can_restore(step, inputs)
  there = done or run_folder.is_begun(step)
  if back and (may or not there):
    run_folder.restore(step, inputs)
    LOG.info("%s %s is as it was before", place, step.name)
  elif (back or why) and not may:
    why = why or _BACK
    # Its inputs were made again, and are others now.
    raise InputError(
      f"{step.folder} was made with other settings or inputs ({why}): add "
      f"--rerun={step.name} to make it again"
    )
  elif why:
    run_folder.check_whole(step)
    LOG.info("%s %s is made again: %s", place, step.name, why)
    run_folder.set_aside(step)
  run_folder.log_free_changes(step)
  if run_folder.is_done(step):
    run_folder.discard_old(step)
    LOG.info("%s %s is done", place, step.name)
    if step.kind == "report":
      _show(step)
    return False
  LOG.info("%s %s (%s)", place, step.name, step.kind)
  run_folder.begin(step, inputs)
  return True


def _show(report: Step) -> None:
  """Put the report back beside the stages, if it is not there."""
  for name in ("report.json", "report.html"):
    made, shown = report.folder / name, report.folder.parent / name
    if made.exists() and not shown.exists():
      files.write_text(shown, made.read_text("utf-8"))


def describe(plan: Plan) -> str:
  """Return the plan as lines a person reads before starting it."""
  lines = [f"{len(plan.steps)} stages"]
  for step in plan.steps:
    given = ", ".join(f"{k}={v}" for k, v in sorted(step.inputs.items()))
    lines.append(f"  {step.name:28s} {step.kind:13s} {_short(given)}")
  for name, reason in plan.left_out.items():
    lines.append(f"  {name:28s} skipped: {reason}")
  return "\n".join(map(texts.shown, lines))


def _reason(config, name, left_out, used, given) -> str:
  """Return why a stage does not run, empty if it does."""
  section = config[name]
  for source in sections.sources(section):
    if source not in config.sources:
      raise InputError(
        f"{name} names the data {source!r}; the config has {sorted(config.sources)}"
      )
    spec = config.sources[source]
    if "given_by" in spec and not spec.get("path"):
      return f"no data: {spec.given_by}"
  for edge in section.inputs.values():
    target = _target(edge)
    if target in left_out and target not in given:
      return f"needs {target}, which is skipped"
  if section.get("only_if_used") and name not in used:
    return "its weights are given"
  return ""


def _step(config, name, seed, workdir, steps, left_out, given) -> Step:
  """Return a stage with its inputs resolved to addresses."""
  section = config[name]
  folders = {step.name: step.folder for step in steps}
  inputs = {}
  for key, edge in section.inputs.items():
    target = _target(edge)
    _, colon, part = edge.partition(":")
    if target in given:
      inputs[key] = given[target] + colon + part
      continue
    if not edge or target in left_out:
      continue
    if target is None:
      addresses.name(edge)
      inputs[key] = edge
      continue
    local = _named(target, seed) if target not in config.shared else target
    if local not in folders:
      raise InputError(
        f"{name}.inputs.{key}={edge!r}: {target} does not run before {name}; "
        f"put it earlier in `order`"
      )
    inputs[key] = str(folders[local]) + colon + part
  own = workdir if not seed else workdir / f"seed{seed}"
  fields = sections.common(config, section) | section.to_dict()
  fields |= {"name": _named(name, seed), "seed": section.seed + 1000 * seed}
  fields["data_seed"] = section.data_seed + 1000 * seed
  if section.kind == "report":
    fields |= {"left_out": dict(left_out), "seeds": config.seeds}
    fields |= sections.design(config)
  kept = {k: v for k, v in fields.items() if k not in ("inputs",)}
  return Step(
    name=_named(name, seed),
    kind=section.kind,
    config=ConfigDict(kept),
    inputs=inputs,
    folder=own / name,
  )


def _target(edge: str) -> str | None:
  """Return the stage an edge names, None for an address."""
  found = re.fullmatch(r"@([^:]+)(:.*)?", edge or "")
  return found[1] if found else None


def _named(name: str, seed: int) -> str:
  return f"seed{seed}/{name}" if seed else name


def _edges(config: ConfigDict) -> set[str]:
  """Return the stages that any stage of the order reads."""
  edges = (
    e for n in config.order if n in config for e in config[n].inputs.values()
  )
  return {target for target in map(_target, edges) if target}


def _short(text: str, limit: int = 100) -> str:
  return text if len(text) <= limit else text[: limit - 1] + "…"
