"""Print the main tables of a report as Markdown, for the README.

python bench/report_table.py runs/pivot/report.json
"""

import argparse
import pathlib

from pivot_jax.files import read_json

ARMS = ("original", "stage1", "sft", "dpo")
COLUMNS = (
  ("vqa/category/general", "general", 100),
  ("vqa/category/knowledge", "knowledge", 100),
  ("vqa/category/ocr", "ocr", 100),
  ("vqa/category/vision", "vision", 100),
  ("linear/encoder/top1", "linear probe", 100),
  ("linear/projector/top1", "with projector", 100),
  ("segment/macro_recall", "patch recall", 100),
  ("segment/miou", "mIoU", 100),
  ("gradient/encoder/sft", "gradient, SFT", 1),
  ("gradient/encoder/dpo_total", "gradient, DPO", 1),
)


def main() -> None:
  """Print the arms, what needs no image, the MLLMs and the differences."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("report", type=pathlib.Path)
  found = read_json(parser.parse_args().report)["results"]
  arms = found["arms"]
  shown = [c for c in COLUMNS if any(c[0] in one for one in arms.values())]
  _table(
    "arm",
    shown,
    {name: arms[name] for name in ARMS if name in arms}
    | {
      "*majority answer*": found["majority"],
      "*question alone*": found["blind"],
    },
  )
  _table(
    "difference",
    shown,
    {
      name.replace("-", " − "): values
      for name, values in found["differences"].items()
    },
  )
  mllm = [(n.replace("vqa", "mllm"), *rest) for n, *rest in COLUMNS[:4]]
  blind = {k.replace("vqa", "mllm"): v for k, v in found["blind"].items()}
  _table("MLLM", mllm, found["mllms"] | {"*question alone*": blind})


def _table(head, columns, rows) -> None:
  print(f"| {head} | " + " | ".join(name for _, name, _ in columns) + " |")
  print("|" + "---|" * (1 + len(columns)))
  for row, values in rows.items():
    cells = [_cell(values.get(key), scale) for key, _, scale in columns]
    print(f"| {row} | " + " | ".join(cells) + " |")
  print()


def _cell(value, scale) -> str:
  if value is None:
    return ""
  if value.get("shown") is False:
    return "none shown"
  digits = 1 if scale == 100 else 2
  number = f"{scale * value['value']:.{digits}f}"
  error = value.get("se")
  return number if error is None else f"{number} ± {scale * error:.{digits}f}"


if __name__ == "__main__":
  main()
