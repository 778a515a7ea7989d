"""Position tables at another grid of patches, as their publishers resize them.

Two rules, since a table resized by the other one is another model. Which file
holds a table, and which rule it needs, is not known here.

Axes: L rows of the table; D width; G side of the new grid; P rows of the new
table, G * G and one more with a class token.
"""

import math

import numpy as np
import scipy.ndimage
from jaxtyping import Float, Float32

from pivot_jax.errors import InputError

METHODS = ("big_vision", "dinov2")

# Keys' cubic convolution with the parameter that PyTorch takes.
_A = -0.75


def resize(
  table: Float32[np.ndarray, "L D"],
  grid: int,
  *,
  method: str,
  class_token: bool,
) -> Float32[np.ndarray, "P D"]:
  """Resize a learned table of a square grid to `grid` x `grid` positions.

  "big_vision" is linear between the corners of both grids, which coincide
  (scipy's zoom of order 1). "dinov2" is bicubic between patch centres, without
  antialiasing and with the border repeated (PyTorch's interpolate with
  align_corners=False). A table that has the size already is returned as it is,
  and so is the row of a class token, the first.

  Raises:
    InputError: an unknown method, no square number of rows, or no positions.
  """
  check_method(method)
  table = np.asarray(table, np.float32)
  first, rest = table[:class_token], table[class_token:]
  side = math.isqrt(len(rest))
  if side**2 != len(rest) or not side:
    token = " and a class token" if class_token else ""
    raise InputError(
      f"position table: {len(table)} rows are no square grid{token}; its"
      " positions cannot be resized"
    )
  if grid < 1:
    raise InputError(
      f"position table: a grid of {grid} is none; give 1 or more"
    )
  if side == grid:
    return table.copy()
  square = rest.reshape(side, side, -1)
  new = (
    _linear(square, grid) if method == "big_vision" else _cubic(square, grid)
  )
  return np.concatenate([first, new.reshape(grid * grid, -1)])


def check_method(method: str) -> None:
  """Raise InputError for anything but a name in METHODS."""
  if method not in METHODS:
    raise InputError(
      f"positions={method!r}: choose one of {', '.join(METHODS)}"
    )


def _linear(
  square: Float32[np.ndarray, "g g D"], grid: int
) -> Float32[np.ndarray, "G G D"]:
  factor = grid / len(square)
  new = scipy.ndimage.zoom(square, (factor, factor, 1), order=1)
  return np.asarray(new)


def _cubic(
  square: Float32[np.ndarray, "g g D"], grid: int
) -> Float32[np.ndarray, "G G D"]:
  weights = _cubic_weights(len(square), grid)
  rows = np.einsum("ah,hwd->awd", weights, square.astype(np.float64))
  return np.einsum("bw,awd->abd", weights, rows).astype(np.float32)


def _cubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
  """Return the share of each old position in each new one, along one axis."""
  centre = (np.arange(new) + 0.5) * old / new - 0.5
  low = np.floor(centre).astype(int)
  weights = np.zeros((new, old))
  for step in (-1, 0, 1, 2):
    place = np.clip(low + step, 0, old - 1)
    # Several steps fall on one border row, and their shares add up.
    np.add.at(weights, (np.arange(new), place), _kernel(centre - (low + step)))
  return weights


def _kernel(x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
  x = np.abs(x)
  inner = (_A + 2) * x**3 - (_A + 3) * x**2 + 1
  outer = _A * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x <= 1, inner, outer)
