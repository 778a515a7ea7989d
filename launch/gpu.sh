#!/usr/bin/env bash
# Run pivot_jax on the GPUs of this node, or of several nodes by ssh:
#   launch/gpu.sh --config=configs/pivot.py --workdir=WORKDIR
#   HOSTS="node1 node2" GPUS=8 launch/gpu.sh --config=... --workdir=/shared/run
# Before: `pip install -e .`, jax for CUDA. For several nodes: ssh without a
# password, this folder and checkout at the same paths, PYTHON if `python` is
# another there, a WORKDIR that all share, port PORT (8476) of the first open.
# GPUS is the number on a node. One node is one process, which joins nobody.
# Restarts: run.sh on each node. If a node ends with an error, or its ssh fails
# (exit code 70), the others are stopped; then the same command continues.
# SIGTERM or Ctrl-C stops all. --print shows the commands and runs nothing.
set -euo pipefail
say() { echo "gpu.sh: $*" >&2 || true; }
die() { say "$*" && exit 2; }
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
[[ ${GPUS-1} =~ ^[1-9][0-9]*$ ]] || die "GPUS=$GPUS is no number of GPUs"
run=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)/run.sh
flag=--xla_gpu_nccl_termination_timeout_seconds
[[ ${XLA_FLAGS-} == *$flag=* ]] || XLA_FLAGS="${XLA_FLAGS-} $flag=600"
memory=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
settings=("XLA_FLAGS=${XLA_FLAGS# }" "XLA_PYTHON_CLIENT_MEM_FRACTION=$memory")
if [[ ! ${HOSTS-} ]]; then
  [[ ! ${GPUS-} ]] || settings+=("PIVOT_DEVICES=$GPUS")
  command=(env "${settings[@]}" bash "$run" --processes=none "${flags[@]}")
  [[ ! $print ]] || { echo "${command[*]@Q}" && exit; }
  exec "${command[@]}"
fi

read -ra hosts <<<"$HOSTS"
[[ ${GPUS-} ]] || die "GPUS, the number on a node, is missing"
[[ $workdir == /* ]] || die "$workdir: give the full path of a shared folder"
settings+=("JAX_COORDINATOR_ADDRESS=${hosts[0]#*@}:${PORT:-8476}")
count=${#hosts[@]}
settings+=("JAX_NUM_PROCESSES=$count" "PIVOT_DEVICES=$((count * GPUS))")
for name in PYTHON RESTARTS PROGRESS PIVOT_GRACE JAX_COMPILATION_CACHE_DIR; do
  [[ ! ${!name+set} ]] || settings+=("$name=${!name}")
done
ssh=(ssh -n -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=30)
running=() result=0 stopping=''
trap 'stopping=1' TERM INT HUP PIPE
for i in "${!hosts[@]}"; do
  start=(env "${settings[@]}" "JAX_PROCESS_ID=$i" bash "$run" "${flags[@]}")
  words="cd $(printf %q "$PWD") && exec$(printf ' %q' "${start[@]}")"
  command=("${ssh[@]}" "${hosts[i]}" "$words")
  [[ ! $print ]] || { echo "${command[*]@Q}" && continue; }
  "${command[@]}" &
  running[i]=$!
done
# Finds the loops of this WORKDIR, and not the shells whose text names them.
literally() { printf %s "$1" | sed 's/[^[:alnum:]^]/[&]/g; s/\^/\\^/g'; }
loops="^bash $(literally "$run") (.* )?--workdir=$(literally "$workdir")( |\$)"
loops="-u \$(id -u) -f $(printf %q "$loops")"
halt="pkill -TERM $loops; while pgrep $loops >/dev/null; do sleep 0.5; done"
while ((${#running[@]})); do
  sleep 0.5
  for i in "${!running[@]}"; do
    ! kill -0 "${running[i]}" 2>/dev/null || continue
    code=0 why='' && wait "${running[i]}" || code=$?
    ((code != 255)) || why=' (ssh failed)' code=70
    say "${hosts[i]} ended with exit code $code$why"
    ((code == 0)) || stopping=1 result=$((result ? result : code))
    unset "running[i]"
  done
  halts=()
  [[ ! $stopping ]] || for i in "${!running[@]}"; do
    say "stopping ${hosts[i]}"
    "${ssh[@]}" "${hosts[i]}" "$halt" & halts+=("$!")
  done
  ((${#halts[@]} == 0)) || wait "${halts[@]}" || true
done
exit "$result"
