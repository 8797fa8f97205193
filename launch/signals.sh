#!/usr/bin/env bash
# Sourced by the launchers: a SIGTERM or SIGINT to the launcher reaches what it started, and an exit code is never
# lost to it. SIGINT too is passed on as SIGTERM, since bash starts background commands with SIGINT ignored.
children=() # process ids of what `begin` started
signals=0   # how many SIGTERM and SIGINT have come
status=0    # set by `await`

on_stop() { # what a signal does; a launcher whose processes are elsewhere defines another
  kill -TERM "${children[@]}" 2>/dev/null
}

trap 'signals=$((signals + 1)); on_stop' TERM INT

begin() { # starts a command in the background
  "$@" &
  children+=("$!")
  if [[ $signals -gt 0 ]]; then on_stop; fi # it came before there was anything to pass it on to
}

await() { # waits for the end of a process id; `status` is then its exit code
  local before
  while true; do
    before=$signals
    wait "$1"
    # shellcheck disable=SC2034 # for those who source this
    status=$?
    # a trapped signal ends `wait` with a code of its own, before the process has ended
    if [[ $signals -eq $before ]]; then return; fi
  done
}
