"""What the machine can do at most, measured in the same run: reading memory and multiplying matrices."""

import time
from collections.abc import Callable

import torch

READ_BYTES = 1 << 30
GEMM_SIZE = 2048
SECONDS = 3.0  # of each measurement, at least two repeats
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure_machine(read_bytes: int = READ_BYTES, gemm_size: int = GEMM_SIZE) -> dict:
    """Peaks with torch's current number of threads.

    Args:
        read_bytes: of the array that is read, many times the caches.
        gemm_size: n of the n x n matrices, a multiple of 4.
    Returns:
        read_bytes_per_s: see `measure_read`.
        gemm_flops_per_s: dtype -> the fastest product of square matrices.
        read_bytes, gemm_size: as given.
    """
    flops = {name: _gemm_flops(dtype, gemm_size) for name, dtype in DTYPES.items()}
    return {
        "read_bytes_per_s": measure_read(read_bytes),
        "gemm_flops_per_s": flops,
        "read_bytes": read_bytes // 4096 * 4096,
        "gemm_size": gemm_size,
    }


def measure_read(read_bytes: int = READ_BYTES, device: str | torch.device = "cpu") -> float:
    """Bytes a second: the fastest of a matrix-vector product, a maximum and a sum over an array."""
    rows, vector = torch.ones(read_bytes // 4096, 1024, device=device), torch.ones(1024, device=device)
    # item() waits for a GPU.
    reads = (lambda: rows.mv(vector)[0].item(), lambda: rows.max().item(), lambda: rows.sum().item())
    return rows.nbytes / min(_fastest(read) for read in reads)


def gemm_peak(machine: dict, form: str) -> float:
    """Floating point operations a second that a roofline grants: of that dtype, or of float32 where that is
    faster, since narrower weights can always be widened first."""
    flops = machine["gemm_flops_per_s"]
    return max(flops["float32"], flops.get(form, 0.0))


def _gemm_flops(dtype: torch.dtype, size: int) -> float:
    """Operations a second of the product of two square matrices; of smaller ones where this size takes too
    long, as in a dtype that the processor has no instructions for."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    quarter = a[: size // 4, : size // 4].contiguous()
    seconds = _fastest(lambda: quarter @ quarter)
    flops = 2 * (size // 4) ** 3 / seconds
    return flops if 64 * seconds > SECONDS else 2 * size**3 / _fastest(lambda: a @ b)


def _fastest(work: Callable[[], object]) -> float:
    times = []
    work()
    stop = time.perf_counter() + SECONDS
    while len(times) < 2 or (time.perf_counter() < stop and len(times) < 100):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
