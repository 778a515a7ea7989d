"""Print the table of a finished sweep as Markdown.

python -m pivot_jax.main --config=configs/pivot.py:sweep --workdir=runs/sweep
python bench/sweep_table.py runs/sweep > docs/sweep.md
"""

import argparse
import pathlib

from pivot_jax import files


def main() -> None:
  """Read the done.json of each stage of the sweep."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("run", type=pathlib.Path)
  run = parser.parse_args().run
  start = _metrics(run / "evaluate_start")
  names = [k for k in start if k.startswith("category/")]
  print("# Learning rates of stage 2\n")
  print(
    "Both objectives, the same rates, one seed each, from one checkpoint on the"
    " same rows;\nexact match in percent on the validation split, which the"
    " report never uses. `change`\nis the relative change of the encoder's"
    " weights. Made by\n`python -m pivot_jax.main --config=configs/pivot.py:sweep"
    "` and `bench/sweep_table.py`,\njax "
    f"{files.versions()['jax']}, CPU. n = {start['all']['n']}.\n"
  )
  head = [
    "objective",
    "rate",
    "all",
    *(n.split("/")[1] for n in names),
    "change",
  ]
  print("| " + " | ".join(head) + " |")
  print("|" + "---|" * len(head))
  print(_line("start", "", start, names, ""))
  tried: dict[str, list[tuple[str, float, float]]] = {}
  for folder in sorted(run.glob("stage2_*"), key=_place):
    objective, rate = folder.name.split("_")[1:]
    found = _metrics(run / f"evaluate_{objective}_{rate}")
    change = _metrics(folder)["change/vision"]
    shown = rate.replace("m", "-")
    print(_line(objective, shown, found, names, f"{change:.4f}"))
    mean = found["all"]
    tried.setdefault(objective, []).append((shown, mean["value"], mean["se"]))
  chosen = ", ".join(f"{k} {_choose(rates)}" for k, rates in tried.items())
  print(
    "\nTaken for each objective is the largest rate whose mean is within one"
    "\nstandard error of the best one's: rates too small to change anything would"
    f"\notherwise win or lose by chance. So: {chosen}."
  )


def _choose(rates: list[tuple[str, float, float]]) -> str:
  """Return the last of the rates, in rising order, that the rule allows."""
  _, best, error = max(rates, key=lambda rate: rate[1])
  return [name for name, value, _ in rates if value >= best - error][-1]


def _metrics(folder: pathlib.Path) -> dict:
  return files.read_json(folder / "done.json")["metrics"]


def _place(folder: pathlib.Path) -> tuple[str, float]:
  _, objective, rate = folder.name.split("_")
  return objective, float(rate.replace("m", "-"))


def _line(objective, rate, found, names, change) -> str:
  mean = found["all"]
  cells = [f"{100 * mean['value']:.1f} ± {100 * mean['se']:.1f}"]
  cells += [f"{100 * found[name]['value']:.1f}" for name in names]
  return "| " + " | ".join([objective, rate, *cells, change]) + " |"


if __name__ == "__main__":
  main()
