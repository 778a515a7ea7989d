"""The page of parity: all of its cases, those of a published width included."""

import os
import subprocess
import sys

import pytest

from tests import nightly


@pytest.mark.nightly
def test_every_case_of_the_page_holds():
  # As the command is run by hand: on one device, not on the tests' eight.
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-m", "tests.parity.report"],
    cwd=nightly.ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr + done.stdout
