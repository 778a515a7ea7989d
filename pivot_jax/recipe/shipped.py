"""Weights that ship with the package: when they are taken, how they are made.

  python -m pivot_jax.recipe.shipped --from=runs/scratch --to=pivot_jax/assets/toy

Takes the encoder of `stage0_vision` and the LLM of `stage0_llm`, and beside
them, in `stage1/`, the whole model of `stage1_full`; rounds them to bfloat16 and
writes them with what made them. The tokenizer there stays. A run takes a shipped
result for a stage that would make the same.
"""

import argparse
import json
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from pivot_jax import addresses, files, output, trees
from pivot_jax.errors import InputError
from pivot_jax.recipe import run_folder, sections
from pivot_jax.weights import artifacts, checkpoint

COMMAND = "python -m pivot_jax.main --config=configs/pivot.py:from_scratch"


def main() -> None:
  """Ship what the command line says; a mistake is one line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--from", required=True, help="the run folder")
  parser.add_argument("--to", required=True, help="the artifact folder")
  said = vars(parser.parse_args())
  try:
    ship(pathlib.Path(said["from"]), files.local_path(said["to"], "--to"))
  except InputError as error:
    output.complain(f"error: {error}")
    sys.exit(2)


def ship(run: pathlib.Path, to: pathlib.Path) -> None:
  """Write params.safetensors, model.json, fingerprint.json and made.json."""
  vision = checkpoint.load(f"{run / 'stage0_vision'}:vision")
  llm = checkpoint.load(f"{run / 'stage0_llm'}:llm")
  meta = _meta(vision, llm, parts=["llm", "vision"])
  artifacts.save_packaged(to, trees.merge(vision.params, llm.params), meta=meta)
  records = {
    name: _record(run, name) for name in ("stage0_vision", "stage0_llm")
  }
  files.write_json(to / "made.json", {"command": COMMAND, "stages": records})
  whole = checkpoint.load(str(run / "stage1_full"))
  meta = _meta(whole, whole, parts=list(checkpoint.PARTS))
  artifacts.save_packaged(to / "stage1", whole.params, meta=meta)
  names = ("stage1_proj", "stage1_full")
  config = ConfigDict(files.read_json(run / "config.json"))
  made = {
    "command": COMMAND,
    "settings": {n: settings(config, n) for n in names},
    "stages": {name: _record(run, name) for name in names},
  }
  files.write_json(to / "stage1" / "made.json", made)
  shutil.copytree(
    to / "tokenizer", to / "stage1" / "tokenizer", dirs_exist_ok=True
  )


def take_apart(config: ConfigDict) -> None:
  """Have the LLM trained where the shipped one has another tokenizer."""
  if config.tokenizer != "package:toy" and config.llm.init == "package:toy:llm":
    # The shipped LLM speaks the shipped tokenizer only.
    config.llm.init = "@stage0_llm:llm"


def taken(config: ConfigDict) -> dict[str, str]:
  """Return the stages whose shipped result is what they would make.

  A stage that names one in `shipped` runs all the same if it, its data, the
  tokenizer or the weights before it are not those that made it.
  """
  return {
    name: config[name].shipped
    for name in config.order
    if name in config
    and config[name].get("shipped")
    and _made_alike(config, config[name].shipped)
  }


def _made_alike(config: ConfigDict, address: str) -> bool:
  """Return whether the stages that led to a shipped result are unchanged."""
  folder = addresses.parse(address).path
  made = folder / "made.json"
  if not made.exists():
    return False
  origins = (config.vision.init, config.llm.init)
  if origins != ("package:toy:vision", "package:toy:llm"):
    return False
  return all(
    name in config and _as_recorded(recorded, settings(config, name))
    for name, recorded in files.read_json(made)["settings"].items()
  )


def _as_recorded(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
  """Return whether settings are still those that were recorded.

  A setting that came later is in no record, and decides nothing at any value.
  What is free does not count either; another input always does.
  """
  free = run_folder.FREE_KEYS
  return recorded["inputs"] == now["inputs"] and all(
    key in now and _holds(value, now[key])
    for key, value in recorded.items()
    if key not in free or key == "compute"
  )


def _holds(recorded: Any, now: Any) -> bool:
  if not isinstance(recorded, Mapping) or not isinstance(now, Mapping):
    return recorded == now
  return all(
    key in now and _holds(value, now[key]) for key, value in recorded.items()
  )


def settings(config: ConfigDict, name: str) -> dict[str, Any]:
  """Return what decides a stage's result, but for the weights it starts from.

  `run_folder.FREE_KEYS` are skipped, except the precision: a shipped result is
  taken unasked, so it has to be what the run itself would make. Where vision
  and llm came from is skipped, too: in the run that made a shipped result, from
  the stages before it.
  """
  section = config[name]
  fields = sections.common(config, section) | section.to_dict()
  free = {*run_folder.FREE_KEYS, "name", "only_if_used"}
  kept = {k: v for k, v in fields.items() if k not in free}
  kept["compute"] = {"dtype": fields["compute"]["dtype"]}
  for part in ("vision", "llm"):
    kept[part] = {k: v for k, v in kept[part].items() if k != "init"}
    kept["inputs"] = {k: v for k, v in kept["inputs"].items() if k != part}
  return json.loads(json.dumps(kept, default=list))


def _meta(vision, llm, *, parts: list[str]) -> dict[str, Any]:
  return {
    "vision": vision.meta["vision"],
    "llm": llm.meta["llm"],
    "parts": parts,
    "preprocessing": vision.meta["preprocessing"],
    "tokenizer": llm.meta["tokenizer"],
    "sources": {part: "configs/pivot.py:from_scratch" for part in parts},
    "not_carried": [],
  }


def _record(run: pathlib.Path, name: str) -> dict[str, Any]:
  """Return the settings, seconds, metrics and versions of a finished stage."""
  done = files.read_json(run / name / "done.json")
  return {
    key: done[key] for key in ("fields", "seconds", "metrics", "versions")
  }


if __name__ == "__main__":
  main()
