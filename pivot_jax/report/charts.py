"""The drawings of the report: curves as SVG, maps and pictures as pixels.

Pure functions from plain values and arrays; nothing is read or written here.
Legend: H W pixels, g grid side, C classes.
"""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from markupsafe import Markup
from PIL import Image

from pivot_jax.report import markup

PICTURE = 144  # pixels of a picture's side on the page, about
COLOURS = ("#3b7dd8", "#d9722e", "#2f9e62", "#b0489a", "#8a7a2c", "#d14b4b")
# Control points of the map's colours: dark blue, teal, green, yellow, red.
_RAMP = np.array(
  [[30, 20, 110], [25, 120, 180], [60, 185, 120], [245, 215, 60], [215, 40, 30]]
)


def chart(
  title: str, series: Mapping[str, Sequence[tuple[float, float]]]
) -> Markup:
  """Return a line chart as SVG, with axes, ticks and a legend.

  Points that are not finite are skipped; over 200 points of a series are
  averaged in groups.
  """
  lines = {name: thin(points) for name, points in series.items()}
  lines = {name: points for name, points in lines.items() if points}
  if not lines:
    return Markup()
  width, height, left, right, top, bottom = 510, 270, 52, 12, 12, 36
  flat = [point for points in lines.values() for point in points]
  x_ticks = ticks(min(p[0] for p in flat), max(p[0] for p in flat))
  y_ticks = ticks(min(p[1] for p in flat), max(p[1] for p in flat))

  def place(x: float, y: float) -> tuple[float, float]:
    across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
    up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
    return (
      left + across * (width - left - right),
      height - bottom - up * (height - top - bottom),
    )

  parts = []
  for value in y_ticks:
    x, y = place(x_ticks[0], value)
    parts.append(
      f'<path d="M{x:.1f} {y:.1f}H{width - right}" stroke="currentColor" '
      f'stroke-opacity=".15"/><text x="{x - 6:.1f}" y="{y + 4:.1f}" '
      f'text-anchor="end">{value:g}</text>'
    )
  for value in x_ticks:
    x, y = place(value, y_ticks[0])
    parts.append(
      f'<path d="M{x:.1f} {y:.1f}v4" stroke="currentColor"/>'
      f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{value:g}</text>'
    )
  parts.append(
    f'<path d="M{left} {top}V{height - bottom}H{width - right}" fill="none" '
    f'stroke="currentColor"/><text x="{(left + width - right) / 2}" '
    f'y="{height - 4}" text-anchor="middle">update</text>'
  )
  for points, colour in zip(lines.values(), COLOURS * len(lines)):
    places = " ".join(
      f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in points)
    )
    parts.append(
      f'<polyline points="{places}" fill="none" stroke="{colour}" '
      'stroke-width="1.6" stroke-linejoin="round"/>'
    )
  colours = zip(lines, COLOURS * len(lines))
  drawn = Markup("").join(map(Markup, parts))
  return markup.PARTS.chart(title, width, height, drawn, list(colours))


def thin(
  points: Sequence[tuple[float, float]], limit: int = 200
) -> list[tuple[float, float]]:
  """Return at most `limit` points, means of neighbours; finite ones only."""
  kept = [(x, y) for x, y in points if math.isfinite(y)]
  size = -(-len(kept) // limit) or 1
  groups = (kept[i : i + size] for i in range(0, len(kept), size))
  return [
    (sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g))
    for g in groups
  ]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
  """Return round numbers that enclose low..high; at least two."""
  if high <= low:
    low, high = low - 0.5, low + 0.5
  power = 10.0 ** math.floor(math.log10((high - low) / about))
  step = next(
    power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= about
  )
  first, last = math.floor(low / step), math.ceil(high / step)
  return [round(i * step, 12) for i in range(first, last + 1)]


def picture(pixels: UInt8[np.ndarray, "H W 3"], caption: str) -> Markup:
  """Return a captioned picture, inline as a PNG and enlarged without blur."""
  factor = max(1, round(PICTURE / max(pixels.shape[:2])))
  large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
  file = io.BytesIO()
  Image.fromarray(large).save(file, "PNG")
  data = base64.b64encode(file.getvalue()).decode("ascii")
  return markup.PARTS.picture(caption, data)


def overlay(
  image: UInt8[np.ndarray, "H W 3"], values: Float[np.ndarray, "g g"]
) -> UInt8[np.ndarray, "h w 3"]:
  """Return a map in 0..1 drawn over the darkened image, cut to its patches."""
  patch = max(1, image.shape[0] // len(values))
  large = np.asarray(values, np.float64).repeat(patch, 0).repeat(patch, 1)
  base = 0.6 * image[: large.shape[0], : large.shape[1]]
  large = large[: base.shape[0], : base.shape[1]]
  return np.round(0.4 * base + 0.6 * ramp(large)).astype(np.uint8)


def ramp(values: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W 3"]:
  """Return the colours of values in 0..1, beyond which they are clipped."""
  at = np.linspace(0, 1, len(_RAMP))
  clipped = np.clip(np.nan_to_num(values), 0, 1)
  return np.stack([np.interp(clipped, at, c) for c in _RAMP.T], axis=-1)


def spotlight(
  image: UInt8[np.ndarray, "H W 3"], mask: np.ndarray
) -> UInt8[np.ndarray, "H W 3"]:
  """Return the image with a mask kept bright and the rest darkened."""
  shown = image.astype(np.float64)
  return np.where(mask.astype(bool)[..., None], shown, 0.3 * shown).astype(
    np.uint8
  )


def class_colours(count: int) -> UInt8[np.ndarray, "C 3"]:
  """Return colours of classes, far apart in hue; class 0 is dark grey."""
  hues = np.arange(count) * 0.618034 % 1
  wheel = np.abs((hues[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
  light = np.where(np.arange(count) % 2, 235, 175)[:, None]
  found = np.clip(wheel, 0.12, 1) * light
  found[:1] = 60
  return found.astype(np.uint8)


def class_map(
  labels: Int[np.ndarray, "H W"], colours: UInt8[np.ndarray, "C 3"]
) -> UInt8[np.ndarray, "H W 3"]:
  """Return a label map in colours; what is no class is black."""
  known = (labels >= 0) & (labels < len(colours))
  shown = colours[np.where(known, labels, 0)]
  return np.where(known[..., None], shown, 0).astype(np.uint8)


def hexadecimal(colour: Iterable[int]) -> str:
  """Return "#rrggbb"."""
  return "#" + "".join(f"{int(part):02x}" for part in colour)
