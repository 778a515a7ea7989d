"""A linear probe's path of penalties on two CPU cores, beside scikit-learn.

  python -m bench.probe_cpu [--only=ours,newton_cg] [--seconds=900]

Needs `pip install -e ".[bench]"`. A step fits multinomial logistic regression
on 20,000 x 768 features and 100 classes at eight penalties, from the strongest
to the weakest, each fit starting from the last: scikit-learn's C from 1e-5 to
100. Each side walks the path once, in a process of its own that may take
`--seconds`, ours twice: the first is what a user waits for, and compiles.

The features are like an encoder's in what a solver feels: Gaussian classes in
random axes whose variances fall as 1/k, means that differ most in the large
axes, and a mean far from zero. The best of these classifiers is right on 84 %
of fresh examples, all of them train to the end.

Both sides are at the same optimum. Where each stops is judged by one function
(`objective`, float64): the gradient is below a thousandth of the penalty's
part of it, and the objectives agree to 1e-8. Our tolerance is one for the path;
scikit-learn's is set for each penalty as loosely as passes. Newton's method
with a Cholesky factor needs a Hessian of 47 GB here, and float32 input does not
get to these gradients.

N examples, D feature width, C classes, L penalties.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from bench import results, verdict

GOAL = 3.0
EXAMPLES, WIDTH, CLASSES = 20_000, 768, 100
# Penalty -> scikit-learn's tolerance, on the largest element of the gradient of
# the mean loss.
PATH = {
  1e5: 5e-6,
  1e4: 2e-6,
  1e3: 1.5e-6,
  1e2: 5e-7,
  1e1: 8e-8,
  1e0: 6e-9,
  1e-1: 8e-10,
  1e-2: 3e-11,
}
TOLERANCE = 1e-8
GRADIENT = 1e-3
AGREE = 1e-8


def setup(folder: pathlib.Path) -> None:
  """Write features and labels."""
  rng = np.random.default_rng(0)
  axes, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
  order = np.arange(1, WIDTH + 1)
  deviation = order**-0.5
  deviation *= np.sqrt(WIDTH / (deviation**2).sum())
  centres = 0.6 * rng.normal(size=(CLASSES, WIDTH)) * order**-0.25
  labels = rng.integers(0, CLASSES, EXAMPLES)
  parts = rng.normal(size=(EXAMPLES, WIDTH)) + centres[labels]
  features = (parts * deviation) @ axes.T + 2 * rng.normal(size=WIDTH)
  np.save(folder / "features.npy", features.astype(np.float32))
  np.save(folder / "labels.npy", labels)


def objective(
  features: np.ndarray,
  labels: np.ndarray,
  weights: np.ndarray,
  intercepts: np.ndarray,
  lam: float,
) -> tuple[float, float]:
  """Return the objective and its gradient's norm, in float64.

  The sum of the cross-entropies plus lambda/2 times the squared weights [D, C].
  The norm is relative to that of the penalty's gradient: r there means that the
  objective is above its minimum by about r squared times the penalty, at most.
  """
  features = features.astype(np.float64)
  rows = np.arange(len(labels))
  logits = features @ weights + intercepts
  largest = logits.max(axis=1, keepdims=True)
  powers = np.exp(logits - largest)
  total = powers.sum(axis=1, keepdims=True)
  losses = (np.log(total) + largest)[:, 0] - logits[rows, labels]
  slope = powers / total
  slope[rows, labels] -= 1
  gradient = features.T @ slope + lam * weights
  norm = np.hypot(np.linalg.norm(gradient), np.linalg.norm(slope.sum(axis=0)))
  value = losses.sum() + lam / 2 * (weights**2).sum()
  return float(value), float(norm / (lam * np.linalg.norm(weights)))


def _theirs(solver):
  from sklearn import linear_model

  def solve(features, labels):
    # With a free intercept this changes no optimum, and both solvers need it.
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean
    model = linear_model.LogisticRegression(
      solver=solver, max_iter=100_000, warm_start=True
    )
    for lam, tolerance in PATH.items():
      model.set_params(C=1 / lam, tol=tolerance).fit(centred, labels)
      weights = model.coef_.T.copy()
      yield weights, model.intercept_ - mean @ weights

  return solve


def _ours():
  from pivot_jax.evals import logistic

  def solve(features, labels):
    basis = logistic.principal_axes(features)
    point = None
    for lam in PATH:
      solution = logistic.fit(
        basis,
        labels,
        np.ones(len(labels), np.float32),
        num_classes=CLASSES,
        lam=lam,
        start=point,
        tolerance=TOLERANCE,
      )
      point = solution.point
      yield logistic.classifier(basis, solution)

  return solve


SOLVERS = {
  "ours": ("pivot_jax", _ours),
  "newton_cg": (
    "scikit-learn, newton-cg",
    functools.partial(_theirs, "newton-cg"),
  ),
  "lbfgs": ("scikit-learn, lbfgs", functools.partial(_theirs, "lbfgs")),
}


def walk(name: str, folder: pathlib.Path) -> dict[str, Any]:
  """Return seconds, objectives and gradients of a side's path."""
  features = np.load(folder / "features.npy")
  labels = np.load(folder / "labels.npy")
  solve = SOLVERS[name][1]()
  seconds, path = [], []
  for _ in range(2 if name == "ours" else 1):
    begun = time.perf_counter()
    path = list(solve(features, labels))
    seconds.append(time.perf_counter() - begun)
  judged = [
    objective(features, labels, *point, lam)
    for lam, point in zip(PATH, path, strict=True)
  ]
  return {
    "seconds": seconds,
    "objectives": [value for value, _ in judged],
    "gradients": [gradient for _, gradient in judged],
  }


def _in_process(name: str, folder: pathlib.Path, most: float):
  """Return the result of `walk`, None if it took over `most` seconds."""
  out = folder / f"{name}.json"
  command = [sys.executable, "-m", "bench.probe_cpu", f"--walk={name}"]
  try:
    subprocess.run([*command, f"--folder={folder}"], check=True, timeout=most)
  except subprocess.TimeoutExpired:
    return None
  return json.loads(out.read_text("utf-8"))


def summary(found: Mapping[str, Any], most: float) -> list[str]:
  """Return the page's table and lines; raise where the optima differ."""
  rows = [["", "seconds a path", "ours is faster by", "largest gradient"]]
  ours = found["ours"]
  for name, one in found.items():
    label = SOLVERS[name][0]
    if one is None:
      ratio = most / ours["seconds"][0]
      rows.append([label, f"over {most:.0f}", f"over {ratio:.1f}x", ""])
      continue
    off = np.abs(np.divide(one["objectives"], ours["objectives"]) - 1).max()
    if off > AGREE or max(one["gradients"]) > GRADIENT:
      raise SystemExit(f"{label}: another optimum ({off:.1e}, {one})")
    ratio = one["seconds"][0] / ours["seconds"][0]
    times = " / ".join(f"{s:.1f}" for s in one["seconds"])
    faster = "" if name == "ours" else f"{ratio:.2f}x"
    worst = max(one["gradients"])
    rows.append([label, times, faster, f"{worst:.1e}"])
  return [
    verdict.markdown(rows),
    "Of ours the first path compiles, and is the one that is compared; goal"
    f" {GOAL:g}x. Objectives agree to {AGREE:g}, gradients are below"
    f" {GRADIENT:g} of the penalty's. {EXAMPLES} x {WIDTH} features,"
    f" {CLASSES} classes, {len(PATH)} penalties.",
  ]


def main() -> None:
  """Run the benchmark and write bench/results/probe_cpu.{md,json}."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--only", default=",".join(SOLVERS))
  parser.add_argument("--seconds", type=float, default=900)
  parser.add_argument("--out", type=pathlib.Path, default="bench/results")
  parser.add_argument("--walk", help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.walk:
    path = flags.folder / f"{flags.walk}.json"
    path.write_text(json.dumps(walk(flags.walk, flags.folder)), "utf-8")
    return
  defaults = {"only": ",".join(SOLVERS), "seconds": 900}
  report = results.Report(results.command("probe_cpu", flags, defaults))
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    setup(folder)
    found = {
      solver: _in_process(solver, folder, flags.seconds)
      for solver in flags.only.split(",")
    }
  report.publish(
    flags.out,
    "probe_cpu",
    *summary(found, flags.seconds),
    machine=f", {os.cpu_count()} cores",
    found=found,
  )


if __name__ == "__main__":
  main()
