"""docs/trust.md: every promise names a test that is there."""

import re

import pytest

from tests import house
from tests.where_test import defined

TEXT = (house.ROOT / "docs" / "trust.md").read_text("utf-8")
TESTS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)


@pytest.mark.parametrize("path, name", TESTS)
def test_a_promise_is_held_by_a_test(path, name):
  assert name in defined(path)


def test_every_row_of_the_tables_names_one():
  rows = re.findall(r"^\| (?!promise|-)(.+) \|$", TEXT, re.MULTILINE)
  assert len(rows) > 20
  for row in rows:
    assert "::test_" in row, row
