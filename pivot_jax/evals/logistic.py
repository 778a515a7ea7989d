"""Multinomial logistic regression with an L2 penalty, solved to convergence.

Arrays in, arrays out: no data, no features, no choice of lambda (that is
stages/linear_probe.py). Legend: N examples, D feature width, C classes.

The objective is scikit-learn's, with C = 1/lambda: the sum over examples of
the cross-entropy plus lambda/2 times the squared weights; intercepts are free.
It is solved by full-batch L-BFGS in coordinates in which it is well scaled
(centred principal axes, each divided by the root of its expected curvature).
That is a change of variables, so the optimum is the same.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int


class Classifier(NamedTuple):
  """A linear classifier in the features' own coordinates."""

  weights: Float[np.ndarray, "D C"]
  intercepts: Float[np.ndarray, "C"]

  def scores(self, features: Float[np.ndarray, "N D"]):
    """Return the logits [N, C]."""
    return features.astype(np.float64) @ self.weights + self.intercepts


class Basis(NamedTuple):
  """Centred features in their principal axes, on the device in float64."""

  rotated: Float[Array, "N D"]
  mean: Float[np.ndarray, "D"]
  axes: Float[np.ndarray, "D D"]
  variance: Float[np.ndarray, "D"]


class Solution(NamedTuple):
  """The point at which the solver stopped.

  A gradient below the tolerance is a minimum.
  `point` holds weights [D, C] and intercepts [C] in the axes of the basis.
  """

  point: tuple[np.ndarray, np.ndarray]
  iterations: int
  gradient: float


def principal_axes(features: Float[np.ndarray, "N D"]) -> Basis:
  """Return features rotated to their principal axes, in float64 throughout.

  Float32 would drown the small columns of ill-scaled features in the rounding
  of the large ones.
  """
  mean = features.mean(axis=0, dtype=np.float64)
  centred = features.astype(np.float64) - mean
  variance, axes = np.linalg.eigh(centred.T @ centred / len(features))
  with jax.enable_x64(True):
    rotated = jnp.asarray(centred @ axes)
  return Basis(rotated, mean, axes, np.maximum(variance, 0.0))


def fit(
  basis: Basis,
  labels: Int[np.ndarray, "N"],
  weight: Float[np.ndarray, "N"],
  *,
  num_classes: int,
  lam: float,
  start: tuple[np.ndarray, np.ndarray] | None = None,
  tolerance: float = 1e-7,
  max_iterations: int = 1000,
) -> Solution:
  """Return the logistic regression of `labels` on the basis at one lambda.

  Examples of weight 0 do not count, so that a fit on a part of the data and
  one on all of it share an executable. `start` warm-starts the solver. It
  stops once the gradient norm in the scaled coordinates, in which a typical
  curvature is 1, is below `tolerance`. At 1e-7 probabilities are within 1e-5
  of the optimum's unless the classes are separable and lambda is tiny; then
  the weights grow without changing a prediction.
  """
  if lam <= 0:
    raise ValueError(f"lambda is {lam}; without a penalty there is no optimum")
  total = float(weight.sum())
  if total <= 0:
    raise ValueError("every example has weight 0: there is nothing to fit")
  if start is None:
    width = basis.rotated.shape[1]
    start = (np.zeros((width, num_classes)), np.zeros(num_classes))
  # The curvature where all classes are equally likely.
  curvature = basis.variance / num_classes + lam / total
  # Float32 does not resolve the objective of nearly separable classes.
  with jax.enable_x64(True):
    weights, intercepts, iterations, gradient = _minimise(
      jnp.asarray(start[0], jnp.float64),
      jnp.asarray(start[1], jnp.float64),
      basis.rotated,
      jnp.asarray(labels, jnp.int32),
      jnp.asarray(weight / total, jnp.float64),
      jnp.asarray(curvature**-0.5)[:, None],
      jnp.float64(num_classes**0.5),
      jnp.float64(lam / total),
      jnp.float64(tolerance),
      jnp.int32(max_iterations),
    )
  point = (np.asarray(weights), np.asarray(intercepts))
  return Solution(point, int(iterations), float(gradient))


def classifier(basis: Basis, solution: Solution) -> Classifier:
  """Return the solution as a classifier of the original features."""
  weights = basis.axes @ solution.point[0]
  return Classifier(weights, solution.point[1] - basis.mean @ weights)


@jax.jit
def _minimise(
  weights, intercepts, features, labels, share, scale, intercept_scale,
  penalty, tolerance, max_iterations,
):  # fmt: skip
  """Run L-BFGS on the scaled weights until the gradient is small.

  Everything that differs between the points of a path is an argument, so one
  executable serves them all.
  """

  def objective(point):
    weights = point[0] * scale
    logits = features @ weights + (point[1] * intercept_scale)[None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (share * losses).sum() + 0.5 * penalty * (weights**2).sum()

  solver = optax.lbfgs(memory_size=20)
  value_and_gradient = optax.value_and_grad_from_state(objective)

  def unfinished(carry):
    _, _, gradient, count = carry
    return (gradient > tolerance) & (count < max_iterations)

  def iterate(carry):
    point, state, _, count = carry
    value, gradient = value_and_gradient(point, state=state)
    updates, state = solver.update(
      gradient, state, point, value=value, grad=gradient, value_fn=objective
    )
    norm = optax.tree.norm(optax.tree.get(state, "grad"))
    return optax.apply_updates(point, updates), state, norm, count + 1

  point = (weights / scale, intercepts / intercept_scale)
  carry = (point, solver.init(point), jnp.inf, 0)
  point, _, norm, count = jax.lax.while_loop(unfinished, iterate, carry)
  weights, intercepts = point[0] * scale, point[1] * intercept_scale
  return weights, intercepts, count, norm
