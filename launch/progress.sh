#!/usr/bin/env bash
# Prints the newest step that is saved in the workdir named in a command: launch/progress.sh COMMAND... --workdir=DIR
# Prints 0 when nothing is saved there, and when the command names no workdir.
set -uo pipefail
workdir=
while (($#)); do
  case $1 in
    --workdir=*) workdir=${1#--workdir=} ;;
    --workdir) workdir=${2:-} ;;
  esac
  shift
done
newest=0
if [[ -n $workdir ]]; then
  for directory in "${workdir/#\~/$HOME}"/checkpoints/*/; do
    step=$(basename "$directory")
    # saves that were killed midway have names that are no numbers
    if [[ $step =~ ^[0-9]+$ ]] && ((10#$step > newest)); then newest=$((10#$step)); fi
  done
fi
echo "$newest"
