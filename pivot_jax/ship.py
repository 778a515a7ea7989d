"""Makes the weights that ship with the package from a finished run.

  python -m pivot_jax.ship --from=runs/scratch --to=pivot_jax/assets/toy

Takes the encoder of `stage0_vision` and the LLM of `stage0_llm`, rounds them to
bfloat16 and writes them with what made them. The tokenizer there stays.
"""

import json
import pathlib
from collections.abc import Sequence

from absl import app, flags

from pivot_jax import checkpoint, trees

_FROM = flags.DEFINE_string("from", None, "The run folder.", required=True)
_TO = flags.DEFINE_string("to", None, "The artifact folder.", required=True)


def main(argv: Sequence[str]) -> None:
  """Writes params.safetensors, model.json, fingerprint.json and made.json."""
  del argv
  run, to = pathlib.Path(_FROM.value), pathlib.Path(_TO.value)
  vision = checkpoint.load(f"{run / 'stage0_vision'}:vision")
  llm = checkpoint.load(f"{run / 'stage0_llm'}:llm")
  meta = {
    "vision": vision.meta["vision"],
    "llm": llm.meta["llm"],
    "parts": ["llm", "vision"],
    "preprocessing": vision.meta["preprocessing"],
    "tokenizer": llm.meta["tokenizer"],
    "sources": {"vision": "stage0_vision", "llm": "stage0_llm"},
    "not_carried": [],
  }
  params = trees.merge(vision.params, llm.params)
  checkpoint.save_packaged(to, params, meta=meta)
  done = {
    name: checkpoint.read_json(run / name / "done.json")
    for name in ("stage0_vision", "stage0_llm")
  }
  made = {
    "command": "python -m pivot_jax.main --config=configs/pivot.py:from_scratch",
    "stages": {
      name: {
        key: json.loads(json.dumps(record[key]))
        for key in ("fields", "seconds", "metrics", "versions")
      }
      for name, record in done.items()
    },
  }
  checkpoint.write_json(to / "made.json", made)


if __name__ == "__main__":
  app.run(main)
