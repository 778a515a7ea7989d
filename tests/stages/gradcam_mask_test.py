"""The mask of the asked-about object follows its image to the encoder."""

import numpy as np
import pytest

from pivot_jax import errors
from pivot_jax.data import feed
from pivot_jax.stages import gradcam


def test_a_mask_is_framed_as_the_image_the_encoder_sees():
  # A wide picture whose left quarter is the object, cut to its middle square.
  mask = np.zeros((48, 96), bool)
  mask[:, :36] = True
  row = dict(image=np.zeros((48, 96, 3), np.uint8), object_mask=mask)

  def share(resample):
    coder = feed.Coder(
      tokenizer=None,
      template="plain",
      mask="paper",
      pairs=True,
      image_size=32,
      resample=resample,
    )
    return gradcam._object_mask(row, coder).mean()

  assert share("bicubic") == 36 / 96
  assert share("crop_bicubic") == pytest.approx(12 / 48, abs=1 / 32)


def test_a_mask_of_another_size_than_its_image_is_refused():
  row = dict(
    image=np.zeros((48, 48, 3), np.uint8), object_mask=np.zeros((6, 6), bool)
  )
  with pytest.raises(errors.InputError, match=r"\(6, 6\) for an image"):
    gradcam._object_mask(row, None)
