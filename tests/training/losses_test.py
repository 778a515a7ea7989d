"""The losses against formulas written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pivot_jax.training import losses

POLICY = np.array([[-10.0, -12.0], [-30.0, -25.0], [-7.0, -7.5]])
REFERENCE = np.array([[-11.0, -11.5], [-29.0, -27.0], [-7.0, -6.2]])
WEIGHT = np.full(3, 1 / 3)


def _dpo(policy, reference, weight, **settings):
  settings = {"beta": 0.1} | settings
  arrays = (jnp.asarray(x, jnp.float32) for x in (policy, reference, weight))
  return losses.dpo(*arrays, **settings)


def _mean(metrics, name):
  total, count = metrics[name]
  return float(total) / float(count)


def _log_sigmoid(x):
  return -np.log1p(np.exp(-np.float64(x)))


def test_dpo_of_one_pair_is_the_number_computed_by_hand():
  # logits = (-10 + 12) - (-11 + 11.5) = 1.5; -log sigmoid(0.15) = 0.620957.
  loss, metrics = _dpo(POLICY[:1], REFERENCE[:1], [1.0])
  assert float(loss) == pytest.approx(0.6209568, abs=1e-6)
  assert _mean(metrics, "rewards/chosen") == pytest.approx(0.1, abs=1e-6)
  assert _mean(metrics, "rewards/rejected") == pytest.approx(-0.05, abs=1e-6)
  assert _mean(metrics, "rewards/margins") == pytest.approx(0.15, abs=1e-6)
  assert _mean(metrics, "rewards/accuracies") == 1.0


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_is_the_sigmoid_loss_of_the_difference_of_log_ratios(beta):
  policy_ratio = POLICY[:, 0] - POLICY[:, 1]
  reference_ratio = REFERENCE[:, 0] - REFERENCE[:, 1]
  expected = -_log_sigmoid(beta * (policy_ratio - reference_ratio)).mean()
  loss, _ = _dpo(POLICY, REFERENCE, WEIGHT, beta=beta)
  assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_dpo_at_the_reference_is_ln_2():
  loss, metrics = _dpo(POLICY, POLICY, WEIGHT)
  assert float(loss) == pytest.approx(np.log(2), abs=1e-5)
  assert _mean(metrics, "rewards/margins") == 0.0
  assert _mean(metrics, "rewards/accuracies") == 0.0


def test_swapping_chosen_and_rejected_negates_the_margin():
  _, metrics = _dpo(POLICY, REFERENCE, WEIGHT)
  _, swapped = _dpo(POLICY[:, ::-1], REFERENCE[:, ::-1], WEIGHT)
  margin = _mean(metrics, "rewards/margins")
  assert margin != 0
  assert _mean(swapped, "rewards/margins") == pytest.approx(-margin, rel=1e-6)


def test_a_shift_that_both_answers_share_leaves_the_loss():
  loss, metrics = _dpo(POLICY, REFERENCE, WEIGHT)
  shifted, moved = _dpo(POLICY - 4.0, REFERENCE, WEIGHT)
  assert float(shifted) == pytest.approx(float(loss), abs=1e-6)
  assert _mean(moved, "rewards/chosen") == pytest.approx(
    _mean(metrics, "rewards/chosen") - 0.4, abs=1e-6
  )


def test_label_smoothing_mixes_in_the_swapped_loss():
  loss, _ = _dpo(POLICY, REFERENCE, WEIGHT, label_smoothing=0.2)
  right, _ = _dpo(POLICY, REFERENCE, WEIGHT)
  swapped, _ = _dpo(POLICY[:, ::-1], REFERENCE[:, ::-1], WEIGHT)
  expected = 0.8 * float(right) + 0.2 * float(swapped)
  assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_an_empty_pair_slot_weighs_nothing_in_loss_metrics_and_gradient():
  empty = np.array([[50.0, -80.0]])
  policy = np.concatenate([POLICY, empty])
  reference = np.concatenate([REFERENCE, 0 * empty])
  weight = np.append(WEIGHT, 0.0)
  loss, metrics = _dpo(POLICY, REFERENCE, WEIGHT)
  padded, padded_metrics = _dpo(policy, reference, weight)
  assert float(padded) == pytest.approx(float(loss), rel=1e-6)
  for name in metrics:
    assert _mean(padded_metrics, name) == pytest.approx(
      _mean(metrics, name), rel=1e-6
    )
  grads = jax.grad(lambda p: _dpo(p, reference, weight)[0])(
    jnp.asarray(policy, jnp.float32)
  )
  assert (np.asarray(grads)[-1] == 0).all()
  assert (np.asarray(grads)[:-1] != 0).all()


def test_the_gradient_of_dpo_raises_the_chosen_answer():
  gradient = jax.grad(lambda p: _dpo(p, REFERENCE, WEIGHT)[0])(
    jnp.asarray(POLICY, jnp.float32)
  )
  margin = 0.1 * ((POLICY - REFERENCE) @ [1.0, -1.0])
  expected = -0.1 / 3 / (1 + np.exp(margin))
  np.testing.assert_allclose(gradient[:, 0], expected, rtol=1e-5)
  np.testing.assert_allclose(gradient[:, 1], -expected, rtol=1e-5)


def test_dpo_is_finite_for_huge_margins():
  loss, _ = _dpo([[-1e4, 0.0], [0.0, -1e4]], np.zeros((2, 2)), [0.5, 0.5])
  assert float(loss) == pytest.approx(500.0, rel=1e-6)


def test_sft_is_the_weighted_negative_log_likelihood_without_padding():
  logps = jnp.array([-1.0, -2.0, -100.0])
  loss, metrics = losses.sft(logps, jnp.array([0.25, 0.75, 0.0]))
  assert float(loss) == pytest.approx(1.75)
  assert _mean(metrics, "logps/token") == pytest.approx(-1.5)


@pytest.fixture(scope="module")
def positions():
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(2, 11, 8)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(8, 17)), jnp.float32)
  return hidden, head, jnp.asarray(rng.integers(0, 17, (2, 11)), jnp.int32)


def test_token_logps_are_log_softmax_at_the_target(positions):
  hidden, head, targets = positions
  logits = np.float64(hidden) @ np.float64(head)
  expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  found = losses.token_logps(hidden, head, targets, chunk=100)
  np.testing.assert_allclose(
    found,
    np.take_along_axis(expected, np.asarray(targets)[..., None], -1)[..., 0],
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize("chunk", [1, 4, 8, 21])
def test_chunks_change_neither_value_nor_gradients(positions, chunk):
  hidden, head, targets = positions
  weight = jnp.linspace(0.5, 1.5, 22).reshape(2, 11)

  @functools.partial(jax.jit, static_argnums=2)
  def value(hidden, head, chunk):
    logps = losses.token_logps(hidden, head, targets, chunk=chunk)
    return (weight * logps).sum()

  graded = jax.value_and_grad(value, argnums=(0, 1))
  whole, chunked = graded(hidden, head, 64), graded(hidden, head, chunk)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(chunked)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [4, 64])
def test_bfloat16_inputs_give_float32_log_probabilities(positions, chunk):
  hidden, head, targets = positions
  hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
  found = losses.token_logps(hidden, head, targets, chunk=chunk)
  assert found.dtype == jnp.float32
  # Of the same rounded inputs: logits that were rounded to bfloat16 would be
  # off by about 1e-2.
  exact = losses.token_logps(
    hidden.astype(jnp.float32), head.astype(jnp.float32), targets, chunk=64
  )
  np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_a_chunk_of_nothing_is_refused(positions):
  with pytest.raises(ValueError, match="chunk"):
    losses.token_logps(*positions, chunk=0)


def test_the_heads_gradient_is_summed_over_chunks_in_float32():
  rng = np.random.default_rng(0)
  count = 2048
  hidden = jnp.asarray(1 + 0.1 * rng.normal(size=(1, count, 4)), jnp.bfloat16)
  head = jnp.asarray(rng.normal(size=(4, 5)), jnp.bfloat16)
  targets = jnp.zeros((1, count), jnp.int32)

  def gradient(hidden, head, chunk):
    def total(head):
      return losses.token_logps(hidden, head, targets, chunk=chunk).sum()

    return np.asarray(jax.grad(total)(head), np.float64)

  exact = gradient(hidden.astype(jnp.float32), head.astype(jnp.float32), count)
  found = gradient(hidden, head, 1)
  # One rounding at the end; 2,048 sums in bfloat16 would stop growing at a
  # small share of the whole.
  np.testing.assert_allclose(found, exact, rtol=2**-7)
  total = jnp.bfloat16(0)
  for _ in range(count):
    total = total + jnp.bfloat16(0.4)
  assert total < 0.5 * 0.4 * count
