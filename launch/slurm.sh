#!/bin/bash
#SBATCH --job-name=vit_jax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# Trains in Slurm, one process for each GPU, and asks for the same job again after a preemption:
#
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --time=12:00:00 launch/slurm.sh \
#     --config=configs/imagenet.py:b16 --workdir=/shared/b16
#
# Slurm sends SIGTERM 120 s before the time limit. The run then saves a checkpoint and ends with exit
# code 75. The workdir must be on a disk that all nodes share, or in a bucket.
set -u
srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" main.py "$@"
code=$?
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
