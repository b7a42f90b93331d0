#!/usr/bin/env bash
# Repeats a training command until it is done. Start it once on every host:
#
#   launch/until_done.sh python main.py --config=configs/imagenet.py:b16 --workdir=gs://bucket/b16
#
# A run that was preempted ends with exit code 75, and is repeated without a limit. Exit code 2 is a
# mistake in the command, which repeating does not mend. After any other end, such as that of a lost
# host, the command is repeated TRIES times (default 20). PAUSE is the wait between two tries.
set -u
left=${TRIES:-20}
stopped=''
if [ $# -eq 0 ]; then
  echo 'usage: launch/until_done.sh <command> [argument ...]' >&2
  exit 2
fi

while :; do
  "$@" &
  child=$!
  trap 'stopped=1; kill -TERM "$child"' TERM INT
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal to this script ended `wait`, not the child
    wait "$child"
    code=$?
  done
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || [ -n "$stopped" ]; then exit "$code"; fi
  if [ "$code" -ne 75 ]; then left=$((left - 1)); fi
  if [ "$left" -lt 0 ]; then
    echo "until_done: exit code $code; no try is left." >&2
    exit "$code"
  fi
  echo "until_done: exit code $code; repeating the command in ${PAUSE:-30} s." >&2
  sleep "${PAUSE:-30}"
done
