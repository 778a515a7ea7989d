"""The tables of the report: measures of arms, and their differences."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from pivot_jax.report import markup

Rows = Mapping[str, Mapping[str, Any]]


class Column(NamedTuple):
  """One measure of a table: where its value is, and how it is written."""

  key: str
  group: str
  label: str
  scale: float
  digits: int


def measures(rows: Rows, columns: Sequence[Column]) -> Markup:
  """Return a table of measured values, rows by their names.

  Columns that no row holds are skipped; the heads show the sample size.
  """
  return _table(rows, columns, _value)


def differences(rows: Rows, columns: Sequence[Column]) -> Markup:
  """Return a table of differences; those not shown by the data say so."""
  return _table(rows, columns, _difference)


def _table(
  rows: Rows, columns: Sequence[Column], cell: Callable[..., dict[str, Any]]
) -> Markup:
  columns = [c for c in columns if any(c.key in row for row in rows.values())]
  if not columns:
    return Markup()
  groups: list[list[Any]] = []
  for column in columns:
    if groups and groups[-1][0] == column.group:
      groups[-1][1] += 1
    else:
      groups.append([column.group, 1])
  body = [
    (name, [cell(c, row[c.key]) if c.key in row else None for c in columns])
    for name, row in rows.items()
  ]
  heads = [(column.label, _size(column, rows)) for column in columns]
  return markup.PARTS.measures(groups, heads, body)


def _size(column: Column, rows: Rows) -> str:
  sizes = {row[column.key]["n"] for row in rows.values() if column.key in row}
  if sizes == {1}:
    return ""
  return f"n={min(sizes)}" + (f"–{max(sizes)}" if len(sizes) > 1 else "")


def _value(column: Column, found: Mapping[str, Any]) -> dict[str, Any]:
  number = f"{found['value'] * column.scale:.{column.digits}f}"
  return _cell(column, found, number)


def _difference(column: Column, found: Mapping[str, Any]) -> dict[str, Any]:
  number = f"{found['value'] * column.scale:+.{column.digits}f}"
  cell = _cell(column, found, number.replace("-", "−"))
  if found["shown"]:
    return cell | {"way": "up" if found["value"] > 0 else "down"}
  return cell | {"note": "no difference shown"}


def _cell(
  column: Column, found: Mapping[str, Any], number: str
) -> dict[str, Any]:
  error = found["se"]
  if error is not None:
    error = f"{error * column.scale:.{column.digits}f}"
  return {"n": found["n"], "number": number, "error": error} | {
    "way": "",
    "note": "",
  }
