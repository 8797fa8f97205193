#!/usr/bin/env bash
# What launch/tpu_vm.sh does on every worker of a TPU, in the copy of the checkout there:
#
#   install TREE [COMMAND]   a Python environment for this checkout, whose git tree is TREE; then COMMAND
#   run FLAGS...             vlm_jax.main FLAGS, after ending what an earlier connection left; its exit code
#   stop                     makes a run save and end
#
# Files: ~/.vlm_jax with env/ (the environment), log (all output of all runs), pid, installed (TREE).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=launch/signals.sh
source launch/signals.sh
state=$HOME/.vlm_jax
python=$state/env/bin/python
mkdir -p "$state"

install() {
  # the images bring Python 3.10; uv brings its own
  python3 -m pip install --quiet --user uv || return
  local uv
  uv=$(python3 -m site --user-base)/bin/uv
  "$uv" venv --quiet --allow-existing --python 3.12 "$state/env" || return
  "$uv" pip install --quiet --python "$python" -r requirements.txt -e '.[tpu]' || return
  # JAX asks for it: without it the TPU runtime starts and ends far slower
  echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null
  if [[ -n ${2:-} ]]; then bash -c "$2" || return; fi
  echo "$1" >"$state/installed"
}

is_running() { # the number alone could be another process's by now
  grep -qs vlm_jax.main "/proc/$1/cmdline"
}

stop() {
  local pid seconds=${STOP_SECONDS:-300}
  pid=$(cat "$state/pid" 2>/dev/null)
  if [[ -z $pid ]] || ! is_running "$pid"; then return 0; fi
  echo "tpu_worker: process $pid is asked to save and end" >&2
  kill -TERM "$pid"
  while is_running "$pid" && ((seconds-- > 0)); do sleep 1; done
  if is_running "$pid"; then kill -KILL "$pid"; fi
}

run() {
  stop
  # With this tee a connection that breaks does not break the run, which goes on until the next `run` or `stop`.
  begin "$python" -m vlm_jax.main --distributed=on "$@" \
    </dev/null > >(tee --append --output-error=warn-nopipe "$state/log") 2>&1
  echo "${children[0]}" >"$state/pid"
  await "${children[0]}"
  rm -f "$state/pid"
  return "$status"
}

case ${1:-} in
  install | run | stop) "$@" ;;
  *) echo "usage: launch/tpu_worker.sh install TREE [COMMAND] | run FLAGS... | stop" >&2 && exit 2 ;;
esac
