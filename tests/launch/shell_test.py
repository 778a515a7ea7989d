"""All scripts of launch/: what a shell and a linter say, and house rules."""

import pathlib
import subprocess
import sys

import pytest

from tests.launch import scripts


@pytest.fixture(params=scripts.SCRIPTS)
def script(request):
  """Return the path of a script."""
  return scripts.LAUNCH / request.param


def test_bash_reads_it(script):
  subprocess.run(["bash", "-n", script], check=True)


def test_shellcheck_has_nothing_to_say(script):
  linter = pathlib.Path(sys.executable).parent / "shellcheck"
  found = subprocess.run([linter, script], capture_output=True, text=True)
  assert found.returncode == 0, found.stdout


def test_it_is_short_and_stops_at_an_error(script):
  lines = script.read_text("utf-8").splitlines()
  assert len(lines) <= 80 and max(map(len, lines)) <= 80
  assert lines[0] == "#!/usr/bin/env bash" and script.stat().st_mode & 0o111
  head = lines[: lines.index("set -euo pipefail")]
  assert 10 <= len(head) <= 16 and all(line.startswith("#") for line in head)
  text = "\n".join(head)
  assert "Before: " in text and "Restarts: " in text and "--print" in text


def test_it_ends_in_the_program(script):
  text = script.read_text("utf-8")
  assert "pivot_jax.main" in text or "run.sh" in text
