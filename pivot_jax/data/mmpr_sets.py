"""The paper's training sets out of MMPR, as sources and as its own files.

A set is one source, so SFT and DPO read the same rows in the same order. How
the rows are chosen is `mmpr_choice.py`'s.
"""

import functools
import json
import logging
import os
import pathlib
from typing import Any

import numpy as np

from pivot_jax.data import images, mmpr, mmpr_choice, records, tokens
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")

KINDS = ("official", "fixed", "all")


def open_set(
  path: str | os.PathLike,
  image_root: str | os.PathLike | None = None,
  *,
  tokenizer: str | os.PathLike = "",
  selection: str = "all",
  size: int = 20_000,
  seed: int = 777,
  new_fraction: float | None = None,
  only: str = "",
  text_only: bool = False,
  several: bool = False,
  image_size: int | None = None,
  resample: str = "bicubic",
  max_pixels: int = images.MAX_PIXELS,
  decoder: str = "pil",
  flawed: bool = False,
) -> mmpr.Mmpr | mmpr.Selected:
  """Returns a training set of the `meta.json` at `path` as a source.

  Args:
    tokenizer: the folder of the one that counts tokens, Qwen2.5's.
    selection: "official", "fixed", or "all" for every row, whatever else is
      asked for.
    flawed: see `mmpr.Mmpr`; "official" has no such lines, "fixed" leaves them
      out.
  """
  if selection not in KINDS:
    raise InputError(f"selection={selection!r}: choose one of {KINDS}")
  source = mmpr.Mmpr(
    path,
    image_root,
    image_size=image_size,
    resample=resample,
    max_pixels=max_pixels,
    decoder=decoder,
    gif_as_jpg=selection == "official",
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


def write_paper_files(
  selection: mmpr_choice.Selection, folder: str | os.PathLike
) -> None:
  """Writes the two JSON files of the paper's code, row for row alike.

  sft_mmpr_{size}_{seed}.json has LLaVA records of question and chosen answer,
  dpo_mmpr_{size}_{seed}.json records of id, prompt, chosen, rejected, image.
  An image is MMPR-v1.2/{root}/{image}, and the question opens with it.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  source = selection.open()
  rows = [source.text(index) for index in range(len(source))]
  name = f"{len(rows)}_{selection.seed}.json"
  for kind, make in (("sft", _sft_record), ("dpo", _dpo_record)):
    lines = (json.dumps(make(row), ensure_ascii=False) for row in rows)
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    (folder / f"{kind}_mmpr_{name}").write_text(text, "utf-8")


@functools.lru_cache(maxsize=8)
def _chosen(path, image_root, tokenizer, selection, fields) -> np.ndarray:
  """Chooses once a run: each of its stages opens the set anew."""
  loaded = tokens.load_tokenizer(tokenizer)

  def count(text: str) -> int:
    # No token is shorter than a letter, so that short texts need no count.
    if text.isascii() and len(text) < mmpr_choice.MAX_TOKENS:
      return len(text)
    return len(loaded.encode(text))

  if selection == "fixed":
    found = mmpr_choice.select_fixed(path, image_root, count, **dict(fields))
  else:
    found = mmpr_choice.select_official(
      path, None, count, image_root=image_root, **dict(fields)
    )
  LOG.info("%s: %d rows chosen, %s", path, len(found.indices), dict(fields))
  for reason, number in sorted(found.refused.items()):
    LOG.info("%s: %d rows refused: %s", path, number, reason)
  return found.indices


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
