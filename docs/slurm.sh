#!/usr/bin/env bash
# A run on several GPUs of a SLURM cluster that goes on by itself when its time is up: `sbatch docs/slurm.sh`.
#SBATCH --job-name=vitnas
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
set -u
FOLDER=${FOLDER:-runs/slurm}
WORDS=${WORDS:-run tour}

# The scheduler tells this script two minutes before the end (--signal above), and the script tells the tasks: each takes
# leave with status 143, with a checkpoint. Then the same job is put into the queue again, and goes on from there.
# shellcheck disable=SC2086
srun --kill-on-bad-exit=1 vitnas $WORDS folder="$FOLDER" "$@" &
tasks=$!
asked=no
trap 'asked=yes; kill -TERM "$tasks" 2>/dev/null' TERM
wait "$tasks"
status=$?
if [ "$asked" = yes ]; then
  wait "$tasks"  # the first wait ended with the signal
  status=$?
fi
if [ "$asked" = yes ] && [ "$status" != 0 ]; then
  echo "time is up; job $SLURM_JOB_ID goes on later"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
