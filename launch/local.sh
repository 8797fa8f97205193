#!/usr/bin/env bash
# Starts N processes of one job on this machine, as N hosts would be: launch/local.sh N --config=... --workdir=...
# SIGTERM or Ctrl-C reaches all of them: they save the same step and exit with 75. The exit code is the first that is
# not 0. For several virtual CPU devices a process set XLA_FLAGS=--xla_force_host_platform_device_count=K.
set -uo pipefail
if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N --config=FILE [flags of vlm_jax.main]" >&2
  exit 2
fi
count=$1
shift
cd "$(dirname "$0")/.." || exit 1
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
pids=()
for ((index = 0; index < count; index++)); do
  python -m vlm_jax.main "$@" "--distributed=127.0.0.1:$port,$count,$index" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
code=0
for pid in "${pids[@]}"; do
  wait "$pid"
  status=$?
  while kill -0 "$pid" 2>/dev/null; do # a trapped signal ends `wait` before the process has ended
    wait "$pid"
    status=$?
  done
  [[ $code -eq 0 ]] && code=$status
done
exit "$code"
