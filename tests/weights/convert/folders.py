"""Reading and changing a saved folder, for the tests of the converters."""

import jax
import numpy as np
import safetensors.numpy

from pivot_jax.weights.convert import hf


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def stored(folder):
  return safetensors.numpy.load_file(folder / "model.safetensors")


def store(folder, arrays):
  safetensors.numpy.save_file(
    arrays, folder / "model.safetensors", metadata={"format": "pt"}
  )


def load(folder):
  """Return the configs, the float32 params, and what the folder is."""
  opened = hf.open_folder(folder)
  info = {
    "source": opened.where,
    "format": opened.kind,
    "not_carried": list(opened.not_carried),
  }
  return {"vision": opened.vision, "llm": opened.llm}, opened.params(), info
