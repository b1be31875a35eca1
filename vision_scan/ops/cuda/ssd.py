"""`ssd` and `ssd_2d` on the kernels of csrc/cuda/ssd.h."""

import torch
from torch import Tensor

from ..layout import plain
from .layout import DTYPES, bounds_of, common_dtype, lists_of, marks_of

MOST_STATES = 256  # kMostSsdStates in csrc/cuda/ssd.h


def _serves(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others) -> bool:
    """Any headdim and up to 256 states; float32 with more than 128 of them only where blocks may have the
    shared memory, 177 KB: on GPUs like the H100."""
    if x.dtype not in DTYPES or x.numel() == 0 or B.shape[-1] > MOST_STATES:
        return False
    return x.device.type == "cpu" or _fits(x, B)


def _fits(x: Tensor, B: Tensor) -> bool:
    number = common_dtype(x, B).itemsize
    if number == 2:
        return True
    most = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    return torch.ops.vision_scan_cuda.ssd_shared_bytes(number, x.shape[-1], B.shape[-1]) <= most


def _cells(t: Tensor, dtype: torch.dtype, leading: int) -> Tensor:
    """As it lies if its first `leading` axes have one stride and the others are contiguous, like a piece of
    what a projection gives; else contiguous."""
    cells = t.to(dtype).flatten(0, leading - 1)
    return (cells if cells[0].is_contiguous() else cells.contiguous()).unflatten(0, t.shape[:leading])


def _arguments(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens
) -> tuple:
    """Sequences as grids of one list."""
    dtype = common_dtype(x, B, C, *(() if z is None else (z,)))
    x, B, C = (_cells(t, dtype, 2)[:, None] for t in (x, B, C))
    z = None if z is None else _cells(z, dtype, 2)[:, None]
    dt = _cells(dt, dtype if dt.dtype == dtype else torch.float32, 2)[:, None]
    A, D, dt_bias = (None if t is None else plain(t)[None] for t in (A, D, dt_bias))
    return (
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max,
        plain(initial_state), None, marks_of(seq_idx), bounds_of(cu_seqlens),
    )  # fmt: skip


def _scan(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens, chunk_size
) -> tuple[Tensor, Tensor]:
    y, state = torch.ops.vision_scan_cuda.ssd(
        *_arguments(
            x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens
        )
    )
    return y[:, 0].to(x.dtype), state


def _arguments_2d(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, index) -> tuple:
    """Grids as rows of cells; an x that all lists share is not copied."""
    dtype = common_dtype(x, B, C)
    x = x if x.dim() == 6 else x[:, None]
    x, B, C = (_cells(t, dtype, 4).flatten(2, 3) for t in (x, B, C))
    dt = _cells(dt, dtype if dt.dtype == dtype else torch.float32, 4).flatten(2, 3)
    return (
        x, dt, plain(A), B, C, plain(D), None, plain(dt_bias), dt_softplus, dt_min, dt_max,
        None, lists_of(index)[0], None, None,
    )  # fmt: skip


def _scan_2d(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, index, merge, chunk_size) -> Tensor:
    y, _ = torch.ops.vision_scan_cuda.ssd(
        *_arguments_2d(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, index)
    )
    y = y.unflatten(2, x.shape[-4:-2])
    if merge != "concat":
        y = (y.mean if merge == "mean" else y.sum)(1, dtype=torch.float32)
    return y.to(x.dtype)


KERNELS = {
    "ssd": (_scan, _serves),
    "ssd_2d": (_scan_2d, _serves),
}
