#!/usr/bin/env bash
# Trains on a Cloud TPU VM, a pod slice or several slices until the run is done:
#
#   TPU_NAME=clip ZONE=us-west4-a ACCELERATOR=v5litepod-256 SPOT=1 \
#     launch/tpu_vm.sh run --config=configs/clip_l14.py --workdir=/shared/clip_l14
#
#   run FLAGS...  makes the TPU if there is none, copies this checkout to it, installs, and runs vlm_jax.main FLAGS on
#                 every worker; after a preemption or failure again (launch/restart.sh). Ctrl-C: the run saves and ends
#   logs          fetches the log of every worker to runs/logs/TPU_NAME/sliceI/WORKER.log
#   stop          makes a run whose launcher is gone save and end
#   delete        deletes the TPU; until then it costs money
#
# Environment: TPU_NAME, ZONE; for `run` also ACCELERATOR (v4-8, v5litepod-16, v5p-8, v6e-256, ...), and optionally
#   SLICES   number of slices (1)                     SPOT     1: preemptible capacity
#   SETUP    command for every worker after the       RUNTIME  software version of the TPU VM (by accelerator)
#            installation, such as a mount            DELETE   1: delete the TPU when the run is done
#   DRY_RUN  1: print the commands instead            POLL_SECONDS  between looks at a TPU that is being made (30)
# and those of launch/restart.sh. Project and account are those of gcloud.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=launch/signals.sh
source launch/signals.sh

say() { echo "tpu_vm: $*" >&2; }

fail() { say "$*" && exit 2; }

call() {
  if [[ -z $DRY_RUN ]]; then
    "$@"
  else
    printf '%q ' "$@"
    echo
  fi
}

queued() { # gcloud's queued resources: one path for one slice and several, for capacity at once and later
  call gcloud compute tpus queued-resources "$1" "$TPU_NAME" --zone="$ZONE" --quiet "${@:2}"
}

on_workers() { # a command on every worker at once: in batches, the first would wait for the others for ever
  queued ssh --node=all --worker=all --batch-size=all --command="$1"
}

runtime() {
  case $ACCELERATOR in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) fail "ACCELERATOR=$ACCELERATOR is not known here; give RUNTIME, its software version, too (TPU7x: launch/gke)" ;;
  esac
}

create() {
  local nodes=(--node-id="$TPU_NAME") version spot=${SPOT#0}
  if ((SLICES > 1)); then nodes=(--node-count="$SLICES" --node-prefix="$TPU_NAME"); fi
  version=${RUNTIME:-$(runtime)} || exit
  queued create "${nodes[@]}" --accelerator-type="$ACCELERATOR" --runtime-version="$version" ${spot:+--spot}
}

request_state() { # of the request for the TPU; empty: there is none
  if [[ -n $DRY_RUN ]]; then echo "$dry_state" && return; fi
  gcloud compute tpus queued-resources list --zone="$ZONE" --filter="name~/$TPU_NAME\$" --format='value(state.state)'
}

has_lost_slices() { # a request stays ACTIVE for a while after its slices are gone
  if [[ -n $DRY_RUN ]]; then return 1; fi
  gcloud compute tpus tpu-vm list --zone="$ZONE" --filter="name~/$TPU_NAME(-[0-9]+)?\$" --format='value(state)' |
    grep -qE 'PREEMPTED|TERMINATED'
}

obtain() { # returns once the TPU can be used; one that was preempted is made anew
  local state
  while true; do
    state=$(request_state) || return
    if [[ $state == ACTIVE ]] && has_lost_slices; then state=SUSPENDED; fi
    case $state in
      ACTIVE) return 0 ;;
      '')
        create || return
        dry_state=ACTIVE
        ;;
      SUSPENDED)
        say "$TPU_NAME was preempted; asking for another"
        queued delete --force || return
        ;;
      FAILED)
        say "the request for $TPU_NAME failed:"
        queued describe
        queued delete --force
        return 1
        ;;
      *) say "$TPU_NAME: $state" ;;
    esac
    if [[ -n $DRY_RUN ]]; then continue; fi
    children=()
    begin sleep "${POLL_SECONDS:-30}"
    await "${children[0]}"
    if ((signals)); then exit 75; fi
  done
}

pack() { # the files of this checkout as they are, committed or not, without what git ignores
  packed=$(mktemp -d)
  trap 'rm -rf "$packed"' EXIT
  GIT_INDEX_FILE=$packed/index git add --all &&
    TREE=$(GIT_INDEX_FILE=$packed/index git write-tree) &&
    git archive --format=tar.gz --output="$packed/vlm_jax.tar.gz" "$TREE"
}

install() {
  local quoted
  # shellcheck disable=SC2016 # for the worker's shell
  printf -v quoted 'test "$(cat .vlm_jax/installed)" = %q' "$TREE"
  if [[ -z $DRY_RUN ]] && on_workers "$quoted" >/dev/null 2>&1; then return; fi
  call gcloud compute tpus queued-resources scp "$BUNDLE" "$TPU_NAME:vlm_jax.tar.gz" --zone="$ZONE" --quiet \
    --node=all --worker=all --batch-size=all || return
  printf -v quoted '%q ' "$TREE" "${SETUP:-}"
  on_workers "mkdir -p vlm_jax && tar -xzf vlm_jax.tar.gz -C vlm_jax && vlm_jax/launch/tpu_worker.sh install $quoted"
}

attempt() { # one try, for launch/restart.sh
  local flags
  obtain || exit
  install || exit
  if ((signals)); then exit 75; fi
  printf -v flags '%q ' "$@"
  on_stop() { on_workers 'vlm_jax/launch/tpu_worker.sh stop'; } # ending ssh alone would end nothing there
  children=()
  begin on_workers "vlm_jax/launch/tpu_worker.sh run $flags"
  await "${children[0]}"
  if ((signals)); then exit 75; fi
  case $status in
    0 | 2 | 75) exit "$status" ;;
  esac
  if [[ $(request_state) != ACTIVE ]] || has_lost_slices; then exit 75; fi
  exit "$status"
}

progress() { # for launch/restart.sh: the newest step in the workdir of the command, as the first worker sees it
  local command
  printf -v command '%q ' "$@"
  queued ssh --node=0 --worker=0 --command="cd vlm_jax && launch/progress.sh $command" 2>/dev/null
}

run() {
  if [[ -z ${ACCELERATOR:-} ]]; then fail "set ACCELERATOR, such as v5litepod-16"; fi
  if [[ " $*" != *" --workdir"* ]]; then fail "give --workdir=DIR, a folder that all workers share and that outlives them"; fi
  if [[ -n $DRY_RUN ]]; then TREE=TREE BUNDLE=vlm_jax.tar.gz attempt "$@"; fi
  pack || exit 1
  export TREE BUNDLE=$packed/vlm_jax.tar.gz RESTART_PROGRESS="launch/tpu_vm.sh progress"
  begin launch/restart.sh launch/tpu_vm.sh attempt "$@"
  await "${children[0]}"
  if [[ $status -eq 0 && -n ${DELETE#0} ]]; then
    queued delete --force
  else
    say "$TPU_NAME is still there and costs money; launch/tpu_vm.sh delete ends that"
  fi
  exit "$status"
}

logs() {
  local slice folder
  for ((slice = 0; slice < SLICES; slice++)); do
    folder=runs/logs/$TPU_NAME/slice$slice
    call mkdir -p "$folder" &&
      queued ssh --node="$slice" --worker=all --output-directory="$folder" --command='cat .vlm_jax/log' || return
  done
}

SLICES=${SLICES:-1} SPOT=${SPOT:-} DELETE=${DELETE:-} DRY_RUN=${DRY_RUN:-}
DRY_RUN=${DRY_RUN#0} dry_state=
if [[ -z ${TPU_NAME:-} || -z ${ZONE:-} ]]; then fail "set TPU_NAME and ZONE"; fi
if [[ ! $SLICES =~ ^[1-9][0-9]*$ ]]; then fail "SLICES=$SLICES must be a number of slices"; fi
case ${1:-} in
  run | attempt | progress | logs) "$@" ;;
  stop) on_workers 'vlm_jax/launch/tpu_worker.sh stop' ;;
  delete) queued delete --force ;;
  *) fail "usage: launch/tpu_vm.sh run FLAGS... | logs | stop | delete" ;;
esac
