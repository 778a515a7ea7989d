"""launch/gpu.sh: one process on a node, one on each of several by ssh."""

import sys
import time

import pytest

from tests.launch import scripts

# As ssh: the words of a command are one text, which a shell of the host reads.
SSH = r"""
echo "$*" >>"$PLACE/ssh"
while [[ $1 == -* ]]; do
  if [[ $1 == -o ]]; then shift; fi
  shift
done
host=${1#*@}
shift
[[ " ${DOWN-} " != *" $host "* ]] || { echo "ssh: $host: no route" >&2; exit 255; }
cd /
HOSTNAME=$host exec bash -c "$*"
"""
TWO = {"HOSTS": "one me@two", "GPUS": "8"}


@pytest.fixture
def place(tmp_path):
  """Return a folder with hosts, and programs that end as a test says."""
  found = scripts.Place(tmp_path)
  found.program("python", scripts.PYTHON.partition("\n")[2], sys.executable)
  found.program("ssh", SSH)
  return found


def both_run(place):
  return place.lines("starts-0") and place.lines("starts-1")


def wait_for(what, *args):
  until = time.monotonic() + 20
  while not what(*args):
    assert time.monotonic() < until
    time.sleep(0.05)


def test_a_node_is_one_process_that_joins_nobody(place):
  code, said = place.run("gpu.sh", *place.flags())
  assert code == 0, said
  words = ["-m", "pivot_jax.main", "--processes=none", *place.flags()]
  assert place.lines("starts-here") == [str(words)]


def test_settings_of_the_user_stay(place):
  place.program("python", 'echo "$XLA_FLAGS:$XLA_PYTHON_CLIENT_MEM_FRACTION"')
  limit = "--xla_gpu_nccl_termination_timeout_seconds"
  run = ("gpu.sh", *place.flags())
  assert f"\n{limit}=600:0.92\n" in place.run(*run)[1]
  own = {"XLA_FLAGS": "--a=b c", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
  assert f"\n--a=b c {limit}=600:0.5\n" in place.run(*run, **own)[1]
  assert f"\n{limit}=9:" in place.run(*run, XLA_FLAGS=f"{limit}=9")[1]


def test_hosts_get_the_flags_and_their_places(place):
  names = "ADDRESS=$JAX_COORDINATOR_ADDRESS COUNT=$JAX_NUM_PROCESSES"
  names = f"{names} DEVICES=$PIVOT_DEVICES RESTARTS=$RESTARTS PWD=$PWD"
  text = f'echo "INDEX=$JAX_PROCESS_ID {names}" >>"$PLACE/got"\n'
  text += 'printf "%s\\n" "${@:3}" >>"$PLACE/words-$JAX_PROCESS_ID"'
  place.program("python", text)
  code, said = place.run("gpu.sh", *place.flags(), **TWO, RESTARTS="3")
  assert code == 0, said
  rest = f"ADDRESS=one:8476 COUNT=2 DEVICES=16 RESTARTS=3 PWD={place.folder}"
  assert sorted(place.lines("got")) == [f"INDEX={i} {rest}" for i in (0, 1)]
  for index in (0, 1):
    assert place.lines(f"words-{index}") == list(place.flags())
  logs = sorted(path.name for path in (place.workdir / "logs").iterdir())
  assert logs == ["one-0.log", "two-1.log"]


def test_hosts_start_again_by_themselves(place):
  for index in (0, 1):
    place.write(f"codes-{index}", [134, 75, 0])
  assert place.run("gpu.sh", *place.flags(), **TWO)[0] == 0
  assert len(place.lines("starts-0")) == len(place.lines("starts-1")) == 3


@pytest.mark.parametrize("index, host", [(0, "one"), (1, "me@two")])
def test_a_host_that_fails_stops_the_others(place, index, host):
  place.write(f"codes-{index}", [2])
  place.write(f"codes-{1 - index}", ["wait", 0])
  code, said = place.run("gpu.sh", *place.flags(), **TWO)
  assert code == 2 and f"{host} ended with exit code 2\n" in said, said
  # The other was running, or had not begun and has not since.
  assert len(place.lines(f"starts-{1 - index}")) <= 1


def test_a_host_that_is_not_there_stops_the_others(place):
  place.write("codes-0", ["wait", 0])
  code, said = place.run("gpu.sh", *place.flags(), **TWO, DOWN="two")
  assert code == 70, said
  assert "me@two ended with exit code 70 (ssh failed)\n" in said
  assert "stopping one\n" in said and "signals 1\n" in said
  assert len(place.lines("starts-0")) == 1


def test_sigterm_stops_all_hosts(place):
  for index in (0, 1):
    place.write(f"codes-{index}", ["wait", 0])
  process = place.start("gpu.sh", *place.flags(), **TWO)
  wait_for(both_run, place)
  process.terminate()
  code, said = scripts.end(process)
  assert code == 75 and said.count("signals 1\n") == 2, said
  assert len(place.lines("starts-0")) == len(place.lines("starts-1")) == 1


def test_a_stop_leaves_other_runs_alone(place):
  place.write("codes-here", ["wait"])
  # Its name begins like that of the run that is stopped.
  other = place.start(
    "gpu.sh", *place.flags()[:-1], f"--workdir={place.workdir}2"
  )
  wait_for(place.lines, "starts-here")
  place.run("gpu.sh", *place.flags(), **TWO, DOWN="one two")
  place.write("codes-0", [1])
  place.write("codes-1", ["wait"])
  place.run("gpu.sh", *place.flags(), **TWO)
  assert other.poll() is None
  other.terminate()
  assert scripts.end(other)[0] == 75


@pytest.mark.parametrize("words, env, says", [
  (["--workdir=/W"], {}, "give --config=RECIPE and --workdir=FOLDER"),
  (["--config=c"], {}, "give --config=RECIPE and --workdir=FOLDER"),
  (["--config=c", "--workdir=W"], {"GPUS": "all"}, "GPUS=all is no number"),
  (["--config=c", "--workdir=/W"], {"HOSTS": "a b"}, "GPUS, the number"),
  (["--config=c", "--workdir=W"], TWO, "W: give the full path"),
], ids=str)  # fmt: skip
def test_a_mistake_is_one_line(place, words, env, says):
  code, said = place.run("gpu.sh", *words, **env)
  assert code == 2 and said.startswith(f"gpu.sh: {says}"), said
  assert said.count("\n") == 1 and place.lines("ssh") == []


@pytest.mark.parametrize("env, name", [
  ({"GPUS": "8"}, "gpu.txt"), (TWO, "gpu_hosts.txt"),
])  # fmt: skip
def test_print_runs_nothing(place, env, name):
  code, said = place.run("gpu.sh", *place.flags(), "--print", **env)
  assert code == 0 and place.lines("ssh") == place.lines("starts-here") == []
  assert place.shown(said) == scripts.golden(name)
