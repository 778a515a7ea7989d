"""The checks of the smoke test that compute, each in a process of its own.

`attention` and `batch` compare numbers, `update` times an update of real size.
With `tiny` they run on a CPU at toy sizes, cuDNN's kernel replaced by XLA's.

N sequences, T tokens, A query heads, K key/value heads, H head dim.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from bench import verdict
from bench.gpu import ours, sizes
from bench.update import ladder
from pivot_jax import trees
from pivot_jax.models import attention, layers, mllm
from pivot_jax.training import objectives, train_state

STEPS, WARM_UP = 10, 2
# |a - b| / |b| of the loss and of the worst module's gradient. On a CPU
# bfloat16 is off float32 by 6e-5 and 1.7e-2; on both sides it rounds.
LIMITS: Mapping[str, Mapping[str, float]] = {
  "float32": {"loss": 1e-4, "gradient": 1e-3},
  "bfloat16": {"loss": 5e-3, "gradient": 5e-2},
}
# Plain attention in bfloat16 is off by 2e-3 on a CPU; cuDNN rounds its weights
# in another order.
ATTENTION = {"values": 1e-2, "gradient": 2e-2}


@dataclasses.dataclass(frozen=True)
class Check:
  """One line of the page."""

  name: str
  figures: str
  passed: bool


@dataclasses.dataclass(frozen=True)
class Heads:
  """Sizes of an attention: [N, T, A, H] queries, K key/value heads."""

  tokens: int
  queries: int
  shared: int
  dim: int
  lengths: tuple[int, ...]
  causal: bool = True


# So400m at 384 pixels; Qwen2.5-1.5B's sequences, one odd number of tokens.
HEADS = (
  Heads(576, 16, 16, 72, (576, 576), causal=False),
  Heads(976, 12, 2, 128, (976, 947, 64, 1)),
  Heads(947, 12, 2, 128, (947, 900)),
)
TINY_HEADS = (
  Heads(4, 2, 2, 8, (4,), causal=False),
  Heads(7, 4, 2, 8, (7, 5)),
)


def run(part: str, *, tiny: bool) -> list[Check]:
  """Return the checks of a part; raise where there is no GPU to check."""
  if not tiny and jax.default_backend() != "gpu":
    raise RuntimeError(f"jax runs on {jax.default_backend()}, not on the GPU")
  if part == "numbers":
    return [*attentions(tiny=tiny), *batches(tiny=tiny)]
  return [update(tiny=tiny)]


def attentions(*, tiny: bool) -> list[Check]:
  """Return the checks of the kernel against plain attention in float32."""
  backend = "xla" if tiny else "cudnn"
  checks = []
  for heads in TINY_HEADS if tiny else HEADS:
    found, right, program = _attention(heads, backend)
    errors = verdict.errors(found, right)
    called = tiny or "__cudnn$fmha" in program
    kind = "causal" if heads.causal else "full"
    checks.append(
      Check(
        f"attention by {backend}: {kind}, {heads.tokens} tokens,"
        f" {heads.queries}/{heads.shared} heads of {heads.dim}",
        _figures(errors, ATTENTION)
        + ("" if called else "; the program has no call of cuDNN"),
        called and not verdict.failures(errors, ATTENTION),
      )
    )
  return checks


def _attention(
  heads: Heads, backend: str
) -> tuple[verdict.Numbers, verdict.Numbers, str]:
  """Return the kernel's numbers, plain attention's, the kernel's program."""
  rng, rows = np.random.default_rng(0), len(heads.lengths)

  def draw(count):
    shape = (rows, heads.tokens, count, heads.dim)
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

  q, k, v, cotangent = map(
    draw, (heads.queries, heads.shared, heads.shared, heads.queries)
  )
  place, lengths = jnp.arange(heads.tokens), jnp.asarray(heads.lengths)
  # Tokens behind the end are no keys, and as queries have no meaning.
  present = place[None] < lengths[:, None]
  mask = jnp.broadcast_to(present[:, None], (rows, len(place), len(place)))
  if heads.causal:
    mask &= (place[:, None] >= place[None])[None]

  # Arguments: a compiler would fold constants as large for minutes.
  def kernel(q, k, v, lengths):
    if heads.causal:
      return attention.attend_causal(q, k, v, lengths, backend=backend)
    return attention.attend_all(q, k, v, backend=backend)

  def gradients(attend):
    def total(q, k, v, seen, present, cotangent):
      mixed = jnp.where(present[..., None, None], attend(q, k, v, seen), 0)
      return (mixed.astype(jnp.float32) * cotangent).sum(), mixed

    return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))

  def numbers(result):
    (_, mixed), slopes = result
    named = {"values": mixed} | {
      f"gradient/{name}": slope for name, slope in zip("qkv", slopes)
    }
    return {name: np.asarray(x, np.float32) for name, x in named.items()}

  inputs = (q, k, v, lengths, present, cotangent)
  compiled = gradients(kernel).lower(*inputs).compile()
  with jax.default_matmul_precision("highest"):
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    plain = gradients(attention.attend)(*exact, mask, present, cotangent)
  return numbers(compiled(*inputs)), numbers(plain), compiled.as_text()


def _figures(errors: Mapping[str, float], limits: Mapping[str, float]) -> str:
  return ", ".join(
    f"{kind} off by {errors.get(kind, np.inf):.1e} (at most {limit:g})"
    for kind, limit in limits.items()
  )


def batches(*, tiny: bool) -> list[Check]:
  """Return the checks of a packed batch, in each dtype against the CPU."""
  data = sizes.data("dpo_ragged", tiny=True) if tiny else sizes.middle()
  checks = []
  for dtype, limits in LIMITS.items():
    fast = "cudnn" if dtype == "bfloat16" and not tiny else "xla"
    right = _batch(data, dtype, "plain", jax.devices("cpu")[0])
    found = _batch(data, dtype, fast, jax.devices()[0])
    errors = verdict.errors(found, right)
    checks.append(
      Check(
        f"DPO batch in {dtype}, attention by {fast}, against the CPU",
        f"loss {found['loss']:.5f}, {_figures(errors, limits)}",
        not verdict.failures(errors, limits),
      )
    )
  return checks


def _batch(
  data: sizes.Data, dtype: str, backend: str, device: jax.Device
) -> verdict.Numbers:
  """Return the loss and the gradient of each module, as a device has them."""
  compute = layers.Compute(dtype=dtype, attention=backend)
  model = ours.model_of(data, compute)
  with jax.default_device(jax.devices("cpu")[0]):
    init = jax.jit(functools.partial(mllm.init_params, model))
    params = init(jax.random.PRNGKey(0))
  loss_fn = objectives.dpo(model, beta=ladder.BETA, chunk=ours.CHUNK)
  grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  params = train_state.cast_kernels(params, dtype)
  inputs = jax.device_put((params, ours.packed(data)), device)
  # A GPU would round the inputs of float32 products otherwise.
  precision = "highest" if dtype == "float32" else "default"
  with jax.default_matmul_precision(precision):
    (loss, _), gradients = grad_fn(*inputs, None)
  modules: dict[str, list[np.ndarray]] = {}
  for path, leaf in trees.flatten(gradients).items():
    # With its kernel: a bias of keys alone has a gradient of nothing.
    module = f"gradient/{path.rpartition('/')[0]}"
    modules.setdefault(module, []).append(np.ravel(leaf).astype(np.float32))
  return {"loss": np.asarray(loss)} | {
    name: np.concatenate(parts) for name, parts in modules.items()
  }


def update(*, tiny: bool) -> Check:
  """Return the check of updates of real size, at the paper's lengths."""
  data = sizes.data("dpo_8", tiny=tiny)
  ready = ours.ready(ours.Update(data, ours.settings()), data)
  clock = Clock()
  ready.drive(WARM_UP + STEPS, clock.begin, clock.end)
  facts, walls = ready.facts(), clock.walls[WARM_UP:]
  low, seconds, high = verdict.spread(walls)
  return Check(
    f"{STEPS} updates of {len(data.prompt)} pairs",
    f"{len(data.prompt) / seconds:.2f} pairs/s ({1e3 * low:.0f} to"
    f" {1e3 * high:.0f} ms an update), peak {facts['peak'] / 1e9:.1f} GB"
    f" ({facts['estimate'] / 1e9:.1f} foreseen), compiled in"
    f" {facts['compile_seconds']:.0f} s, loss {facts['losses'][0]:.4f} to"
    f" {facts['losses'][-1]:.4f}, {ours.flash(facts)}",
    facts["finite"] and (tiny or facts["flash_calls"] > 0),
  )


class Clock:
  """Wall seconds of steps."""

  def __init__(self):
    self.walls: list[float] = []

  def begin(self) -> None:
    self._began = time.perf_counter()

  def end(self) -> None:
    self.walls.append(time.perf_counter() - self._began)
