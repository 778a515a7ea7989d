"""Multinomial logistic regression with an L2 penalty, solved to convergence.

Arrays in, arrays out: no data, no features, no choice of lambda (that is
stages/linear_probe.py). Legend: N examples, D feature width, C classes.

The objective is scikit-learn's, with C = 1/lambda: the sum over examples of
the cross-entropy plus lambda/2 times the squared weights; intercepts are free.
It is solved by Newton's method: gradients in float64, so that the optimum is
exact, and each step by conjugate gradients in float32, which cost less than
half and only have to point the way. On centred principal axes, each divided by
the root of its expected curvature, they need tens of products.
"""

import functools
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
    """Returns the logits [N, C]."""
    return features.astype(np.float64) @ self.weights + self.intercepts


class Basis(NamedTuple):
  """Centred features in their principal axes, on the device in float64."""

  rotated: Float[Array, "N D"]
  mean: Float[np.ndarray, "D"]
  axes: Float[np.ndarray, "D D"]
  variance: Float[np.ndarray, "D"]


class Solution(NamedTuple):
  """Where the solver stopped; a gradient below the tolerance is a minimum.

  `point` holds weights [D, C] and intercepts [C] in the axes of the basis;
  `iterations` counts Newton steps.
  """

  point: tuple[np.ndarray, np.ndarray]
  iterations: int
  gradient: float


def principal_axes(features: Float[np.ndarray, "N D"]) -> Basis:
  """Returns features rotated to their principal axes, in float64 throughout.

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
  """Returns the logistic regression of `labels` on the basis at one lambda.

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
      jnp.asarray(basis.variance),
      (jnp.asarray(curvature**-0.5), jnp.float64(num_classes**0.5)),
      jnp.float64(lam / total),
      jnp.float64(tolerance),
      jnp.int32(max_iterations),
    )
  if not np.isfinite(gradient):
    raise ValueError(
      f"the regression at lambda {lam:g} is not finite: the features reach"
      f" {float(jnp.abs(basis.rotated).max()):.1e}; scale them"
    )
  point = (np.asarray(weights), np.asarray(intercepts))
  return Solution(point, int(iterations), float(gradient))


def classifier(basis: Basis, solution: Solution) -> Classifier:
  """Returns the solution as a classifier of the original features."""
  weights = basis.axes @ solution.point[0]
  return Classifier(weights, solution.point[1] - basis.mean @ weights)


class _State(NamedTuple):
  """A point [C, D], [C] and what the next step needs of it."""

  point: tuple[Float[Array, "C D"], Float[Array, "C"]]
  value: Float[Array, ""]
  gradient: tuple[Float[Array, "C D"], Float[Array, "C"]]
  odds: Float[Array, "C N"]


@jax.jit
def _minimise(
  weights, intercepts, features, labels, share, variance, scale, penalty,
  tolerance, max_iterations,
):  # fmt: skip
  """Runs Newton's method until the scaled gradient is small.

  Everything that differs between the points of a path is an argument, so one
  executable serves them all. The axis of the examples is the last: the other
  way round XLA multiplies at half the speed on a CPU.
  """
  evaluate = functools.partial(_evaluate, features, labels, share, penalty)
  narrow = features.astype(jnp.float32)

  def norm(state):
    return optax.tree.norm(jax.tree.map(jnp.multiply, state.gradient, scale))

  def unfinished(carry):
    state, count, moved = carry
    # Written so that nan goes on, to be reported.
    return ~(norm(state) <= tolerance) & (count < max_iterations) & moved

  def iterate(carry):
    state, count, _ = carry
    step = _newton_step(narrow, labels, share, variance, penalty, state)
    found, moved = _search(evaluate, state, step)

    def descend():
      # Where float32 does not hold the curvature.
      downhill = jax.tree.map(lambda g, s: -g * s**2, state.gradient, scale)
      return _search(evaluate, state, downhill)

    found, moved = jax.lax.cond(moved, lambda: (found, moved), descend)
    return found, count + 1, moved

  carry = (evaluate((weights.T, intercepts)), 0, True)
  state, count, _ = jax.lax.while_loop(unfinished, iterate, carry)
  return state.point[0].T, state.point[1], count, norm(state)


def _evaluate(features, labels, share, penalty, point) -> _State:
  """Returns the state at a point; one pass over the features each way."""
  weights, intercepts = point
  logits = weights @ features.T + intercepts[:, None]
  largest = logits.max(axis=0)
  powers = jnp.exp(logits - largest)
  total = powers.sum(axis=0)
  odds = powers / total
  own = jnp.arange(len(intercepts))[:, None] == labels
  losses = jnp.log(total) + largest - jnp.where(own, logits, 0).sum(axis=0)
  value = (share * losses).sum() + 0.5 * penalty * (weights**2).sum()
  slope = share * (odds - own)
  gradient = (slope @ features + penalty * weights, slope.sum(axis=1))
  return _State(point, value, gradient, odds.astype(jnp.float32))


def _newton_step(features, labels, share, variance, penalty, state):
  """Returns roughly the step to the minimum of the quadratic model.

  All in float32, and in coordinates scaled as if every class and example were
  equally certain; on principal axes that is close to what they are. A rough
  step costs iterations, not exactness.
  """
  share, variance, penalty = (
    x.astype(jnp.float32) for x in (share, variance, penalty)
  )
  odds = state.odds
  curvature = (share * odds * (1 - odds)).sum() / len(odds)
  scale = (
    (curvature * variance + penalty) ** -0.5,
    # Where every example is certain it rounds to zero.
    jnp.maximum(curvature, 1e-30) ** -0.5,
  )

  def curve(scaled):
    weights, intercepts = jax.tree.map(jnp.multiply, scaled, scale)
    logits = weights @ features.T + intercepts[:, None]
    # Relative to the true class, or all digits cancel where its odds are near 1.
    logits -= jnp.take_along_axis(logits, labels[None], axis=0)
    slope = share * odds * (logits - (odds * logits).sum(axis=0))
    bent = (slope @ features + penalty * weights, slope.sum(axis=1))
    return jax.tree.map(jnp.multiply, bent, scale)

  downhill = jax.tree.map(
    lambda x, size: -x.astype(jnp.float32) * size, state.gradient, scale
  )
  scaled, _ = jax.scipy.sparse.linalg.cg(curve, downhill, tol=0.1, maxiter=200)
  return jax.tree.map(
    lambda x, size: (x * size).astype(jnp.float64), scaled, scale
  )


def _search(evaluate, state: _State, step) -> tuple[_State, Array]:
  """Returns the state behind the step, halved until the objective falls.

  And whether it does: if no length is short enough, the state stays.
  """
  slope = optax.tree.vdot(state.gradient, step)
  # Near the optimum rounding exceeds what there is to gain.
  rounding = 1e-12 * jnp.abs(state.value)

  def rises(carry):
    length, trial = carry
    return ~falls(length, trial) & (length > 1e-10)

  def falls(length, trial):
    return trial.value <= state.value + 1e-4 * length * slope + rounding

  def shorten(carry):
    length = carry[0] / 2
    return length, evaluate(
      jax.tree.map(lambda x, s: x + length * s, state.point, step)
    )

  nowhere = state._replace(value=jnp.inf)
  length, trial = jax.lax.while_loop(rises, shorten, (2.0, nowhere))
  moved = falls(length, trial)
  kept = jax.tree.map(lambda a, b: jnp.where(moved, a, b), trial, state)
  return kept, moved
