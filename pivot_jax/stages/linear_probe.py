"""Linear probe: frozen features, then multinomial logistic regression.

  c.linear_probe_dpo = stage("linear_probe", inputs=dict(init="@detach_dpo"))

For how linearly separable the classes are in what a vision encoder (and the
projector behind it) gives out: paper.md 5.1. It trains nothing but the linear
classifier and is not for patch labels (segment_probe). Features are the mean
over an image's patch tokens, which the paper leaves open, and are not
standardised, as in scikit-learn's default. Legend: N images, P patches,
D feature width, C classes.

The objective and its solver are logistic.py's; lambda is 1/C of scikit-learn.
"""

import functools
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from pivot_jax import errors, files, metrics, processes, sharding
from pivot_jax.data import feed
from pivot_jax.evals import features, logistic
from pivot_jax.models import layers
from pivot_jax.training import loop
from pivot_jax.weights import checkpoint

LOG = logging.getLogger("pivot_jax")
# Parts that the model must have; looked for before anything runs.
NEEDS = ("vision",)


def prototypes(
  features: Float[np.ndarray, "N D"],
  labels: Int[np.ndarray, "N"],
  *,
  num_classes: int,
) -> logistic.Classifier:
  """Return the nearest-class-mean classifier, paper.md 5.1.

  The class means are the linear weights, and minus half their squared norms
  the intercepts, so the highest score is the nearest mean. A class without
  examples can never win.
  """
  counts = np.bincount(labels, minlength=num_classes)
  sums = np.zeros((num_classes, features.shape[1]))
  np.add.at(sums, labels, features.astype(np.float64))
  means = sums / np.maximum(counts, 1)[:, None]
  intercepts = np.where(counts > 0, -0.5 * (means**2).sum(axis=1), -np.inf)
  return logistic.Classifier(means.T, intercepts)


def ranks(
  scores: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N"]
) -> Int[np.ndarray, "N"]:
  """Return how many classes are placed before the true one (0 = top-1).

  Equal scores are placed in the order of their class numbers, as argmax does.
  """
  own = scores[np.arange(len(labels)), labels][:, None]
  earlier = np.arange(scores.shape[1]) < labels[:, None]
  return ((scores > own) | ((scores == own) & earlier)).sum(axis=1)


def validation_split(
  labels: Int[np.ndarray, "N"], *, fraction: float, seed: int
) -> Bool[np.ndarray, "N"]:
  """Return which training examples are held out to choose lambda.

  Of each class `fraction` is held out, one example at least, and one at least
  stays; a class of one example stays as a whole.
  """
  held = np.zeros(len(labels), bool)
  order = np.random.default_rng(seed).permutation(len(labels))
  for name in np.unique(labels):
    own = order[labels[order] == name]
    size = max(1, round(fraction * len(own)))
    held[own[: min(size, len(own) - 1)]] = True
  return held


def probe(
  features: Float[np.ndarray, "N D"],
  labels: Int[np.ndarray, "N"],
  *,
  num_classes: int,
  lambdas: Sequence[float],
  held_out: Bool[np.ndarray, "N"],
  tolerance: float,
  max_iterations: int,
  between: Callable[[], None] = lambda: None,
) -> tuple[logistic.Classifier, dict]:
  """Return the classifier at the best lambda, and the path that chose it.

  The path runs from the strongest penalty to the weakest, each fit starting
  from the last, on the examples that are not held out. The lambda of the
  highest held-out accuracy (the strongest among equals) is refitted on all.
  Where that tells no lambda from another, as with nothing held out, it is the
  one nearest to 1, scikit-learn's default. `chosen_by` says which way it was,
  and `lambda_at_end` whether it is the first or last of several. `between` is
  called before each fit.
  """
  basis = logistic.principal_axes(features)
  solve = functools.partial(
    logistic.fit,
    basis,
    labels,
    num_classes=num_classes,
    tolerance=tolerance,
    max_iterations=max_iterations,
  )
  path, points, point = [], [], None
  grid = sorted(lambdas, reverse=True)
  for lam in grid:
    between()
    solution = solve((~held_out).astype(np.float32), lam=lam, start=point)
    point = solution.point
    scores = logistic.classifier(basis, solution).scores(features[held_out])
    right = ranks(scores, labels[held_out]) == 0
    top1 = float(right.mean()) if held_out.any() else None
    path.append(_path_entry(lam, solution, top1))
    points.append(point)
  best, way = _best([entry["validation_top1"] for entry in path], grid)
  lam = grid[best]
  final = solve(np.ones(len(labels), np.float32), lam=lam, start=points[best])
  chosen = {
    "lambda": lam,
    "chosen_by": way,
    "lambda_at_end": len(grid) > 1 and best in (0, len(grid) - 1),
    "path": path,
    "refit": _path_entry(lam, final, None),
  }
  _warn(chosen, tolerance)
  return logistic.classifier(basis, final), chosen


def run(
  config: ConfigDict, inputs: Mapping[str, str], out: pathlib.Path
) -> dict[str, Any]:
  """Probe the encoder, and the projector if there is one, of `inputs["init"]`.

  Returns per feature kind ("encoder", "projector") `KIND/top1`, `KIND/top5`
  (from five classes on) and `KIND/prototype_top1`, and of the choice of lambda
  `KIND/lambda`, `KIND/lambda_chosen_by` and `KIND/lambda_at_end`. Writes
  `predictions.npz`, item by item for paired comparisons: `label` and per kind
  `KIND_prediction`, `KIND_correct` and `KIND_prototype_correct`; and
  `path.json`, per kind the lambda, its path and the refit.
  """
  model = checkpoint.load_model(
    inputs["init"],
    needs=NEEDS,
    compute=layers.Compute(**config.compute.to_dict()),
  )
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh), layers.logical_rules(sharding.ACTIVATION_RULES):
    (train, labels), (test, truth) = (
      _features(config, model, config.sources[name].to_dict(), mesh)
      for name, _ in config.data
    )
  num_classes = int(max(labels.max(), truth.max())) + 1
  low, high, count = config.lambdas
  processes.beat("fitting", allow=processes.SLOW)
  measured, chosen, predictions = {}, {}, {"label": truth}
  for kind in train:
    fitted, chosen[kind] = probe(
      train[kind],
      labels,
      num_classes=num_classes,
      lambdas=np.geomspace(low, high, count).tolist(),
      held_out=validation_split(
        labels, fraction=config.validation, seed=config.seed
      ),
      tolerance=config.tolerance,
      max_iterations=config.max_iterations,
      between=lambda: _between(config.name),
    )
    nearest = prototypes(train[kind], labels, num_classes=num_classes)
    scores = fitted.scores(test[kind])
    prototype = ranks(nearest.scores(test[kind]), truth)
    measured |= accuracies(kind, ranks(scores, truth), prototype, num_classes)
    measured |= {
      f"{kind}/lambda": chosen[kind]["lambda"],
      f"{kind}/lambda_chosen_by": chosen[kind]["chosen_by"],
      f"{kind}/lambda_at_end": chosen[kind]["lambda_at_end"],
    }
    predictions[f"{kind}_prediction"] = scores.argmax(axis=1)
    predictions[f"{kind}_correct"] = ranks(scores, truth) == 0
    predictions[f"{kind}_prototype_correct"] = prototype == 0
  if processes.first():
    files.make_folder(out)
    files.save_arrays(out / "predictions.npz", predictions, compressed=True)
    files.write_json(out / "path.json", chosen)
  return measured


def _between(name: str) -> None:
  """Tell that the fits go on, and leave if that was asked for."""
  loop.stop_if_requested(name)
  processes.beat("fitting", allow=processes.SLOW)


def accuracies(
  kind: str,
  rank: Int[np.ndarray, "N"],
  prototype: Int[np.ndarray, "N"],
  num_classes: int,
) -> dict[str, metrics.Measured]:
  """Return a kind's metrics from the ranks of the true classes."""
  found = {f"{kind}/top1": metrics.share(int((rank == 0).sum()), len(rank))}
  # Among fewer classes the five best always hold the true one.
  if num_classes >= 5:
    found[f"{kind}/top5"] = metrics.share(int((rank < 5).sum()), len(rank))
  hits = int((prototype == 0).sum())
  found[f"{kind}/prototype_top1"] = metrics.share(hits, len(prototype))
  return found


def _features(
  config: ConfigDict,
  model: checkpoint.Model,
  spec: Mapping[str, Any],
  mesh: jax.sharding.Mesh,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Return ({kind: float32 [N, D]}, labels [N]) of a classification source."""
  found, labels, first, share = [], [], "", feed.Share.of(mesh)
  for batch in features.read(
    config,
    spec,
    model.mllm,
    {name: part for name, part in model.params.items() if name != "llm"},
    encode=features.pooled,
    frame=feed.images_and_labels,
    mesh=mesh,
  ):
    found.append(batch.features)
    labels.append(share.rows_of_all(batch.labels))
    first = first or (batch.name(0) if batch.rows else "")
  classes = np.concatenate(labels)
  if len(np.unique(classes)) == 1:
    raise errors.InputError(
      f"{config.name}: all {len(classes)} images of {first} and after have the "
      f"label {classes[0]}: give data of two classes or more"
    )
  kinds = found[0]
  return {k: np.concatenate([one[k] for one in found]) for k in kinds}, classes


def _path_entry(
  lam: float, solution: logistic.Solution, top1: float | None
) -> dict:
  return {
    "lambda": lam,
    "validation_top1": top1,
    "iterations": solution.iterations,
    "gradient": solution.gradient,
  }


def _best(
  scores: Sequence[float | None], grid: Sequence[float]
) -> tuple[int, str]:
  """Return the place of the lambda to take, and what chose it."""
  if len(grid) == 1:
    return 0, "given"
  if len(set(scores)) > 1:
    return int(np.argmax(scores)), "validation"
  return int(np.argmin(np.abs(np.log(grid)))), "default"


def _warn(chosen: Mapping[str, Any], tolerance: float) -> None:
  """Log what makes the chosen lambda, or a fit of its path, doubtful."""
  lam, path = chosen["lambda"], chosen["path"]
  score = path[0]["validation_top1"]
  if chosen["chosen_by"] == "default" and score is None:
    LOG.warning(
      "no class has two images, so none is held out to choose lambda: %g is "
      "taken",
      lam,
    )
  elif chosen["chosen_by"] == "default":
    LOG.warning(
      "all lambdas have the held-out accuracy %.4g, which chooses none: %g is "
      "taken",
      score,
      lam,
    )
  elif chosen["lambda_at_end"]:
    LOG.warning(
      "the best lambda, %g, is an end of the grid %g .. %g: a better one may "
      "lie beyond; widen `lambdas`",
      lam,
      path[-1]["lambda"],
      path[0]["lambda"],
    )
  far = [e for e in (*path, chosen["refit"]) if not e["gradient"] <= tolerance]
  if far:
    LOG.warning(
      "the solver stopped before its tolerance of %g: %s",
      tolerance,
      ", ".join(f"lambda {e['lambda']:g} at {e['gradient']:.1e}" for e in far),
    )
