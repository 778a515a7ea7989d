#!/usr/bin/env bash
# Run pivot_jax on this host, and again where that helps; the others call this:
#   launch/run.sh --config=configs/pivot.py --workdir=WORKDIR [--config.x=y]
#
# Before: `pip install -e .`, and jax for the devices. Of several hosts each
# runs this, with a WORKDIR that all share. PYTHON names the interpreter.
# Restarts: on exit code 70, 75 or 134 the same command continues from the last
# checkpoint, RESTARTS (10) times at most, unless two starts are less than
# PROGRESS (60) seconds apart. SIGTERM or Ctrl-C makes the program save and end
# with 75, and this, too. --print shows the command and runs nothing.
set -euo pipefail
say() { echo "run.sh: $*" || true; }
die() { say "$*" >&2 && exit 2; }
print='' config='' workdir='' flags=()
for word; do
  case $word in
    --print) print=1 && continue ;;
    --config=?*) config=1 ;;
    --workdir=?*) workdir=${word#*=} ;;
  esac
  flags+=("$word")
done
[[ $config ]] || die "--config=RECIPE is missing"
[[ $workdir ]] || die "--workdir=FOLDER is missing"
[[ $workdir != *://* ]] || die "$workdir: mount the bucket, and name its folder"
restarts=${RESTARTS:-10} progress=${PROGRESS:-60}
lock=${TPU_LOCK:-/tmp/libtpu_lockfile}
devices=${TPU_DEVICES:-/dev/(accel|vfio/)[0-9]}
[[ $restarts$progress =~ ^[0-9]+$ ]] || die "RESTARTS or PROGRESS is no number"
cache=${JAX_COMPILATION_CACHE_DIR:-$(dirname -- "$workdir/")/.xla}
export PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=$cache
command=("${PYTHON:-python}" -m pivot_jax.main "${flags[@]}")
shown="JAX_COMPILATION_CACHE_DIR=${cache@Q} ${command[*]@Q}"
[[ ! $print ]] || { echo "$shown" && exit; }
command -v "${command[0]}" >/dev/null || die "${command[0]}: no such PYTHON"
index=${JAX_PROCESS_ID:-${SLURM_PROCID:-${OMPI_COMM_WORLD_RANK:-}}}
index=${index:-${JOB_COMPLETION_INDEX:-${TPU_WORKER_ID:-0}}}
log=$workdir/logs/$HOSTNAME-$index.log
{ mkdir -p -- "$workdir/logs" && : >>"$log"; } || die "$log cannot be written"

# The log outlives the signals that end this loop, and a terminal that is gone.
exec > >(trap '' TERM INT HUP && exec tee -ap -- "$log") 2>&1
tee=$! signals=0 child='' told=''
# At the end wait for the log, but not for a process that was left behind.
close() {
  exec >&- 2>&-
  for _ in {1..50}; do { kill -0 "$tee" && sleep 0.1; } || break; done
}
# A second SIGTERM would end the program amid its save, so it gets one.
pass_on() {
  signals=$((signals + 1))
  [[ $told || ! $child ]] || { told=1 && kill -TERM "$child"; } || true
}
trap close EXIT && trap pass_on TERM INT HUP

for ((left = restarts; ; left--)); do
  if [[ -e $lock ]]; then
    open=$(ls -l /proc/[0-9]*/fd 2>/dev/null) || true # Not all can be read.
    if [[ $open =~ "-> "$devices ]]; then say "the TPU is in use: $lock stays"
    else rm -f -- "$lock" && say "no process holds the TPU: removed $lock"; fi
  fi
  say "start $shown"
  began=$SECONDS told='' seen=-1
  # In a session of its own it gets signals from here only.
  setsid "${command[@]}" &
  child=$!
  ((signals == 0)) || pass_on
  while ((seen != signals)); do # A signal ends `wait`, too.
    seen=$signals code=0
    wait "$child" || code=$?
  done
  child='' took=$((SECONDS - began))
  # Ended by the signal before it could handle it: what is saved is saved.
  ((code != 143 || signals == 0)) || code=75
  say "exit code $code after $took seconds"
  [[ $code =~ ^(70|75|134)$ ]] && ((signals == 0)) || exit "$code"
  why="it ran less than $progress seconds"
  ((left > 0)) || why="$restarts restarts did not help"
  ((left > 0 && took >= progress)) || { say "gives up: $why" && exit "$code"; }
done
