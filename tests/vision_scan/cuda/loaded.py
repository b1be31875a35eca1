"""Whether the CUDA kernels are there, on a GPU or emulated on the CPU (csrc/cuda/emulate.h)."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

EMULATED = bool(os.environ.get("VISION_SCAN_EMULATE"))

needs_kernels = pytest.mark.skipif(
    not EMULATED and not torch.cuda.is_available(), reason="neither a GPU nor emulated CUDA kernels"
)


def in_any_order_of_threads(compute: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What `compute` gives; the emulator also runs the threads of a block in reverse, which may change
    nothing: else a barrier is missing."""
    found = compute()
    if EMULATED:
        torch.ops.vision_scan_cuda.descending(True)
        try:
            again = compute()
        finally:
            torch.ops.vision_scan_cuda.descending(False)
        for i, (one, other) in enumerate(zip(found, again, strict=True)):
            assert torch.equal(one, other), f"result {i} depends on the order of the threads"
    return found
