"""Paints the things of a scene: shapes, textures, signs, charts, backgrounds.

Only arrays and plain values pass through here: what is in a scene, and where,
is decided in `descriptions.py`, and nothing here knows a question. Every function
takes its random numbers from the caller, so a picture is a pure function of
its arguments. A canvas is `image`, float32 [48, 48, 3] in 0..255, and
`owners`, int8 [48, 48], which says what is visible at each pixel.
"""

import functools

import numpy as np
from jaxtyping import Bool, Float, Int8

SIDE = 48  # pixels of a picture
CELL = 16  # pixels of one of its 3x3 cells

SHAPES = (
  "circle",
  "square",
  "triangle",
  "star",
  "cross",
  "ring",
  "heart",
  "diamond",
)
TEXTURES = ("solid", "striped", "dotted")
COLOURS = {
  "red": (222, 36, 36),
  "green": (34, 158, 44),
  "blue": (46, 74, 236),
  "yellow": (248, 222, 40),
  "pink": (246, 92, 206),
  "cyan": (48, 222, 232),
}
DARK = 0.4  # of the colour, in the dark parts of a texture
LEVELS = {"low": 4, "mid": 9, "high": 14}  # pixels of a bar

_GLYPHS = {
  "0": "01110 10001 10011 10101 11001 10001 01110",
  "1": "00100 01100 00100 00100 00100 00100 01110",
  "2": "01110 10001 00001 00110 01000 10000 11111",
  "3": "11110 00001 00001 01110 00001 00001 11110",
  "4": "00010 00110 01010 10010 11111 00010 00010",
  "5": "11111 10000 11110 00001 00001 10001 01110",
  "6": "00110 01000 10000 11110 10001 10001 01110",
  "7": "11111 00001 00010 00100 00100 01000 01000",
  "8": "01110 10001 10001 01110 10001 10001 01110",
  "9": "01110 10001 10001 01111 00001 00010 01100",
  "e": "11111 10000 10000 11110 10000 10000 11111",
  "h": "10001 10001 10001 11111 10001 10001 10001",
  "j": "00111 00010 00010 00010 00010 10010 01100",
  "k": "10001 10010 10100 11000 10100 10010 10001",
  "l": "10000 10000 10000 10000 10000 10000 11111",
  "p": "11110 10001 10001 11110 10000 10000 10000",
  "t": "11111 00100 00100 00100 00100 00100 00100",
  "w": "10001 10001 10001 10101 10101 11011 10001",
  "x": "10001 10001 01010 00100 01010 10001 10001",
  "y": "10001 10001 01010 00100 00100 00100 00100",
}

_FINE = 8  # sub-pixels per pixel and axis when a shape is rasterised


@functools.cache
def shape_mask(shape: str, pixels: int) -> Bool[np.ndarray, "s s"]:
  """Return a shape's pixels in its own square box of `pixels` a side."""
  steps = (np.arange(pixels * _FINE) + 0.5) * 2 / (pixels * _FINE) - 1
  inside = _inside(shape, steps[None, :], steps[:, None])
  cover = inside.reshape(pixels, _FINE, pixels, _FINE).mean((1, 3))
  mask = cover >= 0.5
  mask.setflags(write=False)
  return mask


@functools.cache
def glyph_mask(character: str) -> Bool[np.ndarray, "14 10"]:
  """Return a digit or a letter, 10 pixels wide and 14 high."""
  rows = [[bit == "1" for bit in row] for row in _GLYPHS[character].split()]
  mask = np.array(rows).repeat(2, axis=0).repeat(2, axis=1)
  mask.setflags(write=False)
  return mask


def background(rng: np.random.Generator) -> Float[np.ndarray, "48 48 3"]:
  """Return a dull backdrop: flat, a gradient, or coarse patches."""
  base = rng.uniform(85, 165) + rng.uniform(-16, 16, 3)
  image = np.empty((SIDE, SIDE, 3), np.float32)
  image[:] = base
  kind = rng.integers(3)
  if kind == 1:
    slope = rng.uniform(-0.6, 0.6, (2, 3))
    steps = np.arange(SIDE)[:, None] - SIDE / 2
    image += (steps * slope[0])[:, None] + steps * slope[1]
  elif kind == 2:
    coarse = rng.uniform(-18, 18, (12, 12, 1)).astype(np.float32)
    image += coarse.repeat(4, axis=0).repeat(4, axis=1)
  return image


def paint_shape(
  image: Float[np.ndarray, "48 48 3"],
  owners: Int8[np.ndarray, "48 48"],
  *,
  owner: int,
  shape: str,
  texture: str,
  colour: Float[np.ndarray, "3"],
  top: int,
  left: int,
  pixels: int,
) -> None:
  """Paint one object over whatever lies there."""
  mask = shape_mask(shape, pixels)
  shade = _shades(texture, pixels)
  patch = image[top : top + pixels, left : left + pixels]
  patch[mask] = (shade[..., None] * colour)[mask]
  owners[top : top + pixels, left : left + pixels][mask] = owner


def paint_sign(
  image: Float[np.ndarray, "48 48 3"],
  owners: Int8[np.ndarray, "48 48"],
  *,
  owner: int,
  character: str,
  ink: tuple[float, float],
  top: int,
  left: int,
) -> None:
  """Paint a light plate, 14 wide and 16 high, with a dark character."""
  plate, dark = ink
  image[top : top + 16, left : left + 14] = plate
  image[top + 1 : top + 15, left + 2 : left + 12][glyph_mask(character)] = dark
  owners[top : top + 16, left : left + 14] = owner


def paint_chart(
  image: Float[np.ndarray, "48 48 3"],
  owners: Int8[np.ndarray, "48 48"],
  *,
  owner: int,
  bars: list[tuple[Float[np.ndarray, "3"], str]],
  top: int,
  left: int,
) -> None:
  """Paint a dark plate, 16 a side, with three bars (colour, level)."""
  image[top : top + 16, left : left + 16] = 32
  for place, (colour, level) in enumerate(bars):
    start = left + 1 + 5 * place
    foot = top + 15
    image[foot - LEVELS[level] : foot, start : start + 4] = colour
  owners[top : top + 16, left : left + 16] = owner


@functools.cache
def _shades(texture: str, pixels: int) -> Float[np.ndarray, "s s"]:
  y, x = np.indices((pixels, pixels))
  if texture == "striped":
    dark = (x + y) % 4 < 2
  elif texture == "dotted":
    dark = ((x - 1) % 4 < 2) & ((y - 1) % 4 < 2)
  else:
    dark = np.zeros((pixels, pixels), bool)
  shades = np.where(dark, DARK, 1.0).astype(np.float32)
  shades.setflags(write=False)
  return shades


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Return the points of [-1, 1]^2 that a shape holds; v points down."""
  across, down = np.abs(u), np.abs(v)
  radius = np.hypot(u, v)
  if shape == "circle":
    return radius <= 1
  if shape == "square":
    return np.maximum(across, down) <= 1
  if shape == "triangle":
    return (across <= (v + 1) / 1.9) & (v <= 0.9)
  if shape == "star":
    return _star(u, v)
  if shape == "cross":
    return np.minimum(across, down) <= 0.32
  if shape == "ring":
    return (radius <= 1) & (radius >= 0.55)
  if shape == "heart":
    lobes = np.hypot(across - 0.48, v + 0.42) <= 0.53
    return lobes | ((v >= -0.3) & (across * 1.02 + v <= 0.96))
  return across / 0.8 + down <= 1  # diamond


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Five points: a pixel is inside iff at most one of five edges cuts it."""
  angles = 2 * np.pi * np.arange(5) / 5 + np.pi / 2
  # Each line joins two tips of the pentagram; its distance from the middle
  # is cos(72 degrees) for tips on the unit circle, widened to stay visible.
  beyond = sum(
    (u * np.cos(angle) + v * np.sin(angle) > 0.36).astype(int)
    for angle in angles
  )
  return (beyond <= 1) & (np.hypot(u, v) <= 1.05)
