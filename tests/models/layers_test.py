"""Norms, rotation and attention against numbers written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pivot_jax.models import attention, layers


def _random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def test_layer_norm_centres_and_scales():
  x = _random(2, 5, 8) + 3
  scale, bias = _random(8, seed=1), _random(8, seed=2)
  module = layers.LayerNorm(epsilon=1e-6, dtype="float32")
  got = module.apply({"params": {"scale": scale, "bias": bias}}, x)
  wide = x.astype("f8")
  centred = wide - wide.mean(-1, keepdims=True)
  spread = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(
    got, centred / spread * scale + bias, rtol=0, atol=2e-6
  )


def test_rms_norm_scales_without_centring():
  x = _random(2, 5, 8) + 3
  scale = _random(8, seed=1)
  module = layers.RMSNorm(epsilon=1e-6, dtype="float32")
  got = module.apply({"params": {"scale": scale}}, x)
  wide = x.astype("f8")
  spread = np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(got, wide / spread * scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize("norm", [layers.LayerNorm, layers.RMSNorm])
def test_norms_keep_statistics_in_float32_under_bfloat16(norm):
  # 256 + 1 is 256 in bfloat16: a sum of squares there would lose the rest.
  x = jnp.asarray(_random(1, 4096), jnp.bfloat16)
  module = norm(epsilon=1e-6, dtype="bfloat16")
  params = module.init(jax.random.key(0), x)
  got = module.apply(params, x)
  exact = norm(epsilon=1e-6, dtype="float32").apply(params, x)
  assert got.dtype == jnp.bfloat16
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


def test_the_two_gelus_and_the_quick_one_differ():
  x = jnp.asarray([1.0])
  np.testing.assert_allclose(layers.gelu_erf(x), 0.8413447, atol=1e-6)
  np.testing.assert_allclose(layers.gelu_tanh(x), 0.8411920, atol=1e-6)
  np.testing.assert_allclose(layers.quick_gelu(x), 0.8457958, atol=1e-6)


def test_rotation_pairs_channel_i_with_i_plus_half():
  # Head dim 4, theta 100: angles p and p / 10.
  x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
  angles = layers.rotary_angles(jnp.asarray([[3]]), head_dim=4, theta=100.0)
  got = layers.rotate(x, angles)[0, 0, 0]
  a, b = 3.0, 0.3
  expected = [
    np.cos(a) - 3 * np.sin(a),
    2 * np.cos(b) - 4 * np.sin(b),
    3 * np.cos(a) + np.sin(a),
    4 * np.cos(b) + 2 * np.sin(b),
  ]
  np.testing.assert_allclose(got, expected, atol=2e-6)


def test_rotated_products_depend_on_the_distance_alone():
  q, k = _random(1, 1, 1, 8), _random(1, 1, 1, 8, seed=1)

  def product(i, j):
    def turn(x, position):
      angles = layers.rotary_angles(
        jnp.asarray([[position]]), head_dim=8, theta=1e4
      )
      return layers.rotate(x, angles)

    return (turn(q, i) * turn(k, j)).sum()

  np.testing.assert_allclose(product(7, 3), product(104, 100), atol=2e-5)
  assert abs(product(7, 3) - product(7, 4)) > 1e-2


def test_neighbouring_query_heads_share_a_key_head():
  rows, tokens, heads, shared, dim = 2, 5, 6, 2, 4
  q = _random(rows, tokens, heads, dim)
  k = _random(rows, tokens, shared, dim, seed=1)
  v = _random(rows, tokens, shared, dim, seed=2)
  mask = np.tril(np.ones((tokens, tokens), bool))[None].repeat(rows, 0)
  got = attention.attend(q, k, v, jnp.asarray(mask))
  for head in range(heads):
    kv = head // (heads // shared)
    scores = q[:, :, head] @ k[:, :, kv].transpose(0, 2, 1) / np.sqrt(dim)
    weights = np.exp(np.where(mask, scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(
      got[:, :, head], weights @ v[:, :, kv], rtol=0, atol=2e-6
    )


def test_a_query_that_sees_nothing_stays_finite_with_its_gradient():
  q, k, v = (_random(1, 3, 2, 4, seed=s) for s in range(3))
  mask = jnp.asarray([[[True, False, False], [False] * 3, [True] * 3]])

  def total(q, k, v):
    return (attention.attend(q, k, v, mask) ** 2).sum()

  value, gradients = jax.value_and_grad(total, (0, 1, 2))(q, k, v)
  assert np.isfinite(value)
  for gradient in gradients:
    assert np.isfinite(gradient).all()


def test_no_mask_is_a_mask_of_ones():
  q, k, v = (_random(2, 3, 2, 4, seed=s) for s in range(3))
  np.testing.assert_array_equal(
    attention.attend(q, k, v, None),
    attention.attend(q, k, v, jnp.ones((2, 3, 3), bool)),
  )


def test_an_unknown_remat_is_refused():
  with pytest.raises(ValueError, match="remat"):
    layers.Compute(remat="half")
