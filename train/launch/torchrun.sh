#!/usr/bin/env bash
# Training on one node or several without a scheduler, by torchrun. To be started on every node, with its number:
#
#   NODES=2 NODE=0 MASTER_ADDR=10.0.0.1 bash train/launch/torchrun.sh --recipe cobra-3b --output /shared/runs/cobra --set ...
#   DRY_RUN=1 bash train/launch/torchrun.sh --recipe ...   only prints the plan and the command
#
# NODES, NODE: how many nodes, and which this is (default: 1, 0)      PROCESSES: on each node (default: its GPUs)
# MASTER_ADDR, MASTER_PORT: of node 0 (default: 127.0.0.1, 29500)
# NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME: the network interface, where a node has several
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}

nodes=${NODES:-1}
processes=${PROCESSES:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
"$PYTHON" -m train plan --resume --ranks "$((nodes * processes))" "$@"

command=("$PYTHON" -m torch.distributed.run --nnodes "$nodes" --node-rank "${NODE:-0}" --nproc-per-node "$processes"
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" -m train --resume "$@")
echo "${command[@]}"
if [ -n "${DRY_RUN:-}" ]; then exit 0; fi
exec "${command[@]}"
