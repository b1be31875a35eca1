#!/usr/bin/env bash
# A training job of Slurm: one task for each GPU, stopped and queued again before its time is up.
#
#   sbatch --nodes 8 train/launch/slurm.sh --recipe cobra-3b --output /shared/runs/cobra --set data.path=...
#   DRY_RUN=1 bash train/launch/slurm.sh --recipe ...      only prints the plan and the command
#
#SBATCH --job-name=cobra
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
PYTHON=${PYTHON:-.venv/bin/python}

nodes=${SLURM_JOB_NUM_NODES:-1}
ranks=${SLURM_NTASKS:-8}
# A mistake in the settings is found here, by one process, before the nodes begin.
"$PYTHON" -m train plan --resume --ranks "$ranks" "$@"

# Compiled kernels are cached on the node itself: a shared folder would have all ranks wait for each other.
export TRITON_CACHE_DIR=${TMPDIR:-/tmp}/cobra-triton-$USER TORCHINDUCTOR_CACHE_DIR=${TMPDIR:-/tmp}/cobra-inductor-$USER
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# The processes read rank, host and port from Slurm. --resume begins anew where there is nothing to resume.
command=(srun --nodes "$nodes" --ntasks "$ranks" --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 "$PYTHON" -m train --resume "$@")
echo "${command[@]}"
if [ -n "${DRY_RUN:-}" ]; then exit 0; fi

status=0
"${command[@]}" || status=$?
if [ "$status" -eq 75 ]; then # stopped by request, everything is saved
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
