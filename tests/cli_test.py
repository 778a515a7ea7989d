"""Command lines as a new user types them: help, stray words, wrong flags."""

import sys

import pytest

import pivot_jax
from pivot_jax import cli, main
from tests import documents


@pytest.fixture
def command(monkeypatch, capsys):
  """Return fn(*words) -> (exit code, what it says) of `pivot-jax WORDS`.

  A command that would run ends with "accepted", and its flags by name.
  """

  def run(*words):
    # Its flags are defined where it is imported, and are here for this once.
    monkeypatch.delitem(sys.modules, "pivot_jax.main")
    monkeypatch.delattr(pivot_jax, "main")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with documents.started(words):
      try:
        cli.main()
      except documents.Parsed:
        return "accepted", ""
      except SystemExit as left:
        said = capsys.readouterr()
        return left.code, said.out + said.err
    raise AssertionError("it neither runs nor ends")

  return run


RUN = ("run", "pivot:debug", "--workdir=W")


@pytest.mark.parametrize("words", [
  RUN,
  ("run", "--dry_run", "pivot:debug", "--workdir=W"),
  ("run", "--nodry_run", "pivot:debug", "--workdir=W"),
  ("run", "--workdir", "W", "pivot:debug"),
  ("run", "--config.seeds=2", "pivot:debug", "--workdir=W"),
  ("run", "--config=pivot:debug", "--workdir=W"),
  ("run", "--config", "pivot:debug", "--workdir=W", "--rerun", "a,b"),
  ("export", "--from=a", "--to=b"),
], ids=" ".join)  # fmt: skip
def test_a_command_line_is_accepted_in_any_order(command, words):
  assert command(*words) == ("accepted", "")


@pytest.mark.parametrize("words, says", [
  ((*RUN, "extra"), "'extra' is no flag"),
  ((*RUN, "dry_run"), "'dry_run' is no flag (did you mean --dry_run?)"),
  ((*RUN, "--rerun", "a", "b"), "'b' is no flag"),
  ((*RUN, "--config=pivot:debug"), "'pivot:debug' is no flag"),
  (("export", "--from=a", "--to=b", "extra"), "'extra' is no flag"),
  (("run", "--workdir=W"), "RECIPE is missing; give it as in: pivot-jax run piv"),
  (("run",), "--workdir is missing"),
  (("run", "--workdir=W", "--config.seeds=2"), "RECIPE is missing"),
  (("run", "pivot:debug", "--workdir="), "--workdir is missing"),
  (("export", "--to=b"), "--from is missing"),
  ((*RUN, "--dryrun"), "'dryrun'. Did you mean: dry_run"),
  ((*RUN, "--config.stage2_dpo.beta=x"), "stage2_dpo.beta=x: could not convert"),
  (("run", "pivto", "--workdir=W"), "pivto: no such recipe or file"),
  (("data", "chekc", "x"), "no command 'chekc'"),
  (("data", "check", "pivot:debug"), "pivot:debug: its sources name no files"),
  (("data", "check", "pivto:files"), "pivto: no such recipe or file (did you"),
], ids=str)  # fmt: skip
def test_a_wrong_command_line_is_one_line_that_names_the_word(
  command, monkeypatch, words, says
):
  if words[0] == "data":
    # It parses no flags of absl, and ends by itself.
    monkeypatch.setattr(documents, "_stopping", lambda method: method)
  code, said = command(*words)
  assert code == main.EXIT_INPUT and says in said and said.count("\n") == 1, (
    said
  )
  assert said.count("'") % 2 == 0


@pytest.mark.parametrize("words, parts", [
  (("run",), ("pivot-jax run RECIPE [flags]", "pivot:debug", "--workdir=",
              "--[no]dry_run", "--rerun=", "--config.KEY=VALUE")),
  (("export",), ("pivot-jax export --from=ADDRESS", "--to=", "--format=",
                 "big_vision", "--dtype=", "--source=")),
  (("data",), ("data check", "data show")),
], ids=str)  # fmt: skip
def test_help_lists_the_flags_and_ends_well(command, words, parts):
  code, said = command(*words, "--help")
  assert code == 0
  assert not [part for part in parts if part not in said], said


@pytest.mark.parametrize("module", ["pivot_jax.main", "pivot_jax.export"])
def test_help_of_a_module_names_it_as_the_command(module, capsys):
  documents.parse(module, ["--help"])
  said = capsys.readouterr().out
  assert said.startswith(f"usage: python -m {module} --") and "flags:" in said
