"""The arm of docs/workdir.md that is only measured, as the page has it."""

import json
import re
import subprocess
import sys

import pytest

from pivot_jax.recipe import plan, preflight
from tests import documents
from tests.fixtures import programs

PAGE = (programs.ROOT / "docs" / "workdir.md").read_text("utf-8")
CONFIG, ALONE = (
  fence.text for fence in documents.fences(PAGE) if fence.language == "python"
)
KINDS = ("detach", "linear_probe", "segment_probe", "gradcam", "evaluate")


def config(theirs, *more, address="hf:{}", recipe=""):
  """Return the page's config with lines before its end."""
  lines = "".join(f"  {line.strip()}\n" for line in more)
  text = CONFIG.replace("hf:DIR", address.format(theirs))
  text = text.replace("get_config()\n", f"get_config({recipe!r})\n", 1)
  return text.replace("  return c\n", f"{lines}  return c\n")


def planned(text, tmp_path):
  """Return the stages of a config that has passed all checks."""
  values = {}
  exec(text, values)
  steps = plan.expand(values["get_config"](), tmp_path / "w").steps
  preflight.check(steps)
  return [step.name for step in steps]


def test_the_arm_is_measured_beside_the_others(theirs, tmp_path):
  names = planned(config(theirs), tmp_path)
  assert names[-6:] == [*(f"{kind}_theirs" for kind in KINDS), "report"]
  assert "stage2_dpo" in names


def test_the_arm_is_measured_alone(theirs, tmp_path):
  names = planned(config(theirs, ALONE), tmp_path)
  assert names == [*(f"{kind}_theirs" for kind in KINDS), "report"]


def test_an_encoder_alone_is_detached_and_probed(theirs, tmp_path):
  (rest,) = re.findall(r"take\s+`(\w+)` and `(\w+)` out of the order", PAGE)
  less = f"c.order = tuple(x for x in c.order if x not in {rest})"
  text = config(theirs, ALONE, less, address="hf:{}:vision")
  assert planned(text, tmp_path) == [
    *(f"{kind}_theirs" for kind in KINDS[:3]),
    "report",
  ]


def test_a_stage_may_frame_images_in_its_own_way(theirs, tmp_path):
  (setting,) = re.findall(r"`(c\.linear_probe_theirs\.[^`]+)`", PAGE)
  values = {}
  exec(config(theirs, setting), values)
  steps = plan.expand(values["get_config"](), tmp_path).steps
  framed = {step.name: step.config.resample for step in steps}
  assert framed["linear_probe_theirs"] == "crop_bicubic"
  assert framed["linear_probe_dpo"] == "bicubic"


@pytest.mark.nightly
def test_the_arm_runs_to_numbers_in_a_report(theirs, tmp_path):
  text = config(theirs, ALONE, recipe="debug")
  (tmp_path / "theirs.py").write_text(text, encoding="utf-8")
  command = ["--config=theirs.py", "--workdir=w"]
  done = subprocess.run(
    [sys.executable, "-m", "pivot_jax.main", *command],
    cwd=tmp_path,
    env=programs.one_device(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "w" / "report.json").read_text("utf-8"))
  assert found["results"]["arms"]["theirs"]["linear/encoder/top1"]["n"] == 100
  assert found["results"]["mllms"]["theirs"]["mllm/all"]["n"] == 48
  assert "LLaVA of others" in (tmp_path / "w" / "report.html").read_text()
