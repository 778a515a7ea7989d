"""Builds the report's page: text, tables, curves and pictures as one string.

Pure functions from plain values and arrays to HTML and SVG; no file is read or
written here, and nothing is computed but how it looks. What the numbers mean
is stages/report.py's. The page needs no network and no script; every string
that comes from data passes through `text`. Legend: H W pixels, g grid side.
"""

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PICTURE = 144  # pixels of a picture's side on the page, about
COLOURS = ("#3b7dd8", "#d9722e", "#2f9e62", "#b0489a", "#8a7a2c", "#d14b4b")
# Control points of the map's colours: dark blue, teal, green, yellow, red.
_RAMP = np.array(
  [[30, 20, 110], [25, 120, 180], [60, 185, 120], [245, 215, 60], [215, 40, 30]]
)
_STYLE = """
:root{color-scheme:light dark;--ink:#1d2228;--soft:#667079;--line:#d7dce1;
--page:#fff;--band:#f4f6f8;--up:#12713f;--down:#a8322a}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7ea;--soft:#98a2ab;
--line:#3a4249;--page:#15181b;--band:#1e2327;--up:#63cf95;--down:#ff8d80}}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1100px;margin:0 auto;padding:32px 24px 80px}
h1{font-size:28px;line-height:1.2;margin:0 0 16px}
h2{font-size:20px;margin:44px 0 8px}h3{font-size:15px;margin:20px 0 4px}
p{margin:8px 0;max-width:80ch}.note{color:var(--soft);font-size:14px}
.verdict{background:var(--band);border-left:4px solid var(--soft);
padding:12px 18px;max-width:none}
.wide{overflow-x:auto;margin:0 0 20px}
table{border-collapse:collapse;font-size:13px;width:100%;
font-variant-numeric:tabular-nums}
th,td{padding:5px 7px;text-align:right;border-bottom:1px solid var(--line);
vertical-align:top;font-weight:normal}
th:first-child,td:first-child{text-align:left}
tbody th{font-weight:600;white-space:nowrap}
thead th{color:var(--soft);vertical-align:bottom;line-height:1.3}
thead th.group{text-align:center;color:var(--ink);font-weight:600}
.se,.none{display:block;color:var(--soft);font-size:11px}
.se{white-space:nowrap}.none{line-height:1.25}
.up{color:var(--up);font-weight:600}.down{color:var(--down);font-weight:600}
.grid{display:flex;flex-wrap:wrap;gap:20px}
figure{margin:0}.row figure{width:144px}figcaption{font-size:12px;color:var(--soft);text-align:center}
.example{border-top:1px solid var(--line);padding:12px 0}
.row{display:flex;flex-wrap:wrap;gap:10px;margin:6px 0;align-items:end}
img{width:144px;height:144px;image-rendering:pixelated;display:block}
.swatch{display:inline-block;width:12px;height:12px;margin:0 5px 0 14px;
border-radius:2px;vertical-align:-1px}
svg{color:var(--ink);max-width:100%}svg text{fill:currentColor;font-size:11px}
pre{font-size:12px;overflow:auto;background:var(--band);padding:12px}
summary{cursor:pointer}
"""


class Column(NamedTuple):
  """One measure of a table: where its value is, and how it is written."""

  key: str
  group: str
  label: str
  scale: float
  digits: int


def text(value: str | int | float | np.generic | None) -> str:
  """Return a value as text that no browser reads as markup."""
  return html.escape(str(value), quote=True)


def page(title: str, sections: Iterable[str]) -> str:
  """Return a whole document; sections are already HTML."""
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<title>{text(title)}</title><style>{_STYLE}</style></head><body><main>"
    f"<h1>{text(title)}</h1>\n"
    + "\n".join(sections)
    + "\n</main></body></html>\n"
  )


def section(title: str, *parts: str, note: str = "") -> str:
  """Return a headed section; empty where it has nothing to show."""
  body = "\n".join(part for part in parts if part)
  if not body:
    return ""
  about = f'<p class="note">{text(note)}</p>' if note else ""
  return f"<section><h2>{text(title)}</h2>{about}{body}</section>"


def measures(
  rows: Mapping[str, Mapping[str, Any]], columns: Sequence[Column]
) -> str:
  """Return a table of measured values, rows by their names.

  Columns that no row holds are skipped; the heads show the sample size.
  """
  return _table(rows, columns, _value)


def differences(
  rows: Mapping[str, Mapping[str, Any]], columns: Sequence[Column]
) -> str:
  """Return a table of differences; those not shown by the data say so."""
  return _table(rows, columns, _difference)


def plain_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """Return a table of plain values."""
  top = "".join(f"<th>{text(name)}</th>" for name in head)
  body = "".join(
    "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>"
    for row in rows
  )
  return (
    f'<div class="wide"><table><thead><tr>{top}</tr></thead>'
    f"<tbody>{body}</tbody></table></div>"
  )


def details(title: str, content: Mapping[str, Any]) -> str:
  """Return a folded block of JSON."""
  shown = json.dumps(content, indent=2, sort_keys=True, default=str)
  return f"<details><summary>{text(title)}</summary><pre>{text(shown)}</pre></details>"


def chart(
  title: str, series: Mapping[str, Sequence[tuple[float, float]]]
) -> str:
  """Return a line chart as SVG, with axes, ticks and a legend.

  Points that are not finite are skipped; over 200 points of a series are
  averaged in groups.
  """
  lines = {name: thin(points) for name, points in series.items()}
  lines = {name: points for name, points in lines.items() if points}
  if not lines:
    return ""
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
  drawing = (
    f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    f'role="img" aria-label="{text(title)}">{"".join(parts)}</svg>'
  )
  key = legend(zip(lines, COLOURS * len(lines)))
  return f"<figure><h3>{text(title)}</h3>{drawing}{key}</figure>"


def legend(entries: Iterable[tuple[str, str]]) -> str:
  """Return names beside squares of their "#rrggbb" colours."""
  return (
    '<div class="note">'
    + "".join(
      f'<span class="swatch" style="background:{colour}"></span>{text(name)}'
      for name, colour in entries
    )
    + "</div>"
  )


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


def picture(pixels: UInt8[np.ndarray, "H W 3"], caption: str) -> str:
  """Return a captioned picture, inline as a PNG and enlarged without blur."""
  factor = max(1, round(PICTURE / max(pixels.shape[:2])))
  large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
  file = io.BytesIO()
  Image.fromarray(large).save(file, "PNG")
  data = base64.b64encode(file.getvalue()).decode("ascii")
  return (
    f'<figure><img alt="{text(caption)}" src="data:image/png;base64,{data}">'
    f"<figcaption>{text(caption)}</figcaption></figure>"
  )


def picture_row(*pictures: str) -> str:
  """Return pictures side by side."""
  return f'<div class="row">{"".join(pictures)}</div>'


def example(lines: Mapping[str, str], *rows: str) -> str:
  """Return an example: named texts, then its rows of pictures."""
  said = "<br>".join(
    f"<b>{text(name)}</b> {text(value)}" for name, value in lines.items()
  )
  return f'<div class="example"><p>{said}</p>{"".join(rows)}</div>'


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


def _table(rows, columns, cell) -> str:
  columns = [c for c in columns if any(c.key in row for row in rows.values())]
  if not columns:
    return ""
  groups: list[list[Any]] = []
  for column in columns:
    if groups and groups[-1][0] == column.group:
      groups[-1][1] += 1
    else:
      groups.append([column.group, 1])
  top = "".join(
    f'<th class="group" colspan="{span}">{text(name)}</th>'
    for name, span in groups
  )
  heads = "".join(f"<th>{_head(column, rows)}</th>" for column in columns)
  body = "".join(
    f"<tr><th>{text(name)}</th>"
    + "".join(cell(column, row.get(column.key)) for column in columns)
    + "</tr>"
    for name, row in rows.items()
  )
  return (
    f'<div class="wide"><table><thead><tr><th></th>{top}</tr>'
    f"<tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
  )


def _head(column: Column, rows) -> str:
  sizes = {row[column.key]["n"] for row in rows.values() if column.key in row}
  size = f"n={min(sizes)}" + (f"–{max(sizes)}" if len(sizes) > 1 else "")
  size = "" if sizes == {1} else size
  return f'{text(column.label)}<span class="se">{size}</span>'


def _value(column: Column, found: Mapping[str, Any] | None) -> str:
  if found is None:
    return "<td>–</td>"
  number = f"{found['value'] * column.scale:.{column.digits}f}"
  return f'<td title="n = {found["n"]}">{number}{_error(column, found)}</td>'


def _difference(column: Column, found: Mapping[str, Any] | None) -> str:
  if found is None:
    return "<td>–</td>"
  number = f"{found['value'] * column.scale:+.{column.digits}f}"
  number = number.replace("-", "−")
  error, title = _error(column, found), f'title="n = {found["n"]}"'
  if found["shown"]:
    name = "up" if found["value"] > 0 else "down"
    return f'<td {title}><span class="{name}">{number}</span>{error}</td>'
  return f'<td {title}>{number}{error}<span class="none">no difference shown</span></td>'


def _error(column: Column, found: Mapping[str, Any]) -> str:
  if found["se"] is None:
    return ""
  error = f"{found['se'] * column.scale:.{column.digits}f}"
  return f'<span class="se">± {error}</span>'
