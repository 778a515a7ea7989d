"""Attention, and the choice of what computes it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from pivot_jax import sharding
from pivot_jax.errors import InputError
from pivot_jax.models import attention, layers


def _random(*shape, seed=0):
  values = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(values, jnp.float32)


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


def _heads(tokens, *, queries=4, keys=2, dim=8, rows=3):
  q = _random(rows, tokens, queries, dim)
  k, v = (_random(rows, tokens, keys, dim, seed=s) for s in (1, 2))
  lengths = [tokens, 5, 1] + [tokens - 1] * (rows - 3)
  return q, k, v, jnp.asarray(lengths, jnp.int32)


def _by_hand(q, k, v, length):
  """Attend token by token, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  found = np.zeros(q.shape)
  for token in range(length):
    for head in range(q.shape[1]):
      kv = head // (q.shape[1] // k.shape[1])
      scores = k[: token + 1, kv] @ q[token, head] / np.sqrt(q.shape[2])
      weights = np.exp(scores - scores.max())
      found[token, head] = weights @ v[: token + 1, kv] / weights.sum()
  return found


def test_a_token_sees_itself_and_those_before_it():
  q, k, v, lengths = _heads(9)
  got = attention.attend_causal(q, k, v, lengths, backend="xla")
  for row, length in enumerate(lengths):
    expected = _by_hand(q[row], k[row], v[row], int(length))
    np.testing.assert_allclose(
      got[row, :length], expected[:length], rtol=0, atol=2e-6
    )
  assert np.isfinite(got).all()


@pytest.mark.parametrize("tokens", [6, 7])
@pytest.mark.parametrize("causal", [True, False])
def test_the_gpu_kernel_is_given_an_even_number_of_tokens(
  monkeypatch, tokens, causal
):
  known = jax.nn.dot_product_attention

  def even(q, k, v, *, implementation, **options):
    # Its gradient refuses odd numbers.
    assert implementation == "cudnn" and q.shape[1] % 2 == 0
    return known(q, k, v, implementation="xla", **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", even)
  q, k, v, lengths = _heads(tokens)

  def total(backend):
    def of(q, k, v):
      if not causal:
        return attention.attend_all(q, q, q, backend=backend)
      mixed = attention.attend_causal(q, k, v, lengths, backend=backend)
      # What follows a sequence has no meaning.
      present = jnp.arange(tokens)[None] < lengths[:, None]
      return jnp.where(present[..., None, None], mixed, 0)

    def summed(*heads):
      return (of(*heads) ** 2).sum()

    return of(q, k, v), jax.grad(summed, (0, 1, 2))(q, k, v)

  for left, right in zip(
    jax.tree.leaves(total("cudnn")), jax.tree.leaves(total("xla"))
  ):
    np.testing.assert_allclose(left, right, rtol=0, atol=2e-5)


@pytest.fixture
def interpreted(monkeypatch):
  """Run the TPU's kernel by its interpreter."""
  made = functools.partial(splash_attention.make_splash_mha, interpret=True)
  monkeypatch.setattr(splash_attention, "make_splash_mha", made)


@pytest.mark.parametrize(
  "mesh", [None, {"data": 1, "tensor": -1}, {"data": 2, "tensor": 4}]
)
def test_the_tpu_kernel_gives_the_values_and_gradients_of_xla(
  interpreted, mesh
):
  # With two key/value heads for the mesh's four or eight.
  queries = 8
  q, k, v, lengths = _heads(130, dim=16, queries=queries, rows=4)
  # Splash does not compute a mean of what it has not seen: behind the end of a
  # sequence its results differ, and nothing reads them.
  present = jnp.arange(130)[None] < lengths[:, None]

  def run(backend):
    def total(q, k, v):
      mixed = attention.attend_causal(q, k, v, lengths, backend=backend)
      return (jnp.sin(3 * mixed) * present[..., None, None]).sum()

    grad_fn = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
    if mesh is None:
      return grad_fn(q, k, v)
    rules = layers.logical_rules(sharding.ACTIVATION_RULES)
    with jax.set_mesh(sharding.make_mesh(mesh)), rules:
      return grad_fn(q, k, v)

  (value, gradients), (other, others) = run("xla"), run("splash")
  np.testing.assert_allclose(other, value, rtol=1e-5)
  for expected, got in zip(gradients, others):
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
  ("platform", "capability", "dtype", "dims", "expected"),
  [
    ("cpu", 0, "float32", (24,), "xla"),
    ("gpu", 9.0, "bfloat16", (72, 256), "cudnn"),
    ("gpu", 8.0, "bfloat16", (72, 128), "cudnn"),
    ("gpu", 8.0, "bfloat16", (72, 160), "xla"),
    ("gpu", 7.5, "bfloat16", (72, 128), "xla"),
    ("gpu", 0, "bfloat16", (72, 128), "xla"),
    ("gpu", 9.0, "float32", (72, 128), "xla"),
    ("gpu", 9.0, "bfloat16", (72, 20), "xla"),
    ("tpu", 0, "bfloat16", (72, 128), "splash"),
  ],
)
def test_auto_takes_the_fastest_that_serves(
  platform, capability, dtype, dims, expected
):
  compute = layers.Compute(dtype=dtype, attention="auto")
  found = attention.choose(
    compute, head_dims=dims, platform=platform, capability=capability
  )
  assert found.attention == expected
  assert found.dtype == dtype


@pytest.mark.parametrize(
  ("name", "platform", "dtype", "dims", "reason"),
  [
    ("cudnn", "cpu", "bfloat16", (64,), "runs on a gpu, and this is a cpu"),
    ("splash", "gpu", "bfloat16", (64,), "runs on a tpu, and this is a gpu"),
    ("cudnn", "gpu", "float32", (64,), "bfloat16, and compute.dtype is"),
    ("cudnn", "gpu", "bfloat16", (64, 20), r"head dims .* has \[20\]"),
    ("cudnn", "gpu", "bfloat16", (264,), r"head dims .* has \[264\]"),
  ],
)
def test_a_backend_that_cannot_serve_is_refused(
  name, platform, dtype, dims, reason
):
  compute = layers.Compute(dtype=dtype, attention=name)
  with pytest.raises(InputError, match=reason):
    attention.choose(compute, head_dims=dims, platform=platform, capability=8.0)


@pytest.mark.parametrize("name", ["plain", "xla"])
def test_what_is_asked_for_stays(name):
  compute = layers.Compute(attention=name)
  found = attention.choose(compute, head_dims=(7,), platform="gpu")
  assert found == compute
