"""The commands of the released version work, or are refused by name.

Its texts, recipes and work folders lie in `fixtures/released`. Commands are
parsed and not run, but for those that continue the work folders.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
from flax import traverse_util

import pivot_jax
from tests import documents
from tests.fixtures import programs

RELEASED = pathlib.Path(__file__).parent / "fixtures" / "released"
WORK = RELEASED / "workdir"
TEXTS = [RELEASED / "README.md", *sorted((RELEASED / "docs").glob("*.md"))]
TEXT = "\n\n".join(path.read_text("utf-8") for path in TEXTS)
# An old spelling (a command, setting or recipe as the texts have it), and words
# of the one line that refuses it and names the new one.
REFUSED: dict[str, str] = {
  # pip only warns; `decoder="simplejpeg"` is refused by the name of `pil_draft`.
  'pip install "pivot_jax[fast-images]"': "there is no extra 'fast-images'",
  "python -m pivot_jax.data convert META.json DIR --paper-files"
  " --tokenizer=FOLDER": "select-mmpr META --set=official",
}
# Settings of the released recipes that have another value, or are gone, by
# recipe and key. Each entry is a decision; work folders of the recipe as it was
# are refused by it.
CHANGED: dict[str, set[str]] = {}


@pytest.fixture(scope="module")
def objects():
  """Return stand-ins for the variables of snippets: a model of each kind."""
  encoder, _ = pivot_jax.load("package:toy:vision")
  model, _ = pivot_jax.load("package:toy/stage1")
  return {"pivot_jax": pivot_jax, "encoder": encoder, "model": model}


def held(spelling, check, given):
  """Check a spelling; one of `REFUSED` has to be refused as told."""
  if spelling not in REFUSED:
    return check(given)
  with pytest.raises(documents.Refused) as refused:
    check(given)
  answer = str(refused.value).strip()
  assert REFUSED[spelling] in answer and "\n" not in answer


@pytest.mark.parametrize(
  "command", documents.commands(TEXT), ids=lambda command: command.line
)
def test_a_released_command_is_accepted(command):
  held(command.line, documents.check_command, command)


@pytest.mark.parametrize("setting", documents.settings(TEXT))
def test_a_released_setting_is_accepted(setting):
  held(setting, documents.check_setting, setting)


@pytest.mark.parametrize(
  "recipe", [*documents.recipes(TEXT), "configs/pivot.py:sweep"]
)
def test_a_released_recipe_is_accepted(recipe):
  held(recipe, documents.check_recipe, recipe)


def test_spellings_that_are_refused_are_of_the_texts():
  commands = {command.line for command in documents.commands(TEXT)}
  found = commands | {*documents.settings(TEXT), *documents.recipes(TEXT)}
  assert found >= REFUSED.keys()


def test_names_in_released_snippets_are_there(objects):
  snippets = documents.snippets(TEXT)
  assert sum(documents.check_snippet(one, objects) for one in snippets) > 12


def test_a_released_config_that_chooses_rows_is_refused_by_name(tmp_path):
  code = next(one for one in documents.snippets(TEXT) if "tokenizer=" in one)
  path = tmp_path / "mine.py"
  path.write_text(code)
  with pytest.raises(documents.Refused) as refused:
    documents.parse(
      "pivot_jax.main", [f"--config={path}", f"--workdir={tmp_path}"]
    )
  answer = str(refused.value).strip()
  assert "data select-mmpr META" in answer and "\n" not in answer


def test_what_the_texts_say_is_found():
  commands = [command.line for command in documents.commands(TEXT)]
  assert "python -m bench.dpo_cpu" in commands
  assert "python bench/report_table.py runs/pivot/report.json" in commands
  joined = [line for line in commands if "--config.files.segment=DIR" in line]
  assert joined and joined[0].startswith("python -m pivot_jax.main --config=")
  assert {"files.max_bad=0.01", "STAGE.pack.row=N"} <= {
    *documents.settings(TEXT)
  }


@pytest.mark.parametrize("line", [
  "python -m pivot_jax.main --config=configs/pivot.py --workdir=W --no_such",
  "python -m pivot_jax.main --config=configs/pivot.py:none --workdir=W",
  "python -m pivot_jax.main --config=configs/pivot.py --workdir=W --config.x=1",
  "python -m pivot_jax.export --from=A --to=B --format=none",
  "python -m pivot_jax.export --from=A",
  "python -m pivot_jax.data check",
  "python -m pivot_jax.data show FILES --no-such",
  "python -m pivot_jax.data none FILES",
  "python -m pivot_jax.no_such",
  "python bench/report_table.py",
  "python -m bench.no_such",
  'pip install "pivot_jax[none]"',
])  # fmt: skip
def test_another_command_is_refused(line):
  whole = documents.Command(line, True)
  if line == "python bench/report_table.py":
    whole = documents.Command(f"{line} --no-such", True)
  with pytest.raises(documents.Refused):
    documents.check_command(whole)


@pytest.mark.parametrize(
  "setting",
  ["files.none", "STAGE.none", "vision.none=1", "seeds=many", "mesh.fsdp=x"],
)
def test_another_setting_is_refused(setting):
  with pytest.raises(documents.Refused):
    documents.check_setting(setting)


@pytest.mark.parametrize(
  "code",
  [
    "from configs import none",
    "import pivot_jax\npivot_jax.none()",
    "import pivot_jax\npivot_jax.load('a', none=1)",
    "encoder.none",
    "model.vision.none",
  ],
)
def test_another_name_in_a_snippet_is_refused(code, objects):
  with pytest.raises(documents.Refused):
    documents.check_snippet(code, objects)


@pytest.mark.parametrize(
  "recipe", ["", "debug", "files", "from_scratch", "sweep"]
)
def test_released_recipes_have_their_values(recipe):
  path = RELEASED / "configs.json"
  was = json.loads(path.read_text("utf-8"))[recipe]
  now = leaves(documents.config(f"configs/pivot.py:{recipe}").to_dict())
  differ = {key for key in was if key not in now or now[key] != was[key]}
  assert differ == CHANGED.get(recipe, set())


def leaves(node):
  plain = json.loads(json.dumps(node, default=list))
  return traverse_util.flatten_dict(plain, keep_empty_nodes=False, sep=".") | {
    key: {} for key in empty(plain)
  }


def empty(node, prefix=""):
  for key, value in node.items():
    if isinstance(value, dict):
      name = f"{prefix}{key}"
      yield from empty(value, f"{name}.") if value else [name]


def run(recipe, workdir):
  """Run the present code on a work folder; return its lines."""
  ran = subprocess.run(
    [
      *(sys.executable, "-m", "pivot_jax.main"),
      f"--config={WORK / 'small.py'}{recipe}",
      f"--workdir={workdir}",
    ],
    cwd=documents.ROOT,
    env=programs.one_device(),
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stderr
  return ran.stderr


def copied(name, tmp_path):
  return pathlib.Path(shutil.copytree(WORK / name, tmp_path / "elsewhere"))


def test_a_finished_work_folder_is_finished(tmp_path):
  workdir = copied("finished", tmp_path)
  done = {path: path.read_bytes() for path in workdir.rglob("done.json")}
  said = run("", workdir)
  assert len(re.findall(r" is done$", said, re.MULTILINE)) == 12
  # The report is of the arms, which were no settings then; nothing is asked.
  assert "report is made again: arms" in said
  report = workdir / "report" / "done.json"
  assert len(done) == 13 and done.pop(report) != report.read_bytes()
  assert {path: path.read_bytes() for path in done} == done
  assert not list(workdir.glob("*.old"))


def test_a_stopped_work_folder_goes_on_at_its_step(tmp_path):
  workdir = copied("stopped", tmp_path)
  said = run(":stopped", workdir)
  assert re.search(r"stage1_proj is done$", said, re.MULTILINE)
  assert "stage1_full resumes at step 5, example 20" in said
  text = (workdir / "stage1_full/metrics.jsonl").read_text("utf-8")
  steps = [json.loads(line)["step"] for line in text.splitlines()]
  assert steps == list(range(1, 13))
  assert (workdir / "stage1_full/done.json").exists()


@pytest.mark.parametrize(
  "stage",
  ["stage1_proj", "stage1_full", "stage2_sft", "stage2_dpo"]
  + ["detach_sft", "detach_dpo"],
)
def test_a_released_artifact_opens_with_its_values(stage):
  folder = WORK / "finished" / stage
  _, params = pivot_jax.load(str(folder))
  recorded = json.loads((folder / "fingerprint.json").read_text("utf-8"))
  assert fingerprint(params) == recorded


@pytest.mark.parametrize("stage", ["detach_sft", "detach_dpo"])
def test_a_released_hf_folder_holds_the_encoder(stage):
  folder = WORK / "finished" / stage
  encoder, ours = pivot_jax.load(f"{folder}:vision")
  other, theirs = pivot_jax.load(f"hf:{folder / 'hf'}:vision")
  assert fingerprint(ours) == fingerprint(theirs)
  assert encoder.vision == other.vision


def fingerprint(params):
  """Return a CRC32 of each leaf, as artifacts record it."""
  return {
    name: crc(np.asarray(leaf))
    for name, leaf in traverse_util.flatten_dict(params, sep="/").items()
  }


def crc(array):
  kind = zlib.crc32(f"{array.dtype}{array.shape}".encode())
  return f"{zlib.crc32(array.tobytes(), kind):08x}"


def test_a_released_report_is_read():
  report = WORK / "finished" / "report.json"
  assert set(json.loads(report.read_text("utf-8"))["results"]) >= {
    *("arms", "mllms", "differences", "training")
  }
  ran = subprocess.run(
    [sys.executable, "bench/report_table.py", report],
    cwd=documents.ROOT,
    env=os.environ | {"PYTHONPATH": str(documents.ROOT)},
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stderr
  assert re.search(r"^\| dpo \|.* 1\.0 ± 1\.6 \|", ran.stdout, re.MULTILINE)
