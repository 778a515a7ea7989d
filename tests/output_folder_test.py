"""An output folder is a folder of this machine; an address is refused."""

import os
import pathlib
import subprocess
import sys

import pytest

import pivot_jax
from pivot_jax import files
from pivot_jax.data import __main__ as data
from pivot_jax.errors import InputError
from pivot_jax.weights import export

ROOT = pathlib.Path(__file__).parents[1]
ADDRESS = "gs://bucket/run"


@pytest.mark.parametrize(
  "path", [ADDRESS, pathlib.Path(ADDRESS), "s3://a", "file:///a", "HDFS://a/b"]
)
def test_an_address_is_no_path_of_this_machine(path):
  with pytest.raises(InputError, match="--to=.*:/"):
    files.local_path(path, "--to")


@pytest.mark.parametrize(
  "path", ["run", "/a/b", "a:b", "./gs:/a", "C:/runs", pathlib.Path("x/y")]
)
def test_a_path_stays_what_it_is(path):
  assert files.local_path(path, "--to") == pathlib.Path(path)


@pytest.mark.parametrize(
  "command",
  [
    ("pivot_jax.main", "--config=configs/pivot.py:debug", "--workdir={}"),
    (
      *("pivot_jax.main", "--config=configs/pivot.py:debug", "--workdir={}"),
      "--dry_run",
    ),
    ("pivot_jax.recipe.shipped", "--from=runs/scratch", "--to={}"),
    ("pivot_jax.data.scenes.tokenizer", "--out={}"),
  ],
  ids=lambda command: f"{command[0]}{command[-1][:9]}",
)
def test_a_command_refuses_an_address_in_one_line(command, tmp_path):
  module, *flags = (part.format(ADDRESS) for part in command)
  flags = [f.replace("configs/", f"{ROOT}/configs/") for f in flags]
  done = subprocess.run(
    [sys.executable, "-m", module, *flags],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  last = done.stderr.strip().splitlines()[-1]
  assert done.returncode == 2 and f"={ADDRESS[:4]}" in last, done.stderr
  assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_exports_refuse_an_address(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match=f"--to={ADDRESS}"):
    export.export("package:toy:vision", ADDRESS, format="hf")
  encoder, params = pivot_jax.load("package:toy:vision")
  for form in ("pivot_jax", "hf"):
    with pytest.raises(InputError, match=f"folder={ADDRESS}"):
      pivot_jax.save(ADDRESS, encoder, params, format=form)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "argv",
  [
    ("check", "rows.jsonl", f"--out={ADDRESS}"),
    ("show", "rows.jsonl", f"--html={ADDRESS}"),
    ("convert", "rows.jsonl", ADDRESS),
  ],
  ids=lambda argv: argv[0],
)
def test_commands_on_data_refuse_an_address(
  argv, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  talk = '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'
  (tmp_path / "rows.jsonl").write_text(f'{{"conversations": {talk}}}\n')
  assert data.main(argv) == 2
  assert "=gs:/" in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
