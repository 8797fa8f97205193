#!/usr/bin/env bash
# Prints the JobSet of a run on GKE, to be piped into kubectl:
#
#   NAME=clip-l14 IMAGE=REGISTRY/vlm_jax:1 TPU=v5e:16x16 SLICES=2 CLAIM=shared \
#     launch/gke/render.sh --config=configs/clip_l14.py --workdir=/shared/clip_l14 | kubectl apply -f -
#
# Environment: NAME of the run; IMAGE, made from launch/Dockerfile; TPU, chip and topology as `python -m vlm_jax.plan`
# takes them; CLAIM, a ReadWriteMany volume claim that is mounted on /shared; and optionally
#   SLICES         number of slices (1)
#   SPOT           1: nodes of preemptible capacity
#   CHIPS          chips of one host (4; up to 8 where the whole slice is one host)
#   MAX_RESTARTS   failures until the run is given up; preemptions don't count (10)
#   GRACE_SECONDS  from SIGTERM to SIGKILL (300)
set -euo pipefail

fail() {
  echo "render: $*" >&2
  exit 2
}

for name in NAME IMAGE TPU CLAIM; do
  if [[ -z ${!name:-} ]]; then fail "set $name; the head of launch/gke/render.sh says what it is"; fi
done
# what the 63 characters of a pod's name leave
# shellcheck disable=SC2153 # not a misspelling of `name`
if [[ ! $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]]; then
  fail "NAME=$NAME must be at most 40 lower-case letters, digits and -, from a letter on"
fi
if [[ ! $TPU =~ ^([a-z0-9]+):([1-9][0-9]*)x([1-9][0-9]*)(x([1-9][0-9]*))?$ ]]; then
  fail "TPU=$TPU must be a chip and a topology, such as v5e:16x16 or v5p:4x4x4"
fi
export TOPOLOGY=${TPU#*:}
total=$((BASH_REMATCH[2] * BASH_REMATCH[3] * ${BASH_REMATCH[5]:-1}))
export ACCELERATOR
dimensions=3
case ${BASH_REMATCH[1]} in
  v4) ACCELERATOR=tpu-v4-podslice ;;
  v5e) ACCELERATOR=tpu-v5-lite-podslice dimensions=2 ;;
  v5p) ACCELERATOR=tpu-v5p-slice ;;
  v6e) ACCELERATOR=tpu-v6e-slice dimensions=2 ;;
  tpu7x) ACCELERATOR=tpu7x ;;
  *) fail "TPU=$TPU: the chip must be one of v4, v5e, v5p, v6e, tpu7x" ;;
esac
if ((dimensions != (${#BASH_REMATCH[4]} ? 3 : 2))); then
  fail "TPU=$TPU: topologies of this chip have $dimensions dimensions"
fi
if [[ -z ${CHIPS:-} ]]; then CHIPS=$((dimensions == 2 && total <= 8 ? total : 4)); fi
SPOT=${SPOT:-} SLICES=${SLICES:-1} MAX_RESTARTS=${MAX_RESTARTS:-10} GRACE_SECONDS=${GRACE_SECONDS:-300}
for name in SLICES CHIPS MAX_RESTARTS GRACE_SECONDS; do
  if [[ ! ${!name} =~ ^(0|[1-9][0-9]*)$ ]]; then fail "$name=${!name} must be a whole number"; fi
done
if ((CHIPS < 1 || total % CHIPS)); then fail "$total chips of $TPU are no whole number of hosts of CHIPS=$CHIPS"; fi
HOSTS=$((total / CHIPS))
if ((SLICES < 1 || (SLICES > 1 && HOSTS == 1))); then
  fail "SLICES=$SLICES: give 1, or slices of several hosts each, since GKE joins no slices of one host"
fi

if [[ " $*" != *" --workdir=/shared/"* ]]; then
  fail "give --workdir=/shared/...; what lies elsewhere is gone with its pod"
fi
FLAGS= # a list in YAML, whose double-quoted strings are those of JSON
for flag in "$@"; do
  if [[ $flag == *[[:cntrl:]]* ]]; then fail "a flag holds a control character: $flag"; fi
  flag=${flag//\\/\\\\}
  FLAGS+="${FLAGS:+, }\"${flag//\"/\\\"}\""
done
FLAGS="[$FLAGS]"

# Without this bash 5.2 would take & in a value for what it replaces.
shopt -u patsub_replacement 2>/dev/null || true
while IFS= read -r line; do
  case $line in
    *' # if SLICES > 1') if ((SLICES == 1)); then continue; fi ;;
    *' # if SPOT') if [[ -z ${SPOT#0} ]]; then continue; fi ;;
  esac
  line=${line% # if *}
  if [[ $line =~ ^([^#]*)\$\{([A-Z_]+)\}(.*)$ ]]; then
    line=${BASH_REMATCH[1]}${!BASH_REMATCH[2]}${BASH_REMATCH[3]}
  fi
  printf '%s\n' "$line"
done <"$(dirname "$0")/jobset.yaml"
