#!/usr/bin/env bash
# Builds, tests and times the CUDA kernels and the models on this machine's GPU: bash benchmarks/gpu.sh [PART ...]
#
# For a machine without a network: nothing is installed. It takes a Python with torch >= 2.11, numpy, pillow, safetensors,
# tokenizers, pytest, hypothesis, setuptools and ninja, and nvcc. PYTHON names another one than python3. Options and
# parts are those of `python -m eval gpu --help`; docs/kernels.md says what they do.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m eval gpu "$@"
