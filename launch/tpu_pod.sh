#!/usr/bin/env bash
# Run pivot_jax on all workers of a TPU slice, v4 to v6e, by gcloud and ssh:
#   export NAME=pivot ZONE=us-east1-d TYPE=v6e-16 VERSION=v2-alpha-tpuv6e
#   launch/tpu_pod.sh create          # SPOT=1: a spot slice; VM=1: no queue
#   launch/tpu_pod.sh setup --config=configs/pivot.py --workdir=/shared/run
#   launch/tpu_pod.sh run --config=configs/pivot.py --workdir=/shared/run
#   launch/tpu_pod.sh logs | stop | delete
# Before: gcloud, logged in; WORKDIR on a disk that all workers have mounted.
# setup sends HEAD (ALLOW_DIRTY=1: without your changes) and ends by --dry_run.
# Restarts: run.sh on each worker. A preempted slice is gone: delete, create,
# setup, and the same run continues. --print shows the commands, runs nothing.
set -euo pipefail
die() { echo "tpu_pod.sh: $2" >&2 && exit "$1"; }
verb=${1-} print='' named='' flags=()
for word in "${@:2}"; do
  case $word in
    --print) print=1 && continue ;;
    --config=?*) named+=c ;;
    --workdir=/*) named+=w ;;
  esac
  flags+=("$word")
done
[[ $verb =~ ^(create|setup|run|logs|stop|delete)$ ]] ||
  die 2 "give create, setup, run, logs, stop or delete, then flags"
[[ ${NAME-} && ${ZONE-} ]] || die 2 "NAME or ZONE of the slice is missing"
[[ ! $verb =~ ^(setup|run)$ || $named =~ cw|wc ]] ||
  die 2 "give --config=RECIPE and --workdir=FOLDER, a full path"
[[ $verb != create || (${TYPE-} && ${VERSION-}) ]] ||
  die 2 "TYPE or VERSION is missing, as in TYPE=v6e-16 VERSION=v2-alpha-tpuv6e"
tpus() { go gcloud compute tpus "$@" "--zone=$ZONE" --quiet; }
go() { if [[ $print ]]; then echo "${*@Q}"; else "$@"; fi; }
on() { tpus tpu-vm ssh "$NAME" "--worker=$1" "--command=$2" </dev/null; }
all() { on all "$1" || explain; }
explain() {
  local state count i lost='' show='value(state,networkEndpoints.len())'
  read -r state count < <(tpus tpu-vm describe "$NAME" --format="$show") || true
  [[ $state == READY ]] || die 70 \
    "$NAME is ${state:-gone}: delete, create, setup; the same run continues"
  for ((i = 0; i < count; i++)); do on "$i" true || lost+=" $i"; done
  [[ ! $lost ]] || die 70 "no answer from worker$lost of $NAME"
  die 1 "a command failed on a worker of $NAME: see above"
}
start="cd pivot_jax || exit;env PIVOT_RUN=$NAME PYTHON=../pivot_venv/bin/python"
for name in PIVOT_DEVICES PIVOT_GRACE RESTARTS XLA_FLAGS LIBTPU_INIT_ARGS; do
  [[ ! ${!name+set} ]] || start+=$(printf ' %q' "$name=${!name}")
done
given=$(printf ' %q' "${flags[@]}")
runs="grep -qs run.sh /proc/\$(cat ~/pivot_run.pid 2>/dev/null)/cmdline"
stop="$runs && kill \$(cat ~/pivot_run.pid); while $runs; do sleep 1; done"
idle="! $runs || { echo \$HOSTNAME: stop the run first >&2; exit 2; }"
log="tail -n +1 --pid=\$(cat ~/pivot_run.pid) -F ~/pivot_run.out"
case $verb in
  create)
    how=(queued-resources create "$NAME" "--node-id=$NAME" --runtime-version)
    [[ ! ${VM-} ]] || how=(tpu-vm create "$NAME" --version)
    tpus "${how[@]}" "$VERSION" "--accelerator-type=$TYPE" ${SPOT:+--spot} ;;
  delete)
    if [[ ${VM-} ]]; then tpus tpu-vm delete "$NAME"
    else tpus queued-resources delete "$NAME" --force; fi ;;
  setup)
    cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
    [[ ! $(git status --porcelain) || ${ALLOW_DIRTY-} == 1 ]] ||
      die 2 "there are changes without a commit; ALLOW_DIRTY=1 leaves them out"
    file=$(git rev-parse --git-path pivot_jax.tar.gz)
    go git archive --format=tar.gz "--output=$file" HEAD
    all "$idle"
    tpus tpu-vm scp "$file" "$NAME:" --worker=all || explain
    all "set -e; rm -rf pivot_jax; mkdir pivot_jax; tar -xzf pivot_jax.tar.gz \
-C pivot_jax; python3 -m pip install -q --user uv; PATH=~/.local/bin:\$PATH; \
uv venv -q --allow-existing --python=3.12 pivot_venv; \
uv pip install -q --python=pivot_venv/bin/python -e pivot_jax 'jax[tpu]'"
    all "$start ../pivot_venv/bin/python -m pivot_jax.main$given --dry_run" ;;
  run)
    all "$idle"
    on all "$start nohup bash launch/run.sh$given >~/pivot_run.out 2>&1 & \
echo \$! >~/pivot_run.pid" || { on all "$stop" || true; explain; }
    on 0 "$log" ;;
  logs) on "${WORKER:-0}" "$log" ;;
  stop) all "$stop" ;;
esac
