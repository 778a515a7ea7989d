"""The installed package works away from its checkout."""

import subprocess
import sys


def test_load_and_save_are_there_from_any_folder(tmp_path):
  script = (
    "import pivot_jax; "
    "loaded = pivot_jax.load('package:toy:vision'); "
    "pivot_jax.save('out', loaded.params, "
    "meta=loaded.meta); "
    "print(sorted(pivot_jax.load('out').params))"
  )
  done = subprocess.run(
    [sys.executable, "-c", script],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip().endswith("['vision']")
