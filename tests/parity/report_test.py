"""The page of parity: all of its cases, those of a published width included."""

import subprocess
import sys

import pytest

from tests import nightly


@pytest.mark.nightly
def test_every_case_of_the_page_holds():
  command = [sys.executable, "-m", "tests.parity.report"]
  done = subprocess.run(
    command, cwd=nightly.ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr + done.stdout
