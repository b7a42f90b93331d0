#!/usr/bin/env bash
# Trains on a spot TPU slice. After a preemption, it asks for a new slice, until the run is done:
#
#   NAME=b16 ZONE=europe-west4-b TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite launch/tpu.sh \
#     --config=configs/imagenet.py:b16 --workdir=gs://bucket/b16 --config.data.dir=gs://bucket/tfds
#
# Run it on your own machine, inside the checkout; it needs gcloud. NAME becomes the name of the
# queued resource and of its TPU VM. The script copies the last commit to the slice (`git archive`).
# The disks of a preempted slice are lost, so the workdir must be in a bucket. The script deletes the
# slice when the run is done or cannot continue, or when installing the packages has failed TRIES
# times in a row (default 20). If you stop the script with Ctrl-C, delete the slice yourself.
set -u
: "${NAME:?a name for the slice}" "${ZONE:?a zone, e.g. europe-west4-b}"
: "${TYPE:?an accelerator type, e.g. v5litepod-16}"
: "${RUNTIME:?the TPU software version for this type, e.g. v2-alpha-tpuv5-lite}"
PAUSE=${PAUSE:-30}
case " $* " in
  *' --workdir=gs://'*) ;;
  *)
    echo 'tpu: expected --workdir=gs://<bucket>/<folder>, because the disks of a slice are lost.' >&2
    exit 2
    ;;
esac

queue() { gcloud compute tpus queued-resources "$@" --zone="$ZONE"; }
on() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"; }
delete() { queue delete "$NAME" --force --quiet; }

# Copies the commit and installs the packages. The project needs at least Python 3.11. If the TPU
# software has an older Python, uv downloads Python 3.12. A virtual environment that already has pip
# is kept, because an earlier run may still use it.
install_project() {
  archive=$(mktemp -d)/vit_jax.tar.gz
  git archive --format=tar.gz --output="$archive" HEAD &&
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:vit_jax.tar.gz" --zone="$ZONE" --worker=all &&
    on all 'mkdir -p vit_jax && tar -xzf vit_jax.tar.gz -C vit_jax && cd vit_jax &&
      if [ ! -x .venv/bin/pip ]; then
        if python3 -c "import sys; sys.exit(sys.version_info < (3, 11))"; then
          python3 -m venv .venv
        else
          python3 -m pip install -q --user uv &&
            python3 -m uv venv -q --clear --seed --python 3.12 .venv
        fi
      fi &&
      .venv/bin/pip install -q -r requirements.txt -r requirements-gcs.txt "jax[tpu]"'
}

# Starts the run on all workers. Prints its exit code on worker 0, or nothing if the slice or the
# connection was lost. Each worker writes the code to a file, because gcloud does not return the exit
# codes of all workers. If the connection was lost before, an earlier run may still be running, and is
# stopped first. The shell of the earlier run no longer finds its process ID in the file `pid`, and so
# does not write an exit code.
train() {
  on all "cd vit_jax || exit; old=\$(cat pid 2> /dev/null); rm -f pid exit_code
    if [ -n \"\$old\" ] && kill \"\$old\" 2> /dev/null; then
      while kill -0 \"\$old\" 2> /dev/null; do sleep 1; done
    fi
    launch/until_done.sh .venv/bin/python main.py$(printf ' %q' "$@") & mine=\$!
    echo \"\$mine\" > pid; wait \"\$mine\"; code=\$?
    if [ \"\$(cat pid)\" = \"\$mine\" ]; then echo \"\$code\" > exit_code; fi" >&2
  on 0 'cat vit_jax/exit_code'
}

# Prints the state of the slice, or MISSING if it does not exist; nothing if gcloud has no answer.
errors=$(mktemp)
state_of_slice() {
  if queue describe "$NAME" --format='value(state.state)' 2> "$errors"; then return; fi
  if grep -q NOT_FOUND "$errors"; then echo MISSING; else cat "$errors" >&2; fi
}

known='' # last state that gcloud reported
failed=0 # installations in this slice that have failed in a row
while :; do
  state=$(state_of_slice)
  echo "tpu: $NAME is ${state:-unknown}." >&2
  if [ -z "$state" ] && [ -z "$known" ]; then exit 1; fi # e.g. no login, no project
  known=${state:-$known}
  case $state in
    ACTIVE)
      code=''
      if install_project; then
        failed=0
        code=$(train "$@")
      else
        failed=$((failed + 1))
        echo "tpu: the installation failed (try $failed of ${TRIES:-20})." >&2
        if [ "$failed" -ge "${TRIES:-20}" ]; then code=1; fi
      fi
      if [ -n "$code" ]; then
        delete
        exit "$code"
      fi
      ;;
    FAILED | SUSPENDED) delete ;;
    MISSING)
      failed=0
      queue create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
        --runtime-version="$RUNTIME" --spot || exit
      ;;
  esac
  sleep "$PAUSE"
done
