"""The templates of pages: every string in them is escaped, none is a script.

A page needs no network and no other file. `PARTS` has one macro for each part
of a page (templates/parts.html); a macro's result is `Markup`, so that it goes
into another part as it is.
"""

import html
from collections.abc import Iterable

import jinja2
from markupsafe import Markup

POLICY = Markup("default-src 'none'; img-src data:; style-src 'unsafe-inline'")

_ENVIRONMENT = jinja2.Environment(
  loader=jinja2.PackageLoader("pivot_jax.report"),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
)
PARTS = _ENVIRONMENT.get_template("parts.html").module


def style() -> Markup:
  """Return the style sheet of every page."""
  loader = _ENVIRONMENT.loader
  return Markup(loader.get_source(_ENVIRONMENT, "style.css")[0])


def text(value: str) -> str:
  """Return a value as text that no browser reads as markup."""
  return html.escape(value, quote=True)


def document(title: str, sections: Iterable[Markup]) -> str:
  """Return a whole page of sections."""
  return _ENVIRONMENT.get_template("page.html").render(
    title=title, sections=sections, policy=POLICY, style=style()
  )


def section(title: str, *parts: Markup, note: str = "") -> Markup:
  """Return a headed section; empty where it has nothing to show."""
  body = Markup("\n").join(part for part in parts if part)
  return PARTS.section(title, note, body) if body else Markup()
