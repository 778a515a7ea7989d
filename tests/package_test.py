"""The installed package works away from its checkout."""

import subprocess
import sys


def _run(script, folder):
  done = subprocess.run(
    [sys.executable, "-c", script],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def test_load_and_save_are_there_from_any_folder(tmp_path):
  script = (
    "import pivot_jax; "
    "encoder, params = pivot_jax.load('package:toy:vision'); "
    "pivot_jax.save('out', encoder, params); "
    "print(sorted(pivot_jax.load('out')[1]))"
  )
  assert _run(script, tmp_path).endswith("['vision']")


def test_importing_the_package_imports_no_jax(tmp_path):
  # jax alone takes most of a second.
  script = "import sys, pivot_jax; print('jax' in sys.modules)"
  assert _run(script, tmp_path) == "False"
