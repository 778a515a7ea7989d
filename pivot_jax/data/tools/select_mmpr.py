"""`python -m pivot_jax.data select-mmpr`: write a training set of MMPR as lists.

  python -m pivot_jax.data select-mmpr datasets/MMPR-v1.2/meta.json \
    --set=under30 --tokenizer=weights/qwen --to=data/under30

DIR gets sft_mmpr_SIZE_SEED.json and dpo_mmpr_SIZE_SEED.json, the same rows in
the same order, and selection.json, the record of how they were chosen. Training
reads the second one with kind `preference`, for SFT as well.
"""

import argparse
import logging
import pathlib
from collections.abc import Sequence

from pivot_jax import addresses, output
from pivot_jax.data import opener
from pivot_jax.data.sources import mmpr_selection
from pivot_jax.data.tokenizer import Tokenizer, load_tokenizer
from pivot_jax.errors import InputError

LOG = logging.getLogger("pivot_jax")


def main(argv: Sequence[str]) -> int:
  """Run the command; return its exit status."""
  asked = _parser().parse_args(argv)
  # Before millions of rows are looked at.
  mmpr_selection.check_target(asked.to)
  tokenizer = load_tokenizer(addresses.tokenizer_folder(asked.tokenizer))
  selection = _choose(asked, token_counter(tokenizer))
  for reason, number in sorted(selection.refused.items()):
    LOG.info("%s: %d rows refused: %s", asked.meta, number, reason)
  how = {name: value for name, value in vars(asked).items() if name != "to"}
  how["tokenizer_sha256"] = tokenizer.fingerprint
  for path in mmpr_selection.write(selection, asked.to, how):
    output.show([f"{path}: {len(selection.indices)} rows"])
  output.show([f"their image paths begin in {selection.image_root}"])
  return 0


def token_counter(tokenizer: Tokenizer) -> mmpr_selection.Count:
  """Return a function that counts tokens, exactly where the limit is near."""

  def count(text: str) -> int:
    # No token is shorter than a letter, so that short texts need no count.
    if text.isascii() and len(text) < mmpr_selection.MAX_TOKENS:
      return len(text)
    return len(tokenizer.encode(text))

  return count


def _choose(
  asked: argparse.Namespace, count: mmpr_selection.Count
) -> mmpr_selection.Selection:
  """Return the rows that the command line asks for."""
  meta = pathlib.Path(asked.meta)
  if not meta.is_file():
    raise InputError(f"{meta}: no such file")
  if opener.format_of(meta) != "mmpr":
    raise InputError(f"{meta}: give MMPR's meta.json")
  wish = dict(size=asked.size, seed=asked.seed)
  wish |= mmpr_selection.asked_of(asked.set)
  if asked.fixed:
    wish |= dict(text_only=asked.text_only, several=asked.several)
    return mmpr_selection.select_fixed(meta, asked.images, count, **wish)
  if asked.text_only or asked.several:
    raise InputError("--text-only and --several are for --fixed")
  return mmpr_selection.select_official(
    meta, None, count, image_root=asked.images, **wish
  )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m pivot_jax.data select-mmpr",
    description="Writes a training set of MMPR as lists for SFT and DPO.",
  )
  add = parser.add_argument
  add("meta", metavar="META", help="MMPR's meta.json")
  add("--to", metavar="DIR", required=True, help="the folder to write")
  add(
    "--tokenizer",
    metavar="ADDRESS",
    required=True,
    help="folder or address of the one that counts tokens, Qwen2.5's",
  )
  add(
    "--set",
    default="official",
    help=f"{', '.join(mmpr_selection.SETS)}, or new_N for N percent (official)",
  )
  add(
    "--fixed",
    action="store_true",
    help="skips single rows where the released script ends a file or stops",
  )
  add(
    "--text-only", action="store_true", help="with --fixed: rows without image"
  )
  add(
    "--several", action="store_true", help="with --fixed: rows of many images"
  )
  add("--size", type=int, default=mmpr_selection.SIZE, help="pairs (20000)")
  add(
    "--seed", type=int, default=mmpr_selection.SEED, help="of the order (777)"
  )
  add("--images", metavar="DIR", help="the folder that holds META's roots")
  return parser
