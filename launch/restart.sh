#!/usr/bin/env bash
# Runs a command again until it is done: launch/restart.sh python -m vlm_jax.main --config=... --workdir=...
#
# By its exit code:
#   0       done: ends
#   2       bad config: ends, since another attempt would fail in the same way
#   75      stopped by a signal and saved: goes on at once
#   others  goes on after a pause that doubles; ends with that code after RESTART_LIMIT failures in a row without a
#           newer checkpoint
# A SIGTERM or SIGINT to this script is passed on to the command and ends the loop: with 75 if the run can go on.
#
# Environment:
#   RESTART_LIMIT        failures in a row without progress before it gives up (5)
#   RESTART_SECONDS      the first pause (10)
#   RESTART_MAX_SECONDS  the longest pause (600)
#   RESTART_PREEMPTED    `here`: after 75 it goes on at once; `elsewhere`: it ends with 75, for a scheduler that starts
#                        the job anew (here)
#   RESTART_STOP         passes a signal on, where a SIGTERM to the command would not do (kill)
#   RESTART_PROGRESS     prints the newest step that is saved, given the command (launch/progress.sh)
set -uo pipefail
# shellcheck source=launch/signals.sh
source "$(dirname "$0")/signals.sh"
if (($# == 0)); then
  echo "usage: launch/restart.sh COMMAND [ARGUMENT...]" >&2
  exit 2
fi
limit=${RESTART_LIMIT:-5}
pause=${RESTART_SECONDS:-10}
longest=${RESTART_MAX_SECONDS:-600}
read -ra measure <<<"${RESTART_PROGRESS:-$(dirname "$0")/progress.sh}"
for number in "$limit" "$pause" "$longest"; do
  if [[ ! $number =~ ^[0-9]+$ ]]; then
    echo "restart: RESTART_LIMIT, RESTART_SECONDS and RESTART_MAX_SECONDS must be whole numbers, not $number" >&2
    exit 2
  fi
done

stop=
on_stop() {
  if [[ -n $stop ]]; then bash -c "$stop"; else kill -TERM "${children[@]}" 2>/dev/null; fi
}

say() { echo "restart: $*" >&2; }

leave_if_stopped() { # ends the loop when it was asked to; codes of a signal mean that nothing but time was lost
  if [[ $signals -eq 0 ]]; then return; fi
  case $1 in
    0) exit 0 ;;
    75 | 130 | 143) say "stopped by a signal; the same command goes on" && exit 75 ;;
    *) say "stopped by a signal; the command ended with $1" && exit "$1" ;;
  esac
}

failures=0
progress=-1
next_pause=$pause
while true; do
  children=() stop=${RESTART_STOP:-}
  begin "$@"
  await "${children[0]}"
  code=$status stop=
  leave_if_stopped "$code"
  case $code in
    0) exit 0 ;;
    2) say "exit code 2: the config is wrong; mend it and start again" && exit 2 ;;
    75)
      if [[ ${RESTART_PREEMPTED:-here} == elsewhere ]]; then exit 75; fi
      say "exit code 75: stopped by a signal and saved; going on"
      continue
      ;;
  esac
  step=$("${measure[@]}" "$@" </dev/null)
  if [[ $step =~ ^[0-9]+$ ]] && ((step > progress)); then
    progress=$step failures=0 next_pause=$pause
  fi
  failures=$((failures + 1))
  if ((failures > limit)); then
    say "exit code $code: failed $failures times in a row without a newer checkpoint than step $progress; giving up"
    exit "$code"
  fi
  say "exit code $code: failure $failures of at most $limit without progress; again in $next_pause s"
  children=()
  begin sleep "$next_pause"
  await "${children[0]}"
  leave_if_stopped 75
  next_pause=$((next_pause * 2 < longest ? next_pause * 2 : longest))
done
