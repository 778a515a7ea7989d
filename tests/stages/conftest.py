"""One tiny model, scored and post-trained once for all tests of stages."""

import contextlib

import jax
import pytest

from pivot_jax.stages import score, train
from pivot_jax.training import loop
from tests.fixtures import tiny_stages

ROWS = tiny_stages.source("preference", 40)
# The encoder is frozen, so that there is a frozen part to look at.
ARM = dict(
  trainable=("projector/.*", "llm/.*"),
  batch=8,
  steps=4,
  lr=((".*", 1e-2),),
  save_every=2,
  pack=dict(tokens=128, losses=112, images=1),
)


@contextlib.contextmanager
def guarded():
  """Make an implicit transfer in the loop of any training an error."""
  plain = loop.fit

  def fit(*values, **fields):
    with jax.transfer_guard("disallow"):
      return plain(*values, **fields)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "fit", fit)
    yield


@pytest.fixture(autouse=True)
def guarded_loop():
  """Guard the trainings that a test of stages starts, and no other test's."""
  with guarded():
    yield


@pytest.fixture(scope="session")
def init(tmp_path_factory):
  """Return the address of the model that both arms start from."""
  return tiny_stages.save(tmp_path_factory.mktemp("init"), tiny_stages.params())


@pytest.fixture(scope="session")
def reference(init, tmp_path_factory):
  """Return the folder of the log-probabilities under `init`."""
  out = tmp_path_factory.mktemp("reference")
  score.run(tiny_stages.config("score", ROWS), {"init": init}, out)
  return out


@pytest.fixture(scope="session")
def arm(init, reference):
  """Return fn(objective, ...) -> (config, inputs) of one arm."""

  def make(objective, **fields):
    inputs = {"init": init}
    if objective == "dpo":
      inputs["reference"] = str(reference)
    fields = ARM | {"objective": objective} | fields
    return tiny_stages.config("train", ROWS, **fields), inputs

  return make


@pytest.fixture(scope="session")
def finished(arm, tmp_path_factory):
  """Return {objective: (what the stage reports, its folder)}."""
  found = {}
  for objective in ("sft", "dpo"):
    out = tmp_path_factory.mktemp(objective)
    with guarded():
      found[objective] = train.run(*arm(objective), out), out
  return found
