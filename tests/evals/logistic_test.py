"""The logistic regression against scikit-learn's."""

import numpy as np
import pytest
from sklearn import linear_model

from pivot_jax.evals import logistic

N, D, C = 300, 12, 4
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, C, N)
CENTRES = RNG.normal(size=(C, D))
PLAIN = (CENTRES[LABELS] + RNG.normal(size=(N, D)) + 3.0).astype(np.float32)
# Columns from 1e-3 to 1e3: plain L-BFGS does not get near the optimum here.
ILL = (PLAIN * np.geomspace(1e-3, 1e3, D)).astype(np.float32)


def fitted(features, lam, weight=None, **settings):
  basis = logistic.principal_axes(features)
  weight = np.ones(len(features), np.float32) if weight is None else weight
  solution = logistic.fit(
    basis, LABELS, weight, num_classes=C, lam=lam, **settings
  )
  return solution, logistic.classifier(basis, solution)


def sklearn(features, lam, labels=LABELS):
  # Newton in float64: its L-BFGS does not converge on the ill-scaled columns.
  return linear_model.LogisticRegression(
    C=1 / lam, solver="newton-cholesky", tol=1e-10, max_iter=1000
  ).fit(features.astype(np.float64), labels)


def probabilities(classifier, features):
  scores = classifier.scores(features)
  odds = np.exp(scores - scores.max(axis=1, keepdims=True))
  return odds / odds.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("lam", [1e3, 1.0, 1e-3])
@pytest.mark.parametrize("features", [PLAIN, ILL], ids=["plain", "ill_scaled"])
def test_the_optimum_is_scikit_learns(features, lam):
  solution, found = fitted(features, lam)
  assert solution.gradient < 1e-7
  want = sklearn(features, lam)
  size = np.abs(want.coef_).max()
  np.testing.assert_allclose(found.weights.T, want.coef_, atol=1e-4 * size)
  np.testing.assert_allclose(
    probabilities(found, features), want.predict_proba(features), atol=1e-5
  )
  agree = found.scores(features).argmax(1) == want.predict(features)
  assert agree.all()


def test_another_lambda_is_another_optimum():
  _, found = fitted(PLAIN, 1.0)
  want = sklearn(PLAIN, 2.0)
  assert np.abs(found.weights.T - want.coef_).max() > 1e-2


def test_examples_of_weight_zero_do_not_count():
  weight = (np.arange(N) < 200).astype(np.float32)
  _, found = fitted(PLAIN, 1.0, weight)
  want = sklearn(PLAIN[:200], 1.0, LABELS[:200])
  np.testing.assert_allclose(found.weights.T, want.coef_, atol=1e-4)


def test_a_warm_start_at_the_optimum_stays_there():
  cold, _ = fitted(PLAIN, 1.0)
  warm, _ = fitted(PLAIN, 1.0, start=cold.point)
  assert warm.iterations < cold.iterations
  np.testing.assert_allclose(warm.point[0], cold.point[0], atol=1e-4)


def test_a_path_compiles_once():
  basis = logistic.principal_axes(PLAIN)
  ones = np.ones(N, np.float32)
  logistic.fit(basis, LABELS, ones, num_classes=C, lam=1.0)
  before = logistic._minimise._cache_size()
  for lam in (1e4, 3.0, 1e-4):
    logistic.fit(basis, LABELS, ones * 0.5, num_classes=C, lam=lam)
  assert logistic._minimise._cache_size() == before


def test_a_limit_on_iterations_holds_and_shows():
  solution, _ = fitted(PLAIN, 1e-3, max_iterations=2)
  assert solution.iterations == 2
  assert solution.gradient > 1e-3


def test_no_penalty_is_refused():
  with pytest.raises(ValueError, match="penalty"):
    fitted(PLAIN, 0.0)


def test_what_cannot_be_fitted_is_refused():
  basis = logistic.principal_axes(PLAIN)
  with pytest.raises(ValueError, match="weight 0"):
    logistic.fit(basis, LABELS, np.zeros(N), num_classes=C, lam=1.0)
