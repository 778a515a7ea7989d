"""Parameter paths as foreign tensor names."""

import numpy as np

from pivot_jax.weights.convert import names


def _tree():
  rng = np.random.default_rng(0)
  return {
    "conv": {"kernel": rng.random((2, 2, 3, 5), "f4")},
    "layers": {
      "fc": {"kernel": rng.random((3, 4, 6), "f4"), "bias": np.ones((3, 6))},
      "norm": {"scale": rng.random((3, 4), "f4")},
    },
    "table": {"embedding": rng.random((7, 4), "f4")},
  }


def test_a_stacked_leaf_becomes_one_tensor_for_each_layer():
  found = names.slots(_tree())
  assert found["layers.2.fc.weight"] == names.Slot(
    ("layers", "fc", "kernel"), 2, (6, 4)
  )
  assert found["conv.weight"] == names.Slot(
    ("conv", "kernel"), None, (5, 3, 2, 2)
  )
  assert found["table.weight"].shape == (7, 4)
  assert len(found) == 2 + 3 * 3


def test_there_and_back_is_the_same_tree():
  tree = _tree()
  arrays = names.to_foreign(tree)
  back = names.from_foreign(tree, lambda group: {n: arrays[n] for n in group})
  np.testing.assert_equal(back, tree)


def test_a_patch_kernel_moves_colour_before_the_patch():
  tree = _tree()
  moved = names.to_foreign(tree)["conv.weight"]
  assert moved[4, 2, 1, 0] == tree["conv"]["kernel"][1, 0, 2, 4]
