#!/usr/bin/env bash
#SBATCH --job-name=pivot_jax
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Run pivot_jax as a SLURM job; this submits itself with what it is given:
#   NODES=2 GPUS=8 launch/slurm.sh --config=configs/pivot.py --workdir=WORKDIR
# Before: `pip install -e .` and jax for CUDA on a disk that the nodes share, as
# is WORKDIR. Start it in the checkout; other options of sbatch are variables
# (SBATCH_PARTITION, SBATCH_TIMELIMIT).
# A node has one task with all its GPUs; TASKS=gpu makes it one task a GPU.
# Restarts: run.sh on each node; then exit code 75 (stopped: a time limit gives
# 120 seconds) queues the job again, and 70 or 134 too, RESTARTS (10) times.
# `scancel JOB` stops it for good. --print shows the commands and runs nothing.
set -euo pipefail
die() { echo "slurm.sh: $*" >&2 && exit 2; }
print='' config='' workdir='' flags=()
for word; do
  case $word in
    --print) print=1 && continue ;;
    --config=?*) config=1 ;;
    --workdir=?*) workdir=${word#*=} ;;
  esac
  flags+=("$word")
done
[[ $config && $workdir ]] || die "give --config=RECIPE and --workdir=FOLDER"
[[ ${TASKS:=node} =~ ^(node|gpu)$ ]] || die "TASKS=$TASKS is not node or gpu"
[[ -f launch/run.sh ]] || die "no launch/run.sh here: start in the checkout"
restarts=${RESTARTS:-10}
[[ $restarts =~ ^[0-9]+$ ]] || die "RESTARTS=$restarts is no number"

each=1 tasks=${SLURM_NTASKS-} gpus=${SLURM_GPUS_ON_NODE-}
if [[ ! ${SLURM_JOB_ID-} ]]; then
  [[ ${NODES-} =~ ^[1-9][0-9]*$ ]] || die "NODES, their number, is missing"
  [[ ${GPUS-} =~ ^[1-9][0-9]*$ ]] || die "GPUS, the number on one, is missing"
  gpus=$GPUS
  [[ $TASKS == node ]] || each=$gpus
  tasks=$((NODES * each))
fi
[[ $tasks ]] || die "SLURM_NTASKS is not set: submit by launch/slurm.sh"
if [[ $gpus ]]; then
  [[ $TASKS == node ]] || gpus=1
  devices=$((tasks * gpus))
  [[ ${PIVOT_DEVICES:=$devices} == "$devices" ]] ||
    die "PIVOT_DEVICES=$PIVOT_DEVICES: $tasks tasks of $gpus GPUs are $devices"
  export PIVOT_DEVICES
fi
flag=--xla_gpu_nccl_termination_timeout_seconds
[[ ${XLA_FLAGS-} == *$flag=* ]] || XLA_FLAGS="${XLA_FLAGS-} $flag=600"
export TASKS XLA_FLAGS=${XLA_FLAGS# } PIVOT_GRACE=${PIVOT_GRACE:-120}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

# No task is killed when another ends: that would look like a stop (75).
step=(srun "--ntasks=$tasks" --kill-on-bad-exit=0 --wait=0)
step+=(bash launch/run.sh "${flags[@]}")
if [[ ! ${SLURM_JOB_ID-} ]]; then
  job=(sbatch "--nodes=$NODES" "--ntasks=$tasks" "--ntasks-per-node=$each")
  job+=("--gpus-per-node=$GPUS" "--output=$workdir/logs/slurm-%j.out")
  job+=("${BASH_SOURCE[0]}" "${flags[@]}")
  [[ ! $print ]] || { echo "${job[*]@Q}"$'\n'"${step[*]@Q}" && exit; }
  mkdir -p -- "$workdir/logs" || die "$workdir/logs cannot be made"
  exec "${job[@]}"
fi
[[ ! $print ]] || { echo "${step[*]@Q}" && exit; }
code=0 cancelled=''
trap 'cancelled=1' TERM
"${step[@]}" || code=$?
again=''
case $code in
  70 | 134) [[ ${SLURM_RESTART_COUNT:-0} -ge $restarts ]] || again=1 ;;
  75) again=1 ;;
esac
if [[ $again && ! $cancelled ]]; then
  echo "slurm.sh: exit code $code: job $SLURM_JOB_ID is queued again"
  scontrol requeue "$SLURM_JOB_ID" || echo "slurm.sh: SLURM refused" >&2
fi
exit "$code"
