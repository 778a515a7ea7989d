"""The optimizer against torch's formula as optax has it; the schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pivot_jax.errors import InputError
from pivot_jax.training import optimizer


def _tree():
  rng = np.random.default_rng(0)

  def leaf(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {"a": {"w": leaf(3, 2), "b": leaf(2)}, "c": {"w": leaf(4)}}


def _grads(step, scale=1.0):
  rng = np.random.default_rng(100 + step)
  return jax.tree.map(
    lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32),
    _tree(),
  )


def _run(tx, steps=5, scale=1.0):
  params = _tree()
  state = tx.init(params)
  update = jax.jit(tx.update)
  for step in range(steps):
    updates, state = update(_grads(step, scale), state, params)
    params = optax.apply_updates(params, updates)
  return params


def _assert_close(found, wanted):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_updates_are_those_of_clipped_adamw(decay, scale):
  factor = optimizer.schedule("cosine", steps=6, warmup=0.3)
  found = optimizer.adamw(
    _tree(), lr=((".*", 0.1),), factor=factor, weight_decay=((".*", decay),)
  )
  wanted = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(lambda t: 0.1 * factor(t), weight_decay=decay),
  )
  _assert_close(_run(found, scale=scale), _run(wanted, scale=scale))


def test_one_update_is_the_formula_of_adamw():
  tx = optimizer.adamw(
    _tree(),
    lr=((".*", 0.1),),
    factor=optimizer.schedule("constant", steps=1, warmup=0.0),
    weight_decay=((".*/w", 0.5), (".*", 0.0)),
    clip=1e9,
  )
  params, found = _tree(), _run(tx, steps=1)
  for (module, name), decay in {("a", "w"): 0.5, ("a", "b"): 0.0}.items():
    value = np.float64(params[module][name])
    grad = np.float64(_grads(0)[module][name])
    # At the first step the corrected moments are g and g squared.
    step = grad / (np.abs(grad) + 1e-8) + decay * value
    np.testing.assert_allclose(
      found[module][name], value - 0.1 * step, rtol=1e-5, atol=1e-6
    )


def test_rates_follow_the_first_rule_that_matches():
  def tx(*rules):
    return optimizer.adamw(
      _tree(),
      lr=rules,
      factor=optimizer.schedule("constant", steps=1, warmup=0.0),
      clip=1e9,
    )

  mixed = _run(tx(("a/w", 0.0), ("a/.*", 0.1), (".*", 0.2)))
  slow, fast = _run(tx((".*", 0.1))), _run(tx((".*", 0.2)))
  np.testing.assert_array_equal(mixed["a"]["w"], _tree()["a"]["w"])
  np.testing.assert_allclose(mixed["a"]["b"], slow["a"]["b"], rtol=1e-6)
  np.testing.assert_allclose(mixed["c"]["w"], fast["c"]["w"], rtol=1e-6)


def test_a_path_without_a_rate_is_refused():
  factor = optimizer.schedule("constant", steps=1, warmup=0.0)
  with pytest.raises(InputError, match="c/w"):
    optimizer.adamw(_tree(), lr=(("a/.*", 1.0),), factor=factor)


def test_a_rule_that_matches_nothing_is_named():
  with pytest.raises(InputError, match="lr: the rule 'd/.*'"):
    optimizer.check_rules((("d/.*", 1.0),), _tree(), "lr")


def test_rates_are_arrays_of_the_state_and_not_constants():
  factor = optimizer.schedule("constant", steps=1, warmup=0.0)
  states = [
    optimizer.adamw(_tree(), lr=((".*", rate),), factor=factor).init(_tree())
    for rate in (0.1, 0.2)
  ]
  update = jax.jit(
    optimizer.adamw(_tree(), lr=((".*", 9),), factor=factor).update
  )
  moved = [update(_grads(0), state, _tree())[0]["c"]["w"] for state in states]
  np.testing.assert_allclose(moved[1], 2 * moved[0], rtol=1e-6)
  assert update._cache_size() == 1


def test_cosine_is_the_schedule_of_the_paper():
  factor = optimizer.schedule("cosine", steps=234, warmup=0.03)
  assert float(factor(0)) == 0.0
  for step in range(234):
    ramp = 8  # ceil(0.03 * 234)
    wanted = step / ramp
    if step >= ramp:
      wanted = 0.5 * (1 + np.cos(np.pi * (step - ramp) / (234 - ramp)))
    assert float(factor(step)) == pytest.approx(wanted, abs=1e-6)
  assert float(factor(8)) == 1.0
  assert float(factor(234)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
  "steps, ramp", [(2180, 66), (12446, 374), (234, 8), (3008, 91)]
)
def test_the_peak_of_each_stage_comes_where_the_paper_has_it(steps, ramp):
  factor = optimizer.schedule("cosine", steps=steps, warmup=0.03)
  assert float(factor(ramp)) == 1.0
  assert float(factor(ramp - 1)) == pytest.approx((ramp - 1) / ramp)


def test_constant_stays_at_one_after_its_ramp():
  factor = optimizer.schedule("constant", steps=10, warmup=0.2)
  assert [float(factor(t)) for t in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]
  assert float(optimizer.schedule("constant", steps=10, warmup=0.0)(0)) == 1.0


def test_an_unknown_schedule_is_refused():
  with pytest.raises(InputError, match="linear"):
    optimizer.schedule("linear", steps=1, warmup=0.0)


def test_rounding_at_random_keeps_the_mean_and_the_nearest_two():
  exact = jnp.asarray([1.0, 1.001, -3.14159, 1e-30, 0.0], jnp.float32)
  many = jnp.broadcast_to(exact, (20_000, 5))
  found = optimizer.round_at_random(many, jax.random.PRNGKey(0))
  assert found.dtype == jnp.bfloat16
  found = np.asarray(found, np.float64)
  step = 2.0**-7 * np.maximum(np.abs(exact), 1e-38)
  assert (np.abs(found - np.asarray(exact)) < step).all()
  error = np.abs(found.mean(axis=0) - np.float64(exact))
  # Four standard errors of a step that is taken or not.
  assert (error <= 4 * 0.5 * step / np.sqrt(20_000)).all()
  assert (found[:, 0] == 1).all() and (found[:, 4] == 0).all()


def _descend(moments, steps=400):
  """Return how near Adam comes to the minimum of a noisy square."""
  target = jnp.linspace(-1, 1, 64)
  params = {"a": {"w": jnp.zeros(64)}}
  factor = optimizer.schedule("cosine", steps=steps, warmup=0.0)
  tx = optimizer.adamw(
    params, lr=((".*", 0.05),), factor=factor, clip=1e9, moments=moments
  )

  @jax.jit
  def step(carry, key):
    params, state = carry
    noise = jax.random.normal(key, (64,))
    grads = {"a": {"w": params["a"]["w"] - target + noise}}
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  keys = jax.random.split(jax.random.PRNGKey(1), steps)
  (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
  return params["a"]["w"], target, state


def test_bfloat16_moments_take_half_the_bytes_and_end_where_float32_does():
  exact, target, state = _descend("float32")
  rough, _, half = _descend("bfloat16")
  assert half[1].nu["a"]["w"].dtype == half[1].mu["a"]["w"].dtype
  assert half[1].nu["a"]["w"].dtype == jnp.bfloat16
  np.testing.assert_allclose(
    half[1].nu["a"]["w"].astype(jnp.float32).mean(),
    state[1].nu["a"]["w"].mean(),
    rtol=0.03,
  )
  distance = np.sqrt(np.mean((exact - target) ** 2))
  assert np.sqrt(np.mean((rough - exact) ** 2)) < 0.2 * distance


def test_moments_of_another_kind_are_refused():
  factor = optimizer.schedule("constant", steps=1, warmup=0.0)
  with pytest.raises(ValueError, match="moments"):
    optimizer.adamw(_tree(), lr=((".*", 1.0),), factor=factor, moments="int8")
