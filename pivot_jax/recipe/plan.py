"""A recipe is data that flows one way: expand, check edges, run, resume.

A stage is a named section of the config with a kind, inputs ("@stage" edges or
addresses) and numbers. Each gets paths and leaves one folder, whose `done.json`
is renamed into place last; a finished stage is skipped on rerun. This file
knows the order of things and nothing of what a stage does.
"""

import copy
import dataclasses
import importlib
import logging
import pathlib
import re
import time
from collections.abc import Mapping

from ml_collections import ConfigDict

from pivot_jax import files
from pivot_jax.errors import InputError
from pivot_jax.recipe import run_folder, sections, shipped
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

  steps: tuple[run_folder.Step, ...]
  left_out: Mapping[str, str]


def resolve(config: ConfigDict) -> ConfigDict:
  """Return a copy of a config with what follows from its tokenizer."""
  # A deep copy, as inputs of stages refer to fields that change here.
  config = copy.deepcopy(config)
  if config.tokenizer != "package:toy" and config.llm.init == "package:toy:llm":
    # The shipped LLM speaks the shipped tokenizer only.
    config.llm.init = "@stage0_llm:llm"
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
  steps: list[run_folder.Step] = []
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
      if config[name].kind not in KINDS:
        raise InputError(
          f"{name}.kind={config[name].kind!r}: choose one of {', '.join(KINDS)}"
        )
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


def run(plan: Plan, workdir: pathlib.Path, config: ConfigDict) -> None:
  """Run the plan; raise what a stage raises, having kept what is finished."""
  run_folder.check_folders(workdir, plan.steps)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"{workdir}: cannot be made ({error.strerror})") from error
  with run_folder.lock(workdir):
    run_folder.claim(workdir, resolve(config))
    text = describe(plan) + "\n"
    files.write_text(workdir / "plan.txt", text)
    inputs = run_folder.Inputs()
    total = len(plan.steps)
    for number, step in enumerate(plan.steps, 1):
      if loop.stop_requested():
        raise loop.Stopped(f"stopped before {step.name}; rerun to continue")
      if run_folder.finished(step, inputs):
        LOG.info("[%d/%d] %s is done", number, total, step.name)
        continue
      LOG.info("[%d/%d] %s (%s)", number, total, step.name, step.kind)
      run_folder.begin(step, inputs)
      stage = importlib.import_module(f"pivot_jax.stages.{step.kind}")
      began = time.monotonic()
      measured = stage.run(step.config, step.inputs, step.folder)
      run_folder.finish(step, inputs, measured, time.monotonic() - began)


def describe(plan: Plan) -> str:
  """Return the plan as lines a person reads before starting it."""
  lines = [f"{len(plan.steps)} stages"]
  for step in plan.steps:
    given = ", ".join(f"{k}={v}" for k, v in sorted(step.inputs.items()))
    lines.append(f"  {step.name:28s} {step.kind:13s} {_short(given)}")
  for name, reason in plan.left_out.items():
    lines.append(f"  {name:28s} skipped: {reason}")
  return "\n".join(lines)


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


def _step(
  config, name, seed, workdir, steps, left_out, given
) -> run_folder.Step:
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
  kept = {k: v for k, v in fields.items() if k not in ("inputs",)}
  return run_folder.Step(
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
