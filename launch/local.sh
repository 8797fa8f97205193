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
# shellcheck source=launch/signals.sh
source launch/signals.sh
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
for ((index = 0; index < count; index++)); do
  begin python -m vlm_jax.main "$@" "--distributed=127.0.0.1:$port,$count,$index"
done
code=0
for pid in "${children[@]}"; do
  await "$pid"
  if [[ $code -eq 0 ]]; then code=$status; fi
done
exit "$code"
