#!/usr/bin/env bash
# Repeats a training command until it is done. Start it once on every host:
#
#   launch/until_done.sh python main.py --config=configs/imagenet.py:b16 --workdir=gs://bucket/b16
#
# A preempted run ends with exit code 75. The command is then repeated, any number of times. After
# exit code 0 (done) or 2 (a mistake of the user), the command is not repeated. After any other exit
# code, e.g. because a host was lost, the command is repeated at most TRIES times (default 20). PAUSE
# is the wait between two tries, in seconds (default 30).
set -u
if [ $# -eq 0 ]; then
  echo 'usage: launch/until_done.sh <command> [argument ...]' >&2
  exit 2
fi

stopped='' # whether a signal asked this script to stop
passed=''  # ID of the process that got the signal from this script

stop() {
  stopped=1
  passed=${!:-}
  if [ -n "$passed" ]; then kill -TERM "$passed" 2>/dev/null; fi
}

# Runs a command and sets `code`. A signal to this script ends `wait`, but not the command.
run() {
  "$@" &
  if [ -n "$stopped" ] && [ "$passed" != "$!" ]; then stop; fi # the signal came before the start
  while kill -0 "$!" 2>/dev/null; do wait "$!"; done
  wait "$!"
  code=$?
}

left=${TRIES:-20}
trap stop TERM INT
while :; do
  run "$@"
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || [ -n "$stopped" ]; then exit "$code"; fi
  if [ "$code" -ne 75 ]; then left=$((left - 1)); fi
  last=$code
  if [ "$left" -lt 0 ]; then
    echo "until_done: exit code $last; no try is left." >&2
    exit "$last"
  fi
  echo "until_done: exit code $last; repeating the command in ${PAUSE:-30} s." >&2
  run sleep "${PAUSE:-30}"
  if [ -n "$stopped" ]; then exit "$last"; fi
done
