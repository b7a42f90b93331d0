#!/bin/bash
#SBATCH --job-name=vit_jax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# Trains in Slurm, one process for each GPU, and requeues the same job after a preemption:
#
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=12:00:00 \
#     launch/slurm.sh --config=configs/imagenet.py:b16 --workdir=/shared/b16
#
# Set --cpus-per-task to the cores of a node divided by its processes. Without it, each process gets
# only one core to decode images.
#
# Slurm sends SIGTERM 120 s before the time limit. The run then saves a checkpoint and ends with exit
# code 75, and the job is requeued, any number of times. The exit codes 0 (done) and 2 (a mistake of
# the user) end the job. After any other exit code, such as after the loss of a process, the job is
# requeued at most TRIES times (default 20). A file in the folder of the job counts these failures.
# If a process is lost, JAX ends the other processes. The workdir must be on a disk that all nodes
# share, or in a bucket.
set -u
# Since Slurm 22.05, srun ignores the --cpus-per-task that sbatch got.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" main.py "$@"
code=$?
failures="slurm-$SLURM_JOB_ID.failures"
case $code in
  0 | 2) ;;
  75) scontrol requeue "$SLURM_JOB_ID" ;;
  *)
    echo "exit code $code" >> "$failures"
    if [ "$(wc -l < "$failures")" -le "${TRIES:-20}" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    ;;
esac
exit "$code"
