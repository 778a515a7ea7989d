"""Images that lie as bytes in a record, for the sources whose records do so."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pivot_jax.data import images
from pivot_jax.errors import InputError


def present(count: int) -> Any:
  """Return what stands for so many images in a row that has no pixels."""
  return [True] * count if count > 1 else count == 1 or None


def pixels(
  pictures: images.Pictures, files: Sequence[bytes]
) -> None | np.ndarray | list[np.ndarray]:
  """Decode the images of a row: None, uint8 [H, W, 3], or a list of several.

  Of several each is padded to a square, as `Pictures.read_many` does.
  """
  if len(files) < 2:
    return pictures.decode(files[0], name="image") if files else None
  return [
    pictures.decode(data, name=f"image[{i}]", pad=True)
    for i, data in enumerate(files)
  ]


def picture_and_labels(
  pictures: images.Pictures, data: bytes, labels: np.ndarray, *, name: str
) -> tuple[np.ndarray, np.ndarray]:
  """Return an image, uint8 [H, W, 3], and its labels, int32 [H, W].

  Args:
    labels: int32 [H, W] as they came, which must be as large as the image.
    name: what messages call the labels.
  """
  image = images.decode(
    data,
    name="image",
    max_pixels=pictures.max_pixels,
    decoder=pictures.decoder,
  )
  check_sizes(labels.shape[::-1], image.shape[1::-1], name=name)
  return pictures.fit(image), pictures.fit_labels(labels)


def check_sizes(
  labels: Sequence[int], image: Sequence[int], *, name: str
) -> None:
  """Raise unless a label map is as large as its image, both (W, H)."""
  if tuple(labels) != tuple(image):
    raise InputError(
      f"{name}: the label map is {labels[0]}x{labels[1]} pixels, its image"
      f" {image[0]}x{image[1]}"
    )
