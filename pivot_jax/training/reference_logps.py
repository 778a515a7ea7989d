"""The files of the score stage: DPO's reference log-probabilities as columns.

`reference.npz` holds id, logps [N, 2] float32 (chosen, rejected) and the crc of
each row's tokens; `reference.json` what they were made with. The stage that
writes them and the one that reads them know the format from here.
"""

import pathlib
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from pivot_jax import files, trees
from pivot_jax.data import chat
from pivot_jax.errors import InputError


def made_with(
  prints: Mapping[str, str], tokenizer: chat.Tokenizer, config: ConfigDict
) -> dict[str, str]:
  """Return what log-probabilities depend on, beside the rows.

  `prints` are the fingerprints of the parameters (`trees.fingerprint`).
  """
  return {
    "weights": trees.digest(prints),
    "tokenizer": tokenizer.fingerprint,
    "template": config.template,
    "mask": config.mask,
    "resample": config.resample,
  }


def write(
  folder: pathlib.Path, columns: Mapping[str, np.ndarray], made: Mapping
) -> None:
  """Write the columns id, logps and crc, and what they were made with."""
  files.make_folder(folder)
  files.save_arrays(folder / "reference.npz", columns)
  rows = trees.digest(list(columns["crc"]))
  files.write_json(folder / "reference.json", dict(made) | {"rows": rows})


def check_there(folder: pathlib.Path) -> None:
  """Raise InputError unless a folder holds what `write` leaves."""
  for name in ("reference.json", "reference.npz"):
    if not (folder / name).is_file():
      raise InputError(f"{folder / name}: not found; run the score stage again")


def read(
  folder: pathlib.Path, made: Mapping[str, str]
) -> dict[str, tuple[tuple[float, float], str]]:
  """Return {id: (log-probabilities, crc)}.

  Raises InputError if they were made with anything else than `made`.
  """
  check_there(folder)
  head = files.read_object(folder / "reference.json")
  wrong = [name for name in made if head.get(name) != made[name]]
  if wrong:
    raise InputError(
      f"{folder}: the reference log-probabilities were made with another "
      f"{wrong[0]} ({head.get(wrong[0])}, here {made[wrong[0]]}): run the score "
      "stage on the checkpoint that this stage starts from"
    )
  columns = np.load(folder / "reference.npz", allow_pickle=False)
  return {
    str(name): ((float(pair[0]), float(pair[1])), str(crc))
    for name, pair, crc in zip(
      columns["id"], columns["logps"], columns["crc"], strict=True
    )
  }
