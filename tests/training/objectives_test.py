"""An objective of the user's own: a loss that is none is named when traced."""

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from pivot_jax.data import layouts, packing
from pivot_jax.errors import InputError
from pivot_jax.training import objectives
from tests.fixtures import tiny

OWN = """
import jax.numpy as jnp
import numpy as np

def f(model, config):
  def loss_fn({parameters}):
    x = jnp.ones((2, 3))
    return {returned}
  return {loss_fn}
"""


@pytest.fixture
def traced(tmp_path):
  """Return fn(returned) -> what a loss of one's own returns as it is traced."""

  def trace(returned, parameters="params, batch, rng", loss_fn="loss_fn"):
    path = tmp_path / "own.py"
    fields = dict(returned=returned, parameters=parameters, loss_fn=loss_fn)
    path.write_text(OWN.format(**fields), encoding="utf-8")
    found = objectives.named(f"{path}:f", "train.objective")
    layout = layouts.Layout(
      rows=1, examples=1, tokens=8, images=1, image_size=16, patches=4,
      sequences=1, sequence=8, copies=1, losses=4, pairs=1,
    )  # fmt: skip
    loss = found.build(tiny.MODEL, ml_collections.ConfigDict())
    return jax.eval_shape(loss, tiny.params(), packing.empty(layout), None)

  return trace


@pytest.mark.parametrize("returned", [
  "x.sum(), {}", "x.mean(), {'a': (x.sum(), 6)}",
  "x.sum(), {'a': [x.sum(), np.float32(1)]}",
])  # fmt: skip
def test_a_loss_with_metrics_passes_as_it_is(traced, returned):
  loss, metrics = traced(returned)
  assert loss.shape == () and loss.dtype == jnp.float32
  assert set(metrics) <= {"a"}


@pytest.mark.parametrize("given, says", [
  (dict(returned="'loss'"), "returned str, not (loss, metrics)"),
  (dict(returned="None"), "returned NoneType, not (loss, metrics)"),
  (dict(returned="x.sum()"), "returned an array float32[], not (loss, metrics)"),
  (dict(returned="x, {}"), "as loss an array float32[2, 3], not one float"),
  (dict(returned="1, {}"), "as loss int, not one float"),
  (dict(returned="(x > 0).sum(), {}"), "as loss an array int32[], not one float"),
  (dict(returned="x.sum(), None"), "as metrics NoneType, not a dict"),
  (dict(returned="x.sum(), {'a': x.sum()}"), "as metric 'a' an array float32[],"),
  (dict(returned="x.sum(), {'a': (x, 1)}"), "'a' (an array float32[2, 3], int),"),
  (dict(returned="x", parameters="params"), "its loss_fn: takes (params), but"),
  (dict(returned="x", loss_fn="None"), "returned NoneType, not a function loss_"),
], ids=str)  # fmt: skip
def test_a_loss_that_is_none_names_the_objective(traced, given, says):
  with pytest.raises(InputError) as error:
    traced(**given)
  said = str(error.value)
  assert said.startswith("train.objective='") and "own.py:f'" in said
  assert says in said


def test_what_a_loss_raises_itself_keeps_its_traceback(traced):
  with pytest.raises(ZeroDivisionError):
    traced("1 / 0")
