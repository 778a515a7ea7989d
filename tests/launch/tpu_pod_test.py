"""launch/tpu_pod.sh: its verbs on a slice of two workers that stands in."""

import subprocess
import sys
import time

import pytest

from tests.launch import scripts

# As gcloud: a shell of each worker, which has a home of its own, reads a command.
GCLOUD = r"""
printf '%s\n' "$*" >>"$PLACE/gcloud"
case $4 in
  ssh) ;;
  describe) [[ ${STATE=READY} ]] && printf '%s\t2\n' "$STATE" && exit ;;
  scp) for worker in 0 1; do cp "$5" "$PLACE/$worker"; done && exit ;;
  *) exit ;;
esac
code=0
for word; do
  case $word in
    --worker=all) workers="0 1" ;;
    --worker=*) workers=${word#*=} ;;
    --command=*) command=${word#*=} ;;
  esac
done
for worker in $workers; do
  if [[ " ${DOWN-} " == *" $worker "* ]]; then
    echo "worker $worker: no route" >&2 && code=1
  else
    cd "$PLACE/$worker"
    HOME=$PWD HOSTNAME=w-$worker bash -c "$command" || code=1
  fi
done
exit "$code"
"""
# As python3 and uv, which make an environment with a program of a test.
UV = r"""
printf '%s\n' "$*" >>"$PLACE/uv"
mkdir -p pivot_venv/bin
cp "$PLACE/bin/program" pivot_venv/bin/python
"""
SLICE = {"NAME": "pivot", "ZONE": "z"}
CREATE = SLICE | {"TYPE": "v6e-8", "VERSION": "v2-alpha-tpuv6e"}


@pytest.fixture
def place(tmp_path):
  """Return a checkout and a slice of two workers."""
  found = scripts.Place(tmp_path)
  found.program("gcloud", GCLOUD)
  found.program("python3", 'printf "%s\\n" "$*" >>"$PLACE/pip"')
  found.program("uv", UV)
  found.program("program", scripts.PYTHON.partition("\n")[2], sys.executable)
  for worker in "01":
    (tmp_path / worker).mkdir()
  scripts.checkout(tmp_path / "code")
  return found


def pod(place, *words, **env):
  return scripts.end(start(place, *words, **env))


def start(place, *words, **env):
  script = str(place.folder / "code" / "launch" / "tpu_pod.sh")
  return place.start(script, *words, **SLICE | env)


def set_up(place):
  code, said = pod(place, "setup", *place.flags())
  assert code == 0, said
  return said


def runs(place):
  return [place.lines(f"starts-w-{worker}") for worker in "01"]


@pytest.mark.parametrize("env, words", [
  ({}, "queued-resources create pivot --node-id=pivot --runtime-version"),
  ({"VM": "1"}, "tpu-vm create pivot --version"),
])  # fmt: skip
def test_a_slice_is_created(place, env, words):
  assert pod(place, "create", **CREATE, **env)[0] == 0
  rest = "v2-alpha-tpuv6e --accelerator-type=v6e-8"
  line = f"compute tpus {words} {rest} --zone=z --quiet"
  assert place.lines("gcloud") == [line]
  pod(place, "create", **CREATE, **env, SPOT="1")
  assert " --spot " in place.lines("gcloud")[1]


@pytest.mark.parametrize("env, words", [
  ({}, "queued-resources delete pivot --force"),
  ({"VM": "1"}, "tpu-vm delete pivot"),
])  # fmt: skip
def test_a_slice_is_deleted(place, env, words):
  assert pod(place, "delete", **env)[0] == 0
  assert place.lines("gcloud") == [f"compute tpus {words} --zone=z --quiet"]


def test_setup_brings_one_code_and_tries_it_on_all(place):
  set_up(place)
  expected = (scripts.LAUNCH / "run.sh").read_text("utf-8")
  for worker in "01":
    code = place.folder / worker / "pivot_jax"
    assert (code / "launch" / "run.sh").read_text("utf-8") == expected
  words = ["-m", "pivot_jax.main", *place.flags(), "--dry_run"]
  assert runs(place) == [[str(words)], [str(words)]]


def test_setup_again_replaces_the_code(place):
  set_up(place)
  (place.folder / "0" / "pivot_jax" / "old.py").touch()
  set_up(place)
  assert not (place.folder / "0" / "pivot_jax" / "old.py").exists()


def test_setup_refuses_changes_without_a_commit(place):
  here = place.folder / "code" / "launch" / "run.sh"
  here.write_text("changed", "utf-8")
  code, said = pod(place, "setup", *place.flags())
  assert code == 2 and "changes without a commit" in said
  assert place.lines("gcloud") == []
  code, _ = pod(place, "setup", *place.flags(), ALLOW_DIRTY="1")
  sent = place.folder / "0" / "pivot_jax" / "launch" / "run.sh"
  assert code == 0 and sent.read_text("utf-8") != "changed"


def test_a_setup_that_fails_on_a_worker_says_so(place):
  place.program("uv", "[[ $HOSTNAME != w-1 ]]")
  code, said = pod(place, "setup", *place.flags())
  assert code == 1 and "failed on a worker of pivot" in said
  assert runs(place) == [[], []]


def test_run_starts_all_and_shows_the_first(place):
  set_up(place)
  (place.folder / "starts-w-0").unlink()
  (place.folder / "starts-w-1").unlink()
  place.write("codes-w-0", [75, 0])
  code, said = pod(place, "run", *place.flags())
  assert code == 0 and said.count("running\n") == 2, said
  assert said.splitlines()[-1].startswith("run.sh: exit code 0 ")
  words = str(["-m", "pivot_jax.main", *place.flags()])
  assert runs(place) == [[words] * 2, [words]]
  assert "exit code 0" in pod(place, "logs", WORKER="1")[1]
  logs = sorted(path.name for path in (place.workdir / "logs").iterdir())
  assert logs == ["w-0-0.log", "w-1-0.log"]


def test_stop_ends_a_run_that_is_left_alone(place):
  set_up(place)
  for worker in "01":
    place.write(f"codes-w-{worker}", [0, "wait", 0])
  # What shows the log may go; the run stays.
  shown = start(place, "run", *place.flags())
  until = time.monotonic() + 20
  while any(len(lines) < 2 for lines in runs(place)):
    assert time.monotonic() < until
    time.sleep(0.05)
  shown.terminate()
  code, said = pod(place, "run", *place.flags())
  assert code == 1 and "w-1: stop the run first" in said, said
  assert pod(place, "stop")[0] == 0
  scripts.end(shown)
  for worker in "01":
    said = place.lines(f"{worker}/pivot_run.out")
    assert "signals 1" in said and "exit code 75" in said[-1]
  assert all(len(lines) == 2 for lines in runs(place))
  # There is nothing to stop.
  assert pod(place, "stop")[0] == 0


def test_a_worker_that_is_not_there_is_named_and_the_others_stop(place):
  set_up(place)
  place.write("codes-w-0", [0, "wait", 0])
  # It answers while the slice is looked at, and no more when the run starts.
  text = 'if [[ "$*" == *nohup* ]]; then touch "$PLACE/down"; fi\n'
  text += "if [[ -e $PLACE/down ]]; then export DOWN=1; fi\n"
  place.program("gcloud", text + GCLOUD)
  code, said = pod(place, "run", *place.flags())
  assert code == 70 and "no answer from worker 1 of pivot\n" in said, said
  # The other is stopped, or has never begun.
  said = place.lines("0/pivot_run.out")[-1:]
  assert all(line.startswith("run.sh: exit code 75 ") for line in said)
  assert len(runs(place)[0]) <= 2


@pytest.mark.parametrize("state", ["PREEMPTED", ""])
@pytest.mark.parametrize("verb", ["setup", "run", "stop"])
def test_a_slice_that_is_gone_is_to_be_made_again(place, verb, state):
  words = () if verb == "stop" else place.flags()
  code, said = pod(place, verb, *words, DOWN="0 1", STATE=state)
  line = f"pivot is {state or 'gone'}: delete, create, setup; the same run"
  assert code == 70 and line in said.splitlines()[-1], said


@pytest.mark.parametrize("words, env, says", [
  ([], {}, "give create, setup, run, logs, stop or delete"),
  (["--print"], {}, "give create, setup, run, logs, stop or delete"),
  (["stop"], {"NAME": ""}, "NAME or ZONE of the slice is missing"),
  (["create"], {}, "TYPE or VERSION is missing"),
  (["run", "--workdir=/W"], {}, "give --config=RECIPE and --workdir=FOLDER"),
  (["run", "--config=c", "--workdir=W"], {}, "give --config=RECIPE and --workd"),
], ids=str)  # fmt: skip
def test_a_mistake_is_one_line(place, words, env, says):
  code, said = pod(place, *words, **env)
  assert code == 2 and said.startswith(f"tpu_pod.sh: {says}"), said
  assert said.count("\n") == 1 and place.lines("gcloud") == []


@pytest.mark.parametrize(
  "verb", ["create", "setup", "run", "logs", "stop", "delete"]
)
def test_print_runs_nothing(place, verb):
  code, said = pod(place, verb, *place.flags(), "--print", **CREATE)
  assert code == 0 and place.lines("gcloud") == []
  assert place.shown(said) == scripts.golden(f"tpu_pod_{verb}.txt")
  # What is printed is a command.
  subprocess.run(["bash", "-n"], input=said, text=True, check=True)
