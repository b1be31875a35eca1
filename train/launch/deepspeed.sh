#!/usr/bin/env bash
# Training on the hosts of a hostfile, by DeepSpeed's launcher over ssh. To be started on one of them:
#
#   HOSTFILE=hostfile bash train/launch/deepspeed.sh --recipe cobra-3b --output /shared/runs/cobra --set ...
#   DRY_RUN=1 bash train/launch/deepspeed.sh --recipe ...  only prints the plan and the command
#
# HOSTFILE: a line `name slots=GPUS` for each host (see hostfile.example); default: this machine alone
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}

if [ -n "${HOSTFILE:-}" ]; then
  ranks=$(awk '!/^[[:space:]]*(#|$)/ { sub(/.*slots=/, ""); total += $1 } END { print total + 0 }' "$HOSTFILE")
  where=(--hostfile "$HOSTFILE")
else
  ranks=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
  where=(--num_gpus "$ranks")
fi
"$PYTHON" -m train plan --resume --ranks "$ranks" "$@"

command=("$(dirname "$PYTHON")/deepspeed" "${where[@]}" --module train --resume "$@")
echo "${command[@]}"
if [ -n "${DRY_RUN:-}" ]; then exit 0; fi
exec "${command[@]}"
