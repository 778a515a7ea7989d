"""Resized position tables against PyTorch and transformers' Dinov2Model."""

import numpy as np
import pytest
import torch
import transformers

from pivot_jax.weights.convert import positions


def _table(rows, width=6):
  rng = np.random.default_rng(rows)
  return rng.uniform(-1, 1, (rows, width)).astype(np.float32)


def _interpolated(table, old, new, dtype):
  square = torch.tensor(table, dtype=dtype).reshape(1, old, old, -1)
  found = torch.nn.functional.interpolate(
    square.permute(0, 3, 1, 2),
    size=(new, new),
    mode="bicubic",
    align_corners=False,
  )
  return found.permute(0, 2, 3, 1).reshape(new * new, -1).numpy()


GRIDS = [(4, 9), (9, 4), (7, 8), (8, 7), (5, 5), (1, 3), (3, 1), (2, 13)]
# Those of published models.
GRIDS += [(37, 16), (16, 37), (37, 73), (27, 26)]


@pytest.mark.parametrize("old, new", GRIDS)
def test_dinov2s_rule_is_pytorchs_bicubic(old, new):
  table = _table(old * old)
  got = positions.resize(table, new, method="dinov2", class_token=False)
  # PyTorch in float64, rounded once, as ours is.
  theirs = _interpolated(table, old, new, torch.float64).astype(np.float32)
  np.testing.assert_allclose(got, theirs, rtol=0, atol=2e-7)
  # In float32 PyTorch loses digits of a place, the more the larger the grid.
  theirs = _interpolated(table, old, new, torch.float32)
  lost = max(old, new) * 2e-7
  np.testing.assert_allclose(got, theirs, rtol=0, atol=lost)


@pytest.mark.parametrize("grid", [3, 4, 5, 8, 11])
def test_dinov2_sees_these_positions_at_another_image_size(grid):
  torch.manual_seed(0)
  model = transformers.Dinov2Model(
    transformers.Dinov2Config(
      hidden_size=24,
      num_hidden_layers=1,
      num_attention_heads=2,
      image_size=70,
      patch_size=14,
    )
  ).eval()
  embeddings = model.embeddings
  with torch.no_grad():
    # Nothing but the positions is left of the embeddings.
    embeddings.position_embeddings.uniform_(-1, 1)
    embeddings.cls_token.zero_()
    embeddings.patch_embeddings.projection.bias.zero_()
    theirs = embeddings(torch.zeros(1, 3, 14 * grid, 14 * grid))[0].numpy()
  table = embeddings.position_embeddings[0].detach().numpy()
  got = positions.resize(table, grid, method="dinov2", class_token=True)
  np.testing.assert_allclose(got, theirs, rtol=0, atol=1e-6)
