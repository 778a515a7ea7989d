"""launch/README.md names what is there, and commands that are accepted."""

import re

import pytest

from tests import documents
from tests.launch import scripts

TEXT = (scripts.LAUNCH / "README.md").read_text("utf-8")
# What each command needs around it.
SLICE = {"NAME": "pivot", "ZONE": "z", "ALLOW_DIRTY": "1"}


def commands():
  found = documents.inline(TEXT)
  for fence in documents.fences(TEXT):
    found += fence.text.splitlines()
  return sorted({one for one in found if "launch/" in one and ".sh " in one})


@pytest.mark.parametrize("command", commands())
def test_every_command_prints_what_it_would_run(tmp_path, command):
  place = scripts.Place(tmp_path)
  scripts.checkout(tmp_path)
  place.program("start", f"{command} --print")
  code, said = place.run(place.bin / "start", **SLICE)
  assert code == 0 and len(said.splitlines()) >= 1, said
  assert not (tmp_path / "WORKDIR").exists()


def test_commands_are_found():
  assert len(commands()) >= 9
  for name in scripts.SCRIPTS:
    assert any(f"launch/{name} " in command for command in commands())


@pytest.mark.parametrize(
  "command", documents.commands(TEXT), ids=lambda command: command.line
)
def test_every_command_of_the_program_parses(command):
  documents.check_command(command)


@pytest.mark.parametrize("setting", documents.settings(TEXT))
def test_every_setting_is_there(setting):
  documents.check_setting(setting)


def test_it_names_every_file():
  names = {path.name for path in scripts.LAUNCH.iterdir()} - {"README.md"}
  assert names == set(re.findall(r"\]\(([^)]+)\)", TEXT))
  hardware = TEXT.partition("## Run on real hardware")[2]
  listed = re.findall(r"^\| `launch/([\w.]+)`.* \| (.+) \|$", hardware, re.M)
  assert {name for name, _ in listed} == names
  for _, when in listed:
    assert re.fullmatch(r"never|20\d\d-\d\d-\d\d", when)


def test_it_tells_the_exit_codes_that_start_again():
  rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", TEXT, re.M)
  again = {code for code, then in rows if "same command" in then}
  assert {code for code, _ in rows} == {"0", "1", "2", "70", "75", "134"}
  run = (scripts.LAUNCH / "run.sh").read_text("utf-8")
  (codes,) = re.findall(r"=~ \^\(([\d|]+)\)\$", run)
  assert again == set(codes.split("|"))
