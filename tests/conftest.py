"""Settings that every test shares, made before jax is imported.

Tests run on eight virtual CPU devices. Tests on real files read the folder that
PIVOT_JAX_TEST_DATA names: without the variable they are skipped, with it a
missing file is a failure, so that a machine that has the data cannot pass by
skipping.
"""

import os
import pathlib

import hypothesis
import jaxtyping
import numpy as np
import pytest

from tests.fixtures import programs

_DATA = "PIVOT_JAX_TEST_DATA"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
programs.use_eight_devices()
programs.compile_quickly()
# Tiny programs take longer to compile than to run: keep every one of them.
programs.keep_programs()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# The same examples on every run; time limits would fail on a busy machine.
hypothesis.settings.register_profile(
  "pivot_jax", derandomize=True, deadline=None, database=None, max_examples=50
)
hypothesis.settings.load_profile("pivot_jax")

# It reads the variables above when it is loaded.
import jax  # noqa: E402

import tests.strict  # noqa: E402, F401

# Before the package is imported: functions of these modules are called with what
# their annotations say, arrays of other shapes and dtypes are errors. They are
# the modules of arrays; those that read files check what users wrote themselves,
# and are tested with what their annotations forbid. Scenes are drawn by the
# hundred thousand, which takes twice as long where each call is checked. Where an annotation says an
# array of jax, one of numpy will do: jax converts it.
CHECKED = (
  "pivot_jax.sharding",
  "pivot_jax.models",
  "pivot_jax.training",
  "pivot_jax.evals",
  "pivot_jax.data.packing",
  "pivot_jax.data.layouts",
)
jaxtyping.Array = jax.Array | np.ndarray | np.generic
jaxtyping.install_import_hook(CHECKED, "tests.strict.check")

# Adding a vector to a matrix is written out, so that a lost axis is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
  """Return the folder of small real data sets, or skips the test."""
  if _DATA not in os.environ:
    pytest.skip(f"set {_DATA} to the folder of small real data sets")
  folder = pathlib.Path(os.environ[_DATA])
  if not folder.is_dir():
    pytest.fail(f"{_DATA}={folder} is not a folder")
  return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  """Turn a skip of a test on real data into a failure if there is data."""
  report = yield
  on_data = "test_data" in item.fixturenames and _DATA in os.environ
  if (
    on_data
    and report.skipped
    and call.excinfo.errisinstance(pytest.skip.Exception)
  ):
    report.outcome = "failed"
    report.longrepr = f"skipped although {_DATA} is set: {report.longrepr}"
  return report


@pytest.fixture(scope="session")
def theirs(tmp_path_factory):
  """Return a folder of a LLaVA as others publish it; tests only read it."""
  # The checks of annotations have to be there before the package is.
  import pivot_jax

  folder = tmp_path_factory.mktemp("theirs") / "llava"
  model, params = pivot_jax.load("package:toy/stage1")
  pivot_jax.save(folder, model, params, format="llava")
  return folder
