"""Norms, rotation and attention against numbers written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pivot_jax.models import layers


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


def test_an_unknown_remat_is_refused():
  with pytest.raises(ValueError, match="remat"):
    layers.Compute(remat="half")
