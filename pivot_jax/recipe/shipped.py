"""Makes the weights that ship with the package from a finished run.

  python -m pivot_jax.ship --from=runs/scratch --to=pivot_jax/assets/toy

Takes the encoder of `stage0_vision` and the LLM of `stage0_llm`, and beside
them, in `stage1/`, the whole model of `stage1_full`; rounds them to bfloat16 and
writes them with what made them. The tokenizer there stays.
"""

import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from pivot_jax import files, trees
from pivot_jax.errors import InputError
from pivot_jax.recipe import plan
from pivot_jax.weights import artifacts, checkpoint

_FROM = flags.DEFINE_string("from", None, "The run folder.", required=True)
_TO = flags.DEFINE_string("to", None, "The artifact folder.", required=True)


COMMAND = "python -m pivot_jax.main --config=configs/pivot.py:from_scratch"


def main(argv: Sequence[str]) -> None:
  """Ship what the flags say; a mistake is one line."""
  del argv
  try:
    _ship()
  except InputError as error:
    sys.stderr.write(f"error: {error}\n")
    sys.exit(2)


def _ship() -> None:
  """Write params.safetensors, model.json, fingerprint.json and made.json."""
  run, to = pathlib.Path(_FROM.value), files.local_path(_TO.value, "--to")
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
    "settings": {n: plan.shipped_settings(config, n) for n in names},
    "stages": {name: _record(run, name) for name in names},
  }
  files.write_json(to / "stage1" / "made.json", made)
  shutil.copytree(
    to / "tokenizer", to / "stage1" / "tokenizer", dirs_exist_ok=True
  )


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
  app.run(main)
