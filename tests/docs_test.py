"""The documents of this tree name what is there: commands, settings, files."""

import re

import pytest

import pivot_jax
from tests import documents

ROOT = documents.ROOT
DOCUMENTS = [
  path
  for path in (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
  )
  if path.exists()
]
TEXT = "\n\n".join(path.read_text("utf-8") for path in DOCUMENTS)
# Files of other projects.
ELSEWHERE = {
  "dino_models.py",
  "docs/modelpool/clip_vit.md",
  "keras_hub/src/models/vit/vit_presets.py",
  "moco_models.py",
  "siglip_models.py",
  "src/gimmick/models/__init__.py",
}
TOPS = ("bench", "configs", "docs", "launch", "pivot_jax", "tests")


@pytest.fixture(scope="module")
def objects():
  """Return stand-ins for the variables of snippets: a model of each kind."""
  encoder, _ = pivot_jax.load("package:toy:vision")
  model, _ = pivot_jax.load("package:toy/stage1")
  return {"pivot_jax": pivot_jax, "encoder": encoder, "model": model}


def tree():
  """Return the files of the tree, as `/path`."""
  found = [ROOT / "setup.py", *ROOT.glob("*.md")]
  for top in TOPS:
    found += (ROOT / top).rglob("*")
  return {f"/{path.relative_to(ROOT).as_posix()}" for path in found}


def named_files(text):
  """Return the files that a text names in code, but for those of a run."""
  found = set()
  for one in documents.inline(text):
    if re.fullmatch(r"[\w./-]+\.py", one) or (
      re.fullmatch(r"[\w./-]+\.(json|md|png|txt|yaml)", one)
      and one.split("/")[0] in TOPS
    ):
      found.add(one)
  for fence in documents.fences(text):
    if not fence.language:
      found |= set(re.findall(r"[\w./-]+\.py\b", fence.text))
  return found


@pytest.mark.parametrize(
  "command", documents.commands(TEXT), ids=lambda command: command.line
)
def test_every_command_parses(command):
  documents.check_command(command)


@pytest.mark.parametrize("setting", documents.settings(TEXT))
def test_every_setting_is_there(setting):
  documents.check_setting(setting)


@pytest.mark.parametrize("recipe", documents.recipes(TEXT))
def test_every_recipe_is_there(recipe):
  documents.check_recipe(recipe)


def test_every_name_in_a_snippet_is_there(objects):
  for snippet in documents.snippets(TEXT):
    documents.check_snippet(snippet, objects)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(path):
  links = re.findall(r"\]\(([^)#\s]+)", path.read_text("utf-8"))
  inside = [link for link in links if "://" not in link]
  assert [one for one in inside if not (path.parent / one).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_named_file_is_there(path):
  files = tree()
  absent = {
    name
    for name in named_files(path.read_text("utf-8")) - ELSEWHERE
    if not any(file.endswith(f"/{name}") for file in files)
  }
  assert absent == set()


def test_files_of_other_projects_are_named():
  named = named_files(TEXT)
  assert ELSEWHERE <= named
  assert {"configs/pivot.py", "tests/sharding_test.py", "main.py"} <= named


def test_a_file_that_is_not_there_is_found():
  text = "see `data/none.py` and `docs/none.md`, not `model.json`"
  assert named_files(text) == {"data/none.py", "docs/none.md"}
  assert not any(file.endswith("/data/none.py") for file in tree())
