"""The nightly run: its line, and which tests belong to it."""

import subprocess
import sys

from tests import nightly

_RESULTS = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests">
  <testsuite name="pytest" errors="1" failures="2" skipped="3" tests="20"
    time="90.0" timestamp="2026-01-01T00:00:00" hostname="h">
    <testcase classname="tests.a_test" name="test_a" time="90.0"/>
  </testsuite>
</testsuites>
"""
_TESTS = """
import pytest


def test_short():
  pass


@pytest.mark.nightly
def test_long():
  pass
"""


def test_a_run_appends_one_line_with_a_cell_for_each_column(tmp_path):
  results, page = tmp_path / "nightly.xml", tmp_path / "nightly.md"
  results.write_text(_RESULTS, encoding="utf-8")
  page.write_text(nightly.PAGE.read_text("utf-8"), encoding="utf-8")
  before = page.read_text("utf-8")
  row = nightly.line([results], commit="abc1234", versions=nightly.versions())
  nightly.append(page, row)
  assert page.read_text("utf-8") == f"{before}{row}\n"
  head = next(line for line in before.splitlines() if line.startswith("|"))
  names = [cell.strip() for cell in head.strip("|").split("|")]
  found = dict(zip(names, (x.strip() for x in row.strip("|").split("|"))))
  assert len(names) == row.count("|") - 1
  assert found["commit"] == "abc1234"
  assert found["python"] == sys.version.split()[0]
  # Errors are failures; what was skipped has not passed.
  assert (found["minutes"], found["passed"], found["failed"]) == (
    "1.5",
    "14",
    "3",
  )


def test_the_results_of_two_commands_make_one_line(tmp_path):
  results = tmp_path / "nightly.xml"
  results.write_text(_RESULTS, encoding="utf-8")
  row = nightly.line([results, results], commit="abc1234", versions=[])
  assert row.endswith("| abc1234 | 3.0 | 28 | 6 |")


def test_the_marker_is_deselected_unless_asked_for(tmp_path):
  (tmp_path / "a_test.py").write_text(_TESTS, encoding="utf-8")

  def collected(*asked):
    command = [sys.executable, "-m", "pytest", "--collect-only"]
    command += ["-c", str(nightly.ROOT / "pyproject.toml"), *asked]
    command += ["--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    done = subprocess.run(
      [*command, str(tmp_path / "a_test.py")],
      cwd=tmp_path,
      capture_output=True,
      text=True,
      check=False,
    )
    lines = [x for x in done.stdout.splitlines() if "::" in x]
    return [line.rpartition("::")[2] for line in lines]

  assert collected() == ["test_short"]
  assert collected("-m", "nightly") == ["test_long"]
