"""Reading and changing a saved folder, for the tests of the converters."""

import jax
import numpy as np
import safetensors.numpy


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def stored(folder):
  return safetensors.numpy.load_file(folder / "model.safetensors")


def store(folder, arrays):
  safetensors.numpy.save_file(
    arrays, folder / "model.safetensors", metadata={"format": "pt"}
  )
