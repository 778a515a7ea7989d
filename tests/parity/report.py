"""Measures every case against transformers and writes the pages about it.

  python -m tests.parity.report --mutants=tests/parity/mutants.md > docs/parity.md

No published weight is needed: both sides compute the same random ones. The
tiny cases are those of `cases.py`, which `towers_test.py` and its neighbours
hold to their tolerance; those of a published width are measured here alone.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
import tempfile
import time

import jax
import numpy as np

from pivot_jax.configs import presets
from tests.parity import cases, foreign, towers_test

WIDE_TOLERANCE = 2e-5  # float32, absolute, outputs of up to twenty


def _wide(preset, build, read, *, blocks, side=112):
  """A published width, with fewer blocks and pixels."""
  known = presets.VISION[preset]
  heads = known["num_attention_heads"]
  names = ("hidden_size", "intermediate_size", "patch_size")
  sizes = {name: known[name] for name in names}
  sizes |= dict(num_attention_heads=heads, num_hidden_layers=blocks)
  if known.get("gated_mlp"):
    sizes |= dict(use_swiglu_ffn=True)
  return cases.Case(
    preset.rpartition("-")[0],
    f"{blocks} of {known['num_hidden_layers']} blocks, {side} px; width"
    f" {known['hidden_size']}, {heads} heads of {known['hidden_size'] // heads},"
    f" MLP {known['intermediate_size']}",
    cases.made(build, image_size=side, **sizes),
    image_size=side,
    tolerance=WIDE_TOLERANCE,
    **read,
  )


WIDE = (
  _wide("siglip-b16-224", foreign.siglip, cases.SIGLIP, blocks=12, side=224),
  _wide("siglip2-so400m16-384", foreign.siglip, cases.SIGLIP, blocks=4),
  _wide("siglip2-gopt16-384", foreign.siglip, cases.SIGLIP, blocks=4),
  _wide("clip-l14-336", foreign.clip, cases.CLIP, blocks=4),
  _wide("dinov2-b14-518", foreign.dinov2, cases.DINOV2, blocks=4),
  _wide("dinov2-g14-518", foreign.dinov2, cases.DINOV2, blocks=3),
  _wide("mae-h14-224", foreign.mae, cases.MAE, blocks=3),
  _wide("vit-h14-in21k-224", foreign.vit, cases.VIT, blocks=3),
  _wide("moco-v3-b16-224", foreign.moco, cases.MOCO, blocks=4),
)


_QWEN = presets.LLM["qwen2.5-0.5b"]
WIDE_LLM = cases.llm(
  "qwen2.5-0.5b",
  "4 of 24 blocks, vocabulary cut to 2,000; width 896, 14 heads of 64, 2 for"
  " keys and values, MLP 4864; tied head",
  cases.made(
    foreign.qwen2,
    tied=True,
    vocab_size=2000,
    num_hidden_layers=4,
    hidden_size=_QWEN["hidden_size"],
    intermediate_size=_QWEN["intermediate_size"],
    num_attention_heads=_QWEN["num_attention_heads"],
    num_key_value_heads=_QWEN["num_key_value_heads"],
  ),
  tolerance=WIDE_TOLERANCE,
)


@dataclasses.dataclass(frozen=True)
class Row:
  """The measures of a case; differences are absolute.

  theirs, ours: from torch in float64. gradient: relative to the largest entry;
    None without images. misses: of the mutants.
  """

  case: cases.Case
  scale: float
  difference: float
  theirs: float
  ours: float
  gradient: float | None
  misses: dict[str, float]

  @property
  def holds(self) -> bool:
    tolerance = self.case.tolerance
    return (
      self.difference < tolerance
      and (self.gradient or 0) < cases.GRADIENT_TOLERANCE
      and min(self.misses.values()) >= towers_test.MISS * tolerance
    )


def measure(case: cases.Case) -> Row:
  """Run torch, us and the mutants."""
  sys.stderr.write(f"{case.name}\n")
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    truth = towers_test.write(case, folder)
    subject = cases.open_folder(case, folder)
    output = subject.outputs()
    gradient = None
    if truth.gradient is not None:
      gradient = towers_test.relative(
        towers_test.gradient(subject, truth.direction), truth.gradient
      )
    return Row(
      case=case,
      scale=float(np.abs(truth.output).max()),
      difference=foreign.difference(output, truth.output),
      theirs=foreign.difference(truth.output, truth.exact),
      ours=foreign.difference(output, truth.exact),
      gradient=gradient,
      misses=towers_test.misses(truth, subject),
    )


def _cases(rows: list[Row]) -> str:
  """The table of what agrees."""
  header = (
    *("case", "details", "largest output", "outputs", "tolerance"),
    *("torch / ours to float64", "image gradient", "nearest mutant"),
  )
  return _table(header, map(_cells, rows), left=2)


def _mutants(rows: list[Row]) -> str:
  """The table of the mutants."""
  names = dict.fromkeys(name for row in rows for name in row.misses)
  mutants = [[name, *(_off(row, name) for row in rows)] for name in names]
  return _table(["mutant", *(x.case.name for x in rows)], mutants, left=1)


def _table(header, rows, *, left) -> str:
  rule = ["---"] * left + ["---:"] * (len(header) - left)
  lines = [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
  return "\n".join(lines)


def _cells(row: Row) -> list[str]:
  tolerance = row.case.tolerance
  gradient, nearest = row.gradient, min(row.misses.values())
  slope = "none"
  if gradient is not None:
    slope = _number(gradient, gradient < cases.GRADIENT_TOLERANCE)
  return [
    row.case.name,
    row.case.details,
    f"{row.scale:.1f}",
    _number(row.difference, row.difference < tolerance),
    f"{tolerance:.0e}",
    f"{row.theirs:.1e} / {row.ours:.1e}",
    slope,
    _number(nearest, nearest >= towers_test.MISS * tolerance),
  ]


def _number(value: float, holds: bool) -> str:
  return f"{value:.1e}" if holds else f"**{value:.1e}**"


def _off(row: Row, name: str) -> str:
  if name not in row.misses:
    return ""
  miss = row.misses[name] / row.case.tolerance
  return f"{miss:,.0f}" if miss >= towers_test.MISS else f"**{miss:.1f}**"


def _processor() -> str:
  """The name of the CPU, where Linux tells it."""
  path = pathlib.Path("/proc/cpuinfo")
  text = path.read_text() if path.exists() else ""
  found = re.search("model name.*: (.*)", text)
  return found[1] if found else platform.machine()


def page(small, wide, language, *, minutes: float) -> str:
  """Return docs/parity.md of three lists of rows."""
  rows = [*small, *wide, *language]
  names = ("jax", "flax", "torch", "transformers")
  versions = [f"{x} {importlib.metadata.version(x)}" for x in names]
  return _PAGE.format(
    verdict=f"{sum(row.holds for row in rows)} of {len(rows)}",
    mutants=sum(len(row.misses) for row in rows),
    versions=", ".join(versions),
    backend=jax.default_backend(),
    precision=jax.config.jax_default_matmul_precision or "not set",
    processor=f"{_processor()}, {os.cpu_count()} cores",
    date=datetime.date.today().isoformat(),
    minutes=f"{minutes:.1f}",
    miss=towers_test.MISS,
    small=_cases(small),
    wide=_cases(wide),
    language=_cases(language),
  )


_PAGE = """\
# Parity with transformers

Written by one command, not by hand:

    python -m tests.parity.report --mutants=tests/parity/mutants.md > docs/parity.md

{verdict} cases hold: output and gradient are transformers' within tolerance, in
float32, and every mutant shows ({mutants} in all,
[one by one](../tests/parity/mutants.md)). A number in bold does not hold.

- **Both sides** have the weights of one folder: transformers' `save_pretrained`
  writes it (for LLaVA-NeXT tensors are renamed), `pivot_jax.load` reads it.
- **Outputs** are those in use: of SigLIP and CLIP the hidden state before the last
  block without a norm; of other encoders that after the last block and its norm,
  without class tokens; of a language model or MLLM the logits of two prompts, one
  padded. The largest absolute difference counts.
- **To float64**: torch's and our distance from torch in float64, which tells rounding
  from error. transformers keeps the norms and angles of a language model and resized
  positions in float32.
- **Image gradient**: of sum(output x direction) by the image before normalization,
  torch's autograd against `jax.grad`; the largest difference relative to the largest
  entry. Tolerance 1e-05.
- **Mutants** have one detail wrong. Each must be off by {miss} tolerances; otherwise
  the comparison would prove nothing about that detail.
- **Weights, uint8 images and tokens** are random with fixed seeds. Biases are not
  zero, norms not one, LayerScale is between the two. Matrices have 0.6 of
  1/sqrt(inputs): at 1 rounding grows, and the tiny DINOv2 giant missed with one seed
  of six (7.9e-06). Patch embeddings and class token are small, since LayerNorm's
  epsilon shows only against a small variance.
- **Precision**: parameters, activations and products are float32, on jax's
  {backend} backend; `jax_default_matmul_precision` is {precision}, which means float32
  on a CPU. An accelerator's default is less; to compare there, set
  `jax.default_matmul_precision("float32")`.
- **Made with** {versions};
  CPU: {processor}; on {date}, in {minutes} minutes.

## What this does not show

- Published weights: only the same architectures, in files of the same layout.
- A key bias of an encoder: it adds the same to all scores of a query, which softmax
  does not see. `tests/weights/convert/hf_test.py` proves it by name and bytes.
- bfloat16, accelerators, generation, resizing of images and tokenizers.
- Depth and image size of the wide encoders, except SigLIP B/16.
- Files of other tools (big_vision, timm) and our exports, which have tests under
  `tests/weights/convert` and `tests/parity`.

## Tiny encoders

Three blocks, width 32 and 4 heads unless stated; patches of 8 pixels on images of 28,
of 14 on 46: what does not fill a patch is cut. `tests/parity/towers_test.py` holds
them to this.

{small}

## Encoders of a published width

Names and sizes of `configs/presets.py`, with fewer blocks and pixels, as the details
say. Measured by the command, and by the nightly tests.

{wide}

## Language models and MLLMs

Tiny ones have three blocks of width 48; MLLMs read a tiny encoder from above.
`tests/parity/towers_test.py` holds LLaVA-NeXT to this; `qwen2_test.py` and
`llava_test.py` hold Qwen2.5 and Llava on SigLIP to the same tolerance, with weights
of another scale.

{language}
"""

_MUTANTS = """\
# Mutants of the parity cases

Written with [docs/parity.md](../../docs/parity.md). How many tolerances each mutant is
off; of an MLLM, mutants without "LLM" are of its encoder.

{tables}
"""


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m tests.parity.report")
  parser.add_argument("--mutants", type=pathlib.Path, help="a second page")
  asked = parser.parse_args()
  start = time.monotonic()
  small = [measure(case) for case in cases.ENCODERS]
  wide = [measure(case) for case in WIDE]
  models = (*cases.LANGUAGE, cases.OFFICIAL, WIDE_LLM)
  language = [measure(case) for case in models]
  minutes = (time.monotonic() - start) / 60
  sys.stdout.write(page(small, wide, language, minutes=minutes))
  if asked.mutants:
    tables = "\n\n".join(map(_mutants, (small, wide, language)))
    asked.mutants.write_text(_MUTANTS.format(tables=tables), encoding="utf-8")
  sys.exit(not all(row.holds for row in (*small, *wide, *language)))


if __name__ == "__main__":
  main()
