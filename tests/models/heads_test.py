"""The projector and the segmentation head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pivot_jax.models import heads, layers


@pytest.mark.parametrize(
  "head",
  [
    heads.Projector(hidden_size=50, compute=layers.Compute()),
    heads.SegmentationHead(hidden_size=50, classes=7, compute=layers.Compute()),
  ],
  ids=["projector", "segmentation"],
)
def test_heads_are_two_linears_around_the_exact_gelu(head):
  x = np.random.default_rng(0).standard_normal((2, 3, 20)).astype("f4")
  params = head.init(jax.random.key(0), x)
  one, two = (params["params"][name] for name in ("linear_1", "linear_2"))
  hidden = x @ one["kernel"] + one["bias"][None, None]
  hidden = jax.nn.gelu(3 * hidden, approximate=False)
  scaled = {
    "params": {
      "linear_1": {"kernel": 3 * one["kernel"], "bias": 3 * one["bias"]},
      "linear_2": two,
    }
  }
  got = head.apply(scaled, x)
  np.testing.assert_allclose(
    got, hidden @ two["kernel"] + two["bias"][None, None], rtol=0, atol=2e-6
  )
  assert got.shape[-1] == (7 if "classes" in vars(head) else 50)


def test_weights_and_biases_start_as_torch_starts_them():
  head = heads.Projector(hidden_size=400, compute=layers.Compute())
  params = head.init(jax.random.key(0), jnp.zeros((1, 100)))["params"]
  for name, fan_in in (("linear_1", 100), ("linear_2", 400)):
    for leaf in params[name].values():
      bound = fan_in**-0.5
      assert 0.97 * bound < np.abs(leaf).max() <= bound
      # A uniform variable's deviation is its bound / sqrt(3).
      np.testing.assert_allclose(leaf.std(), bound / 3**0.5, rtol=0.1)
