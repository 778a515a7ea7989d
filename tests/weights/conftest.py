"""A tiny model and its saved encoder."""

import jax
import jaxtyping
import numpy as np
import pytest

from pivot_jax.models import mllm
from pivot_jax.weights.convert import hf
from tests.fixtures import tiny_models


@pytest.fixture(scope="session")
def params():
  model = mllm.MLLM(tiny_models.UNTIED, tiny_models.VISION)
  fresh = mllm.init_params(model, jax.random.key(0))
  return jax.tree.map(np.asarray, tiny_models.jitter(fresh))


@pytest.fixture
def vision_folder(tmp_path, params):
  hf.save_vision(tmp_path, tiny_models.VISION, params["vision"])
  return tmp_path


@pytest.fixture
def unchecked():
  """Turn the tests' own check of annotations off, which comes first."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)
