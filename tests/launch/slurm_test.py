"""launch/slurm.sh: what it submits, runs, refuses and queues again."""

import re

import pytest

from tests.launch import scripts

# As sbatch: the job runs a copy of the script, where it was submitted.
SBATCH = r"""
printf '%s\n' "$@" >>"$PLACE/sbatch"
[[ ! ${LATER-} ]] || exit 0
while [[ $1 == --* ]]; do
  case $1 in --ntasks=*) export SLURM_NTASKS=${1#*=} ;; esac
  case $1 in --gpus-per-node=*) export SLURM_GPUS_ON_NODE=${1#*=} ;; esac
  shift
done
cp "$1" "$PLACE/slurm_script"
export SLURM_JOB_ID=7
exec bash "$PLACE/slurm_script" "${@:2}"
"""
SRUN = r"""
printf '%s\n' "$@" >>"$PLACE/srun"
echo "TASKS=$TASKS DEVICES=$PIVOT_DEVICES GRACE=$PIVOT_GRACE $XLA_FLAGS"
[[ ! ${CANCEL-} ]] || kill -TERM $PPID
exit "${CODE:-0}"
"""
TWO = {"NODES": "2", "GPUS": "4"}
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "4"}


@pytest.fixture
def place(tmp_path):
  """Return a checkout on a cluster."""
  found = scripts.Place(tmp_path)
  found.program("sbatch", SBATCH)
  found.program("srun", SRUN)
  found.program("scontrol", 'echo "$*" >>"$PLACE/scontrol"')
  (tmp_path / "launch").symlink_to(scripts.LAUNCH)
  return found


def test_a_node_is_one_task(place):
  code, said = place.run("slurm.sh", *place.flags(), **TWO)
  assert code == 0 and "TASKS=node DEVICES=8 GRACE=120 --xla_gpu" in said, said
  sbatch, srun = place.lines("sbatch"), place.lines("srun")
  assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(sbatch)
  assert f"--output={place.workdir}/logs/slurm-%j.out" in sbatch
  assert "--ntasks=2" in srun
  step = ["bash", "launch/run.sh", *place.flags()]
  assert srun[-len(step) :] == step
  assert (place.workdir / "logs").is_dir()


def test_a_gpu_is_one_task(place):
  _, said = place.run("slurm.sh", *place.flags(), **TWO, TASKS="gpu")
  assert "TASKS=gpu DEVICES=8 " in said
  sbatch = place.lines("sbatch")
  assert {"--ntasks=8", "--ntasks-per-node=4"} <= set(sbatch)
  assert not any("gpus-per-task" in word for word in sbatch)


def test_a_number_of_devices_that_does_not_fit_is_refused(place):
  run = ("slurm.sh", *place.flags())
  code, said = place.run(*run, **TWO, PIVOT_DEVICES="16")
  line = "slurm.sh: PIVOT_DEVICES=16: 2 tasks of 4 GPUs are 8\n"
  assert (code, said) == (2, line) and place.lines("sbatch") == []
  code, said = place.run(*run, **JOB, PIVOT_DEVICES="2")
  assert code == 2 and place.lines("srun") == []
  assert place.run(*run, **JOB, PIVOT_DEVICES="2", TASKS="gpu")[0] == 0
  assert place.run(*run, **JOB, PIVOT_DEVICES="8")[0] == 0


@pytest.mark.parametrize("code, env, again", [
  (0, {}, False), (1, {}, False), (2, {}, False), (137, {}, False),
  (70, {}, True), (75, {}, True), (134, {}, True),
  (70, {"SLURM_RESTART_COUNT": "9"}, True),
  (70, {"SLURM_RESTART_COUNT": "10"}, False),
  (134, {"SLURM_RESTART_COUNT": "1", "RESTARTS": "1"}, False),
  (75, {"SLURM_RESTART_COUNT": "10"}, True), (75, {"CANCEL": "1"}, False),
])  # fmt: skip
def test_what_queues_a_job_again(place, code, env, again):
  run = ("slurm.sh", *place.flags())
  found, said = place.run(*run, **JOB, **env, CODE=str(code))
  assert found == code, said
  assert place.lines("scontrol") == ["requeue 7"] * again


def test_sbatch_knows_how_a_job_is_stopped_and_queued():
  text = (scripts.LAUNCH / "slurm.sh").read_text("utf-8")
  # SLURM reads them before the first command only.
  head = text.partition("\nset -")[0]
  options = re.findall(r"^#SBATCH (\S+)", head, re.MULTILINE)
  # To the steps: `B:` would be the batch shell.
  assert "--signal=TERM@120" in options
  assert {"--requeue", "--open-mode=append"} <= set(options)


@pytest.mark.parametrize("words, env, says", [
  (["--workdir=W"], TWO, "give --config=RECIPE and --workdir=FOLDER"),
  (["--config=c"], TWO, "give --config=RECIPE and --workdir=FOLDER"),
  (["--config=c", "--workdir=W"], {"GPUS": "8"}, "NODES, their number"),
  (["--config=c", "--workdir=W"], {"NODES": "2"}, "GPUS, the number"),
  (["--config=c", "--workdir=W"], TWO | {"TASKS": "x"}, "TASKS=x is not"),
  (["--config=c", "--workdir=W"], {"SLURM_JOB_ID": "7"}, "SLURM_NTASKS is not"),
  (["--config=c", "--workdir=W"], TWO | {"RESTARTS": "x"}, "RESTARTS=x is no"),
], ids=str)  # fmt: skip
def test_a_mistake_is_one_line(place, words, env, says):
  code, said = place.run("slurm.sh", *words, **env)
  assert code == 2 and said.startswith(f"slurm.sh: {says}"), said
  assert said.count("\n") == 1 and place.lines("sbatch") == []


def test_it_says_where_to_start(place):
  (place.folder / "launch").unlink()
  code, said = place.run("slurm.sh", *place.flags(), **TWO)
  assert code == 2 and "no launch/run.sh here" in said


@pytest.mark.parametrize("env, name", [
  (TWO, "slurm.txt"), (TWO | {"TASKS": "gpu"}, "slurm_gpu.txt"),
])  # fmt: skip
def test_print_runs_nothing(place, env, name):
  code, said = place.run("slurm.sh", *place.flags(), "--print", **env)
  assert code == 0 and place.lines("sbatch") == place.lines("srun") == []
  assert place.shown(said) == scripts.golden(name)
