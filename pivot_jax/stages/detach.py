"""Cuts encoder and projector out of an MLLM: the product of the recipe.

  c.detach_dpo = stage("detach", inputs=dict(init="@STAGE"))

Leaves our artifact (`params/` with vision and projector) and `hf/`, a folder
that transformers' class of the encoder loads (`SiglipVisionModel`): all N
blocks, the features being `hidden_states[-2]`. The last block, which nobody
reads, is that of the weights the encoder came from; of a toy, inert.
"""

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from pivot_jax import addresses, processes, trees
from pivot_jax.errors import InputError
from pivot_jax.weights import artifacts, checkpoint
from pivot_jax.weights.convert import hf

# Parts that the model must have; looked for before anything runs.
NEEDS = ("vision",)


def address_of(name: str, inputs: Mapping[str, str]) -> str:
  """Return where the encoder comes from; raise InputError if nothing says."""
  for key in ("init", "vision"):
    if inputs.get(key):
      return inputs[key]
  raise InputError(
    f"{name}: has neither init nor vision in inputs: give the MLLM, as "
    'init="@STAGE", or an encoder, as vision="hf:DIR"'
  )


def run(
  config: ConfigDict, inputs: Mapping[str, str], out: pathlib.Path
) -> dict[str, Any]:
  """Write both forms; return the parameter count and the fingerprint.

  Of several processes the first does, for which the others wait.
  """
  del config
  processes.beat("detaching the encoder", allow=processes.SLOW)
  address = address_of(out.name, inputs)
  return processes.decide("detach", lambda: _detach(address, out))


def _detach(address: str, out: pathlib.Path) -> dict[str, Any]:
  """Read vision and projector, of the model no more, and write both forms."""
  loaded = checkpoint.load(address, deferred=True)
  checkpoint.check_parts(address, loaded, NEEDS)
  kept = trees.unflatten(
    {
      path: np.asarray(leaf)
      for path, leaf in trees.flatten(loaded.params).items()
      if path.partition("/")[0] in ("vision", "projector")
    }
  )
  meta = loaded.meta | {"parts": sorted(kept), "detached_from": address}
  artifacts.save(out, kept, meta=meta, alone=True)
  folder = addresses.parse(address).path / "tokenizer"
  if folder.is_dir():
    shutil.copytree(folder, out / "tokenizer", dirs_exist_ok=True)
  unread, _ = checkpoint.unread(loaded.meta)
  hf.save_vision(
    out / "hf",
    loaded.vision,
    kept["vision"],
    unread=unread,
    resample=checkpoint.resample(loaded.meta) or "bicubic",
  )
  return {
    "parameters": trees.count(kept["vision"]),
    "fingerprint": trees.digest(trees.fingerprint(kept["vision"])),
  }
