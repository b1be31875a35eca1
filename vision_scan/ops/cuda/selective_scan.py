"""`selective_scan` and `selective_scan_2d` on the kernels of csrc/cuda/selective.h."""

import torch
from torch import Tensor

from ..layout import plain, through_gate, wanted
from .layout import DTYPES, common_dtype, marks_of, small_index

MOST_STATES = 64  # kMostStates in csrc/cuda/selective.h


def _serves(u: Tensor, dt: Tensor, A: Tensor, *others) -> bool:
    return u.dtype in DTYPES and u.numel() > 0 and A.shape[-1] <= MOST_STATES


def _serves_backward(grads, *args) -> bool:
    return _serves(*args)


def _arguments(u, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens) -> tuple:
    """Sequences as grids of one list, channels last."""
    dtype = common_dtype(u, dt, B, C)
    u, dt = (t.transpose(1, 2).to(dtype).contiguous()[:, None] for t in (u, dt))
    B, C = (t[:, None] if t.dim() == 3 else t for t in (B, C))  # one group
    B, C = (t.movedim(3, 1).to(dtype).contiguous()[:, None] for t in (B, C))
    A, D, dt_bias = (None if t is None else plain(t)[None] for t in (A, D, dt_bias))
    return (
        u, dt, A, B, C, D, dt_bias, dt_softplus, False, 1.0,
        plain(initial_state), None, marks_of(seq_idx), small_index(cu_seqlens),
    )  # fmt: skip


def _scan(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens
) -> tuple[Tensor, Tensor]:
    y, state = torch.ops.vision_scan_cuda.selective(
        *_arguments(u, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens)
    )
    y = y[:, 0].transpose(1, 2)
    if z is not None:
        y = y * torch.nn.functional.silu(z.float())
    return y.to(u.dtype).contiguous(), state


def _arguments_2d(u, dt, A, B, C, D, dt_bias, dt_softplus, index, merge) -> tuple:
    dtype = common_dtype(u, dt, B, C)
    u, dt, B, C = (
        t.to(dtype).contiguous().flatten(first, first + 1)
        for t, first in ((u, u.dim() - 3), (dt, 2), (B, 2), (C, 2))
    )
    scale = 1 / index.shape[0] if merge == "mean" else 1.0
    return (
        u, dt, plain(A), B, C, plain(D), plain(dt_bias), dt_softplus, merge != "concat", scale,
        None, small_index(index), None, None,
    )  # fmt: skip


def _scan_2d(u, dt, A, B, C, D, dt_bias, dt_softplus, index, merge) -> Tensor:
    y, _ = torch.ops.vision_scan_cuda.selective(
        *_arguments_2d(u, dt, A, B, C, D, dt_bias, dt_softplus, index, merge)
    )
    return y.unflatten(-2, u.shape[-3:-1]).to(u.dtype)


KERNELS = {
    "selective_scan": (_scan, _serves),
    "selective_scan_2d": (_scan_2d, _serves),
}
