"""The paper's training sets out of MMPR, as sources and as its own files.

A set is one source, so SFT and DPO read the same rows in the same order. How
the rows are chosen is `mmpr_choice.py`'s.
"""

import functools
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pivot_jax.data import images
from pivot_jax.data.sources import mmpr, mmpr_choice, records
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

KINDS = ("official", "fixed", "all")


def open_set(
  path: str | os.PathLike,
  image_root: str | os.PathLike | None = None,
  image_spec: images.ImageSpec = images.AS_THEY_ARE,
  *,
  tokenizer: str | os.PathLike = "",
  selection: str = "all",
  size: int = mmpr_choice.SIZE,
  seed: int = mmpr_choice.SEED,
  new_fraction: float | None = None,
  only: str = "",
  text_only: bool = False,
  several: bool = False,
  flawed: bool = False,
) -> mmpr.Mmpr | mmpr.Selected:
  """Return a training set of the `meta.json` at `path` as a source.

  Args:
    tokenizer: the folder of the one that counts tokens, Qwen2.5's.
    selection: "official", "fixed", or "all" for every row, whatever else is
      asked for, each as often as its `repeat_time` says.
    flawed: see `mmpr.Mmpr`; "official" has no such lines, "fixed" leaves them
      out.
  """
  if selection not in KINDS:
    raise InputError(f"selection={selection!r}: choose one of {KINDS}")
  source = mmpr.Mmpr(
    path,
    image_root,
    image_spec,
    gif_as_jpg=selection == "official",
    repeated=selection == "all",
    flawed=selection == "fixed" or (flawed and selection == "all"),
  )
  if selection == "all":
    return source
  wish = dict(size=size, seed=seed, new_fraction=new_fraction, only=only)
  if selection == "fixed":
    wish |= dict(text_only=text_only, several=several)
  elif text_only or several:
    raise InputError("text_only and several are for selection='fixed'")
  if not tokenizer:
    raise InputError(
      f"{path}: tokenizer: give the folder of the one that counts the tokens of"
      " answers, Qwen2.5's"
    )
  fields = tuple(wish.items())
  return mmpr.Selected(
    source, _chosen(path, source.root, str(tokenizer), selection, fields)
  )


def choose(
  path: str | os.PathLike,
  image_root: str | os.PathLike | None = None,
  *,
  tokenizer: str | os.PathLike,
  selection: str,
  wish: Mapping[str, Any],
) -> mmpr_choice.Selection:
  """Return the rows of a set, and logs how many were refused and why.

  Args:
    tokenizer: the folder of the one that counts tokens, Qwen2.5's.
    selection: "official" or "fixed".
    wish: further arguments of `select_official` or `select_fixed`.
  """
  if selection not in ("official", "fixed"):
    raise InputError(f"selection={selection!r}: choose official or fixed")
  count = _counter(tokenizer)
  if selection == "fixed":
    found = mmpr_choice.select_fixed(path, image_root, count, **wish)
  else:
    found = mmpr_choice.select_official(
      path, None, count, image_root=image_root, **wish
    )
  LOG.info("%s: %d rows chosen, %s", path, len(found.indices), dict(wish))
  for reason, number in sorted(found.refused.items()):
    LOG.info("%s: %d rows refused: %s", path, number, reason)
  return found


def paper_files(
  folder: str | os.PathLike, *, size: int, seed: int
) -> tuple[pathlib.Path, pathlib.Path]:
  """Return the files of a set, SFT's and DPO's, which must not be there yet.

  Raises:
    InputError: one of them exists.
  """
  names = [f"{kind}_mmpr_{size}_{seed}.json" for kind in ("sft", "dpo")]
  sft, dpo = (pathlib.Path(folder) / name for name in names)
  for path in (sft, dpo):
    if path.exists():
      raise InputError(f"{path}: exists; remove it, or give another folder")
  return sft, dpo


def write_paper_files(
  selection: mmpr_choice.Selection, folder: str | os.PathLike
) -> tuple[pathlib.Path, pathlib.Path]:
  """Write the two JSON files of the paper's code, row for row alike.

  sft_mmpr_{size}_{seed}.json has LLaVA records of question and chosen answer,
  dpo_mmpr_{size}_{seed}.json records of id, prompt, chosen, rejected, image.
  An image is MMPR-v1.2/{root}/{image}, and the question opens with it.

  Raises:
    InputError: one of the files exists, or the folder cannot be written.
  """
  source = selection.open()
  paths = paper_files(folder, size=len(source), seed=selection.seed)
  try:
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    for path, make in zip(paths, (_sft_record, _dpo_record)):
      _write_list(path, (make(source.text(i)) for i in range(len(source))))
  except OSError as error:
    raise InputError(f"{folder}: cannot be written: {error}") from None
  return paths


def _write_list(path: pathlib.Path, found: Iterable[Mapping[str, Any]]) -> None:
  """Write records as a JSON list, one a line; whole or not at all."""
  aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with aside.open("w", encoding="utf-8") as file:
      separator = "[\n"
      for record in found:
        file.write(separator + json.dumps(record, ensure_ascii=False))
        separator = ",\n"
      file.write("\n]\n")
    aside.rename(path)
  finally:
    aside.unlink(missing_ok=True)


@functools.lru_cache(maxsize=8)
def _chosen(path, image_root, tokenizer, selection, fields) -> np.ndarray:
  """Choose once a run: each of its stages opens the set anew."""
  return choose(
    path,
    image_root,
    tokenizer=tokenizer,
    selection=selection,
    wish=dict(fields),
  ).indices


def _counter(tokenizer: str | os.PathLike) -> mmpr_choice.Count:
  loaded = load_tokenizer(tokenizer)

  def count(text: str) -> int:
    # No token is shorter than a letter, so that short texts need no count.
    if text.isascii() and len(text) < mmpr_choice.MAX_TOKENS:
      return len(text)
    return len(loaded.encode(text))

  return count


def _sft_record(row: mmpr.Row) -> dict[str, Any]:
  turns = (("human", mmpr_choice.prompt(row)), ("gpt", row["chosen"]))
  return {
    "id": row["id"],
    **_image(row),
    "conversations": [{"from": role, "value": text} for role, text in turns],
    "data_source": row["data_source"],
  }


def _dpo_record(row: mmpr.Row) -> dict[str, Any]:
  return {
    "id": row["id"],
    "prompt": mmpr_choice.prompt(row),
    "chosen": row["chosen"],
    "rejected": row["rejected"],
    **_image(row),
  }


def _image(row: mmpr.Row) -> dict[str, Any]:
  paths = [
    f"{mmpr_choice.PREFIX}/{path}" for path in records.listed(row["image"])
  ]
  if not paths:
    return {}
  return {"image": paths if len(paths) > 1 else paths[0]}
