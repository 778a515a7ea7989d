"""The checker on a folder with every fault planted: all found, none invented.

`planted.py` was written before the checker, by other hands.
"""

import json
import subprocess
import sys

import pytest

from tests.fixtures import planted

# So that an over-long row is one by any tokenizer.
PATCHES = 100


@pytest.fixture(scope="module", params=[0, 3])
def folder(request, tmp_path_factory):
  """Return (where the data is, the faults in it)."""
  place = tmp_path_factory.mktemp("planted")
  return place, planted.plant(place, seed=request.param)


@pytest.fixture(scope="module")
def checked(folder, tmp_path_factory):
  """Return (the ended command, its bad.jsonl, its check.json)."""
  place, _ = folder
  out = tmp_path_factory.mktemp("out")
  ended = subprocess.run(
    [
      *(sys.executable, "-m", "pivot_jax.data", "check"),
      *sorted(map(str, place.glob("*.json*"))),
      f"--images={place / planted.IMAGES}",
      f"--patches={PATCHES}",
      "--tokenizer=package:toy",
      f"--out={out}",
    ],
    check=False,
    capture_output=True,
    text=True,
  )
  lines = (out / "bad.jsonl").read_text("utf-8").splitlines()
  summary = json.loads((out / "check.json").read_text("utf-8"))
  return ended, [json.loads(line) for line in lines], summary


def test_every_fault_is_found_in_its_place_and_no_other(folder, checked):
  _, faults = folder
  _, found, _ = checked
  wanted = {(fault.file, fault.row, fault.kind) for fault in faults}
  assert len(wanted) > 100
  got = [
    (one["file"].rpartition("/")[2], one["row"], one["kind"]) for one in found
  ]
  assert set(got) == wanted, (set(got) - wanted, wanted - set(got))
  assert len(got) == len(set(got))


def test_each_fault_has_a_place_a_reason_and_a_remedy(checked):
  _, found, _ = checked
  for one in found:
    assert one["why"] and one["remedy"] and "\n" not in one["why"]
    assert one["file"] in one["name"]


def test_the_command_fails_without_a_traceback(checked):
  ended, _, _ = checked
  assert ended.returncode == 1
  assert "Traceback" not in ended.stderr + ended.stdout
