"""Hands operators on a GPU to the kernels of csrc/cuda, where these were built, behind them to those of other
packages (rivals.py).

`VISION_SCAN_EMULATE=FILE` runs the same kernels on the CPU, in place of csrc/cpu: FILE is the library that
`COBRA_CUDA=emulate python setup.py build_ext` makes (csrc/cuda/emulate.h). `VISION_SCAN_REFERENCE=1` leaves
everything to the reference.
"""

import os

import torch

from ..register import MISSING_KERNELS, take_over
from . import causal_conv1d, gated_rmsnorm, rivals, selective_scan, ssd, update

# Each with KERNELS: name -> (kernel, whether it serves a call).
FAMILIES = (causal_conv1d, gated_rmsnorm, selective_scan, ssd, update)


def take_over_all() -> None:
    """Registers the kernels, or says in `MISSING_KERNELS` why there are none."""
    if os.environ.get("VISION_SCAN_REFERENCE") == "1":
        MISSING_KERNELS["cuda"] = "VISION_SCAN_REFERENCE=1 asks for the reference"
        return
    device, missing = _load()
    if missing:
        MISSING_KERNELS["cuda"] = missing
    else:
        for family in FAMILIES:
            for name, (kernel, serves) in family.KERNELS.items():
                take_over(name, device, kernel, serves)
    rivals.take_over_all()


def _load() -> tuple[str, str]:
    """For which device the kernels are now there, and why there are none, or ""."""
    if emulated := os.environ.get("VISION_SCAN_EMULATE"):
        torch.ops.load_library(emulated)
        return "cpu", ""
    try:
        import vision_scan._cuda  # noqa: F401 (registers the library vision_scan_cuda)
    except ImportError:
        how = "with nvcc: COBRA_CUDA=1 pip install --no-build-isolation -e ."
        return "cuda", f"the CUDA kernels were not built; {how}"
    return "cuda", ""
