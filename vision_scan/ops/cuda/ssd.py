"""`ssd` and `ssd_2d` on the kernels of csrc/cuda/ssd.h and ssd_backward.h."""

import torch
from torch import Tensor

from ..layout import plain, through_gate, wanted
from .layout import DTYPES, bounds_of, common_dtype, lists_of, marks_of

MOST_STATES = 256  # kMostSsdStates in csrc/cuda/ssd.h


def _serves(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others) -> bool:
    """Any headdim and up to 256 states, where a block may have the shared memory: all of it on an H100."""
    return _fits(x, B, False)


def _serves_backward(grads, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others) -> bool:
    return _fits(x, B, True)


def _fits(x: Tensor, B: Tensor, backward: bool) -> bool:
    if x.dtype not in DTYPES or x.numel() == 0 or B.shape[-1] > MOST_STATES:
        return False
    if x.device.type == "cpu":
        return True
    size = common_dtype(x, B).itemsize
    needed = torch.ops.vision_scan_cuda.ssd_shared_bytes(size, x.shape[-1], B.shape[-1], backward)
    return needed <= torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin


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
        plain(initial_state), None, marks_of(seq_idx, cu_seqlens), bounds_of(cu_seqlens),
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


def _scan_backward(grads, *args) -> list[Tensor]:
    *inputs, needs = args
    (
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens, _,
    ) = inputs  # fmt: skip
    # Behind a gate neither y nor its gradient has the digits of x: all is float32 then.
    tokens = (x, dt, B, C) if z is None else (t.float() for t in (x, dt, B, C))
    x, dt, B, C = tokens
    arguments = _arguments(
        x, dt, A, B, C, D, None, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens
    )
    dy, dz, dtype = grads[0], None, arguments[0].dtype
    if z is not None:
        ungated, _ = torch.ops.vision_scan_cuda.ssd(*arguments)
        dy, dz = through_gate(dy.float(), ungated[:, 0], z)
    dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial = torch.ops.vision_scan_cuda.ssd_backward(
        dy.to(dtype).contiguous()[:, None], plain(grads[1]), *arguments[:6], *arguments[7:]
    )
    found = {0: dx, 1: ddt, 2: dA, 3: dB, 4: dC, 5: dD, 6: dz, 7: ddt_bias, 11: dinitial}
    return wanted(inputs, found, needs)


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


def _scan_2d_backward(grads, *args) -> list[Tensor]:
    *inputs, needs = args
    x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, index, merge, _ = inputs
    arguments = _arguments_2d(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, index)
    dy, K = grads[0], index.shape[0]
    if merge != "concat":
        dy = (dy / K if merge == "mean" else dy)[:, None].expand(-1, K, *dy.shape[1:])
    dx, ddt, dA, dB, dC, dD, ddt_bias, _ = torch.ops.vision_scan_cuda.ssd_backward(
        dy.to(arguments[0].dtype).contiguous().flatten(2, 3), None, *arguments[:6], *arguments[7:]
    )
    dx = dx if x.dim() == 6 else dx.sum(1, dtype=torch.float32)
    return wanted(inputs, {0: dx, 1: ddt, 2: dA, 3: dB, 4: dC, 5: dD, 6: ddt_bias}, needs)


KERNELS = {
    "ssd": (_scan, _serves),
    "ssd_backward": (_scan_backward, _serves_backward),
    "ssd_2d": (_scan_2d, _serves),
    "ssd_2d_backward": (_scan_2d_backward, _serves_backward),
}
