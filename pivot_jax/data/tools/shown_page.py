"""Shown rows as one page that needs no network, no script and no other file.

Learnt tokens are green, bold and underlined, so that a print in black shows
them too; a token under the pointer is named at the foot of the window, with its
ids and place. Every text comes from data and is escaped. Pure functions from
rows to HTML; nothing is written here.
"""

import base64
import io
from collections.abc import Iterable, Sequence

from PIL import Image

from pivot_jax.data.tools import shown_rows
from pivot_jax.report import markup

SIDE = 512  # pixels of a picture's longer side, at most
SMALL = 160  # pixels below which a picture is enlarged to this, without blur
_LIGHT = """color-scheme:light;--ink:#1d2228;--soft:#5d6770;--line:#d7dce1;
--page:#fff;--band:#f4f6f8;--learnt:#0b5a30;--tint:#dcf3e4;--edge:#4aa873;
--bad:#a8322a;--odd:#e6eaee;--tint2:#c3e8d1"""
_DARK = """color-scheme:dark;--ink:#e4e7ea;--soft:#9aa5ae;--line:#3a4249;
--page:#15181b;--band:#1e2327;--learnt:#8fe3b3;--tint:#17382a;--edge:#3f9a69;
--bad:#ff8d80;--odd:#2b3238;--tint2:#22503b"""
_STYLE = (
  ":root{"
  + _LIGHT
  + "}@media screen and (prefers-color-scheme:dark){:root{"
  + _DARK
  + """}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1100px;margin:0 auto;padding:28px 20px 72px}
h1{font-size:26px;line-height:1.2;margin:0 0 8px}
h2{font-size:19px;margin:36px 0 4px;overflow-wrap:anywhere}
h3{font-size:15px;margin:0;overflow-wrap:anywhere}
h4{font-size:13px;margin:14px 0 4px}
h4 span,.note,figcaption,dt{color:var(--soft);font-weight:normal}
.note{font-size:14px;margin:4px 0;overflow-wrap:anywhere}
.legend{margin-top:10px}
article{border:1px solid var(--line);border-radius:8px;padding:14px 16px;
margin:16px 0}
.error{color:var(--bad);font-weight:600;margin:6px 0;overflow-wrap:anywhere}
.error::before{content:"error: "}
.pictures{display:flex;flex-wrap:wrap;gap:14px;margin:12px 0}
figure{margin:0;max-width:100%}
img{display:block;max-width:100%;height:auto;border:1px solid var(--line)}
img.small{image-rendering:pixelated}
figcaption{font-size:12px;margin-top:3px;overflow-wrap:anywhere}
.answers{display:grid;gap:0 14px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
.answers section{min-width:0}
.tokens{background:var(--band);border-radius:6px;padding:8px 10px;
white-space:pre-wrap;overflow-wrap:anywhere;color:var(--soft);
font:14px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,
"DejaVu Sans Mono",monospace;print-color-adjust:exact;
-webkit-print-color-adjust:exact}
.tokens.inline{display:inline;padding:3px 6px}
.inline i{white-space:nowrap}
.tokens i{font-style:normal;border-radius:3px;padding:1px 0}
.tokens i.o{background:var(--odd)}
.tokens i.l{color:var(--learnt);background:var(--tint);font-weight:700;
border-bottom:2px solid var(--edge)}
.tokens i.l.o{background:var(--tint2)}
.tokens i.s{outline:1px solid currentColor;outline-offset:-1px;font-size:12px;
padding:1px 2px}
.tokens i:hover{outline:2px solid var(--ink)}
.tokens i[data-t]:hover::after{content:attr(data-t);position:fixed;left:0;
bottom:0;z-index:1;max-width:100%;background:var(--ink);color:var(--page);
font:13px/1.4 system-ui,sans-serif;padding:6px 12px;
border-radius:0 6px 0 0;white-space:normal}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 12px;
font-size:14px;margin:14px 0 0}
dt{max-width:32vw}
dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
@media(max-width:600px){main{padding:16px 10px 64px}article{padding:10px}
.tokens{font-size:13px}dl{grid-template-columns:1fr}dt{max-width:none}}
@media print{main{max-width:none;padding:0}article{break-inside:avoid}
h2,h2+.note,h3,h4{break-after:avoid}}
"""
)


def page(settings: str, sections: Iterable[str]) -> str:
  """Return a whole document; `settings` says how the rows were encoded."""
  title = "Rows as the model sees them"
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{markup.POLICY}">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<title>{title}</title><style>{_STYLE}</style></head><body><main>"
    f'<h1>{title}</h1>\n<p class="note">{_text(settings)}</p>\n{_legend()}\n'
    + "\n".join(sections)
    + "\n</main></body></html>\n"
  )


def section(title: str, note: str, rows: Iterable[shown_rows.Shown]) -> str:
  """Return the rows of one file under its name."""
  return (
    f'<section><h2>{_text(title)}</h2><p class="note">{_text(note)}</p>\n'
    + "\n".join(map(_article, rows))
    + "\n</section>"
  )


def picture(found: shown_rows.Picture) -> str:
  """Return a captioned picture, inline, no larger than `SIDE`."""
  height, width = found.pixels.shape[:2]
  longest = max(height, width)
  small = longest <= SMALL
  scale = SMALL / longest if small else min(1, SIDE / longest)
  across, down = max(1, round(width * scale)), max(1, round(height * scale))
  image = Image.fromarray(found.pixels)
  if scale < 1:
    image = image.resize((across, down), Image.Resampling.LANCZOS)
  caption, kind = _text(found.caption), "small" if small else "large"
  return (
    f'<figure><img class="{kind}" alt="{caption}" width="{across}"'
    f' height="{down}" src="{_data(image, exact=small)}">'
    f"<figcaption>{caption}</figcaption></figure>"
  )


def tokens(part: shown_rows.Part) -> str:
  """Return a part's tokens; nothing between them that is not text."""
  return "".join(
    _token(part.title, token, odd=bool(number % 2))
    for number, token in enumerate(part.tokens)
  )


def _article(shown: shown_rows.Shown) -> str:
  called = f'<p class="note">id {_text(shown.id)}</p>' if shown.id else ""
  errors = "".join(
    f'<p class="error">{_text(error)}</p>' for error in shown.errors
  )
  pictures = "".join(map(picture, shown.pictures))
  pictures = f'<div class="pictures">{pictures}</div>' if pictures else ""
  total = ""
  if shown.parts:
    total = f'<p class="note">{_text(shown.size)}</p>'
  return (
    f"<article><h3>{_text(shown.name)}</h3>{called}{errors}{pictures}{total}"
    f"{_parts(shown.parts)}{_fields(shown.fields)}</article>"
  )


def _parts(parts: Sequence[shown_rows.Part]) -> str:
  drawn = [
    f"<section><h4>{_text(part.title)}"
    f" <span>{part.length} tokens, {part.targets} learnt</span></h4>"
    f'<div class="tokens">{tokens(part)}</div></section>'
    for part in parts
  ]
  answers = "".join(drawn[1:])
  return "".join(drawn[:1]) + (
    f'<div class="answers">{answers}</div>' if answers else ""
  )


def _fields(fields: Sequence[tuple[str, str]]) -> str:
  listed = "".join(
    f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in fields
  )
  return f"<dl>{listed}</dl>" if listed else ""


def _token(title: str, token: shown_rows.Token, *, odd: bool) -> str:
  names = [
    name
    for name, holds in (
      ("l", token.target),
      ("s", token.special),
      ("o", odd and not token.special),
    )
    if holds
  ]
  last = token.at + len(token.ids) - 1
  place = str(token.at) if last == token.at else f"{token.at} to {last}"
  ids = ", ".join(map(str, token.ids))
  about = (
    f"{title}, token {place}: id {ids},"
    f" {'learnt' if token.target else 'only read'}"
  )
  kind = f' class="{" ".join(names)}"' if names else ""
  return f'<i{kind} data-t="{_text(about)}">{_text(token.text)}</i>'


def _legend() -> str:
  return (
    '<p class="note legend"><span class="tokens inline">'
    '<i class="l">learnt</i> <i class="l s">learnt, special</i>'
    ' <i class="o">only read</i> <i class="s">only read, special</i></span>'
    f" {shown_rows.NEWLINE} a newline. Point at a token for its id. Shades"
    " tell neighbours apart. The first token of a row is never predicted.</p>"
  )


def _text(value: str) -> str:
  return markup.text(shown_rows.visible(value))


def _data(image: Image.Image, *, exact: bool) -> str:
  """Return a data address: a PNG, or a JPEG if that is shorter and may be."""
  found = []
  for kind in ("png",) if exact else ("png", "jpeg"):
    file = io.BytesIO()
    image.save(file, kind)
    found.append((kind, file.getvalue()))
  kind, data = min(found, key=lambda one: len(one[1]))
  return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
