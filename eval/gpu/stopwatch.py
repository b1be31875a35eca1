"""Times: CUDA events on a GPU, the clock on a CPU, where the tests walk through the same code.

Before each visit a GPU reads an array many times its caches, untimed. That evicts whatever the visit before
has left there, and meanwhile the CPU hands over the visit's kernels, so that what is measured is the GPU.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eval.efficiency import interleaved, spread

EVICT_BYTES = 1 << 30
ROUNDS, WARM_UP, BUDGET_S = 31, 3, 40.0


class Stopwatch:
    """Times work on a device.

    Attributes:
        device: where the work runs.
    """

    def __init__(self, device: str | torch.device, evict_bytes: int = EVICT_BYTES) -> None:
        self.device = torch.device(device)
        self._is_cuda = self.device.type == "cuda"
        self._evictor = torch.ones(evict_bytes // 4 if self._is_cuda else 0, device=self.device)

    def seconds(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that a call takes on the device, and its result."""
        if not self._is_cuda:
            start = time.perf_counter()
            result = work()
            return time.perf_counter() - start, result
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._evictor.sum()
        begin.record()
        result = work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, result

    def added_bytes(self, work: Callable[[], Any]) -> tuple[int | None, Any]:
        """Peak memory of a call above what was in use before, and its result; None on a CPU."""
        if not self._is_cuda:
            return None, work()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before, result


@dataclass
class Timing:
    """Seconds of the visits of one contestant, and why there are no more of them, or ""."""

    visits: list[float] = field(default_factory=list)
    failed: str = ""
    spent_s: float = 0.0

    @property
    def seconds(self) -> dict | None:
        return spread(self.visits) if self.visits else None


def race(
    stopwatch: Stopwatch,
    entrants: Mapping[str, Callable[[], Any]],
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
    budget_s: float = BUDGET_S,
) -> dict[str, Timing]:
    """Visits all contestants in turn, every second round backwards.

    One that fails is out, with the reason; one that has used up its budget of seconds keeps what it has.
    """
    timings = {name: Timing() for name in entrants}
    for name, work in entrants.items():
        for _ in range(warm_up):
            if not _is_out(timings[name], budget_s):
                _visit(stopwatch, work, timings[name])
        if timings[name].spent_s < budget_s:
            timings[name].visits.clear()
    for name in interleaved(list(entrants), rounds):
        if not _is_out(timings[name], budget_s):
            _visit(stopwatch, entrants[name], timings[name])
    return timings


def _is_out(timing: Timing, budget_s: float) -> bool:
    return bool(timing.failed) or timing.spent_s >= budget_s


def _visit(stopwatch: Stopwatch, work: Callable[[], Any], timing: Timing) -> None:
    start = time.perf_counter()
    try:
        seconds, _ = stopwatch.seconds(work)
        timing.visits.append(seconds)
    except Exception as error:  # a rival's failure is a result, and ours must not cost the others theirs
        timing.visits.clear()
        timing.failed = reason(error)
    timing.spent_s += time.perf_counter() - start


def reason(error: BaseException) -> str:
    """A failure in one line; what it held of the GPU's memory is given back."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        error.__traceback__ = None
        torch.cuda.empty_cache()
        return "out of memory"
    told = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {told[0]}"[:300]


def measure_ceilings(stopwatch: Stopwatch, copy_bytes: int = 1 << 32, gemm_size: int = 8192) -> dict:
    """What the device can do at most: copying memory, read and written bytes counted, and the product of two
    square bfloat16 matrices of random numbers. Medians.

    Returns:
        copy_bytes_per_s, matrix_flops_per_s, copy_bytes, gemm_size.
    """
    source = torch.ones(copy_bytes // 4, device=stopwatch.device)
    copying = race(stopwatch, {"copy": partial(torch.empty_like(source).copy_, source)})["copy"].seconds
    del source
    a, b = (torch.randn(gemm_size, gemm_size, device=stopwatch.device).bfloat16() for _ in range(2))
    product = race(stopwatch, {"product": partial(torch.mm, a, b)})["product"].seconds
    assert copying and product
    return {
        "copy_bytes_per_s": 2 * copy_bytes / copying["median"],
        "matrix_flops_per_s": 2 * gemm_size**3 / product["median"],
        "copy_bytes": copy_bytes,
        "gemm_size": gemm_size,
    }


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of tensors together."""
    return sum(t.nbytes for t in tensors if t is not None)
