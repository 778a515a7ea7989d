"""Appends the result of a nightly run of the tests to docs/nightly.md.

  python -m pytest -m nightly --junitxml=FILE
  python -m tests.nightly FILE [FILE]

`.ci/nightly` runs both. The versions are those of the environment that this
runs in, the commit is the one that is checked out.
"""

import argparse
import datetime
import importlib.metadata
import pathlib
import platform
import subprocess
from xml.etree import ElementTree

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "nightly.md"
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers")


def main() -> None:
  """Append one line for a file of results."""
  parser = argparse.ArgumentParser(
    prog="python -m tests.nightly",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("results", type=pathlib.Path, nargs="+")
  results = parser.parse_args().results
  append(PAGE, line(results, commit=checked_out(), versions=versions()))


def line(
  results: list[pathlib.Path], *, commit: str, versions: list[str]
) -> str:
  """Return the row of the table for files of results in JUnit's format."""
  suites = [
    suite
    for path in results
    for suite in ElementTree.parse(path).getroot().findall("testsuite")
  ]
  tests, failures, errors, skipped = (
    sum(int(suite.attrib[name]) for suite in suites)
    for name in ("tests", "failures", "errors", "skipped")
  )
  seconds = sum(float(suite.attrib["time"]) for suite in suites)
  failed = failures + errors
  cells = [
    datetime.date.today().isoformat(),
    commit,
    *versions,
    f"{seconds / 60:.1f}",
    str(tests - failed - skipped),
    str(failed),
  ]
  return f"| {' | '.join(cells)} |"


def append(page: pathlib.Path, row: str) -> None:
  """Append a row to the table that ends a page."""
  with page.open("a", encoding="utf-8") as file:
    file.write(row + "\n")


def checked_out() -> str:
  """Return the short name of the commit that is checked out."""
  command = ["git", "rev-parse", "--short", "HEAD"]
  done = subprocess.run(
    command, cwd=ROOT, check=True, capture_output=True, text=True
  )
  return done.stdout.strip()


def versions() -> list[str]:
  """Return the versions of Python and of the packages that compute."""
  found = [importlib.metadata.version(name) for name in PACKAGES]
  return [platform.python_version(), *found]


if __name__ == "__main__":
  main()
