"""Images that lie as bytes in a record, for the sources whose records do so."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pivot_jax.data import images


def present(count: int) -> Any:
  """Returns what stands for so many images in a row that has no pixels."""
  return [True] * count if count > 1 else count == 1 or None


def pixels(
  pictures: images.Pictures, files: Sequence[bytes]
) -> None | np.ndarray | list[np.ndarray]:
  """Decodes the images of a row: None, uint8 [H, W, 3], or a list of several.

  Of several each is padded to a square, as `Pictures.read_many` does.
  """
  if len(files) < 2:
    return pictures.decode(files[0], name="image") if files else None
  return [
    pictures.decode(data, name=f"image[{i}]", pad=True)
    for i, data in enumerate(files)
  ]
