"""`selective_scan` and `selective_scan_2d` on the kernels of csrc/cuda/selective.h."""

import torch
from torch import Tensor

from ..layout import plain, through_gate, wanted
from .layout import DTYPES, bounds_of, common_dtype, lists_of, marks_of

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
        plain(initial_state), None, marks_of(seq_idx, cu_seqlens), bounds_of(cu_seqlens), seq_idx is None,
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


def _scan_backward(grads, *args) -> list[Tensor]:
    *inputs, needs = args
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens = inputs
    arguments = _arguments(u, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens)
    dy, dz = grads[0], None
    if z is not None:
        ungated, _ = torch.ops.vision_scan_cuda.selective(*arguments)
        dy, dz = through_gate(dy.float(), ungated[:, 0].transpose(1, 2).float(), z)
    dtype = arguments[0].dtype if z is None else torch.float32  # behind the gate it has more digits
    dy = dy.transpose(1, 2).to(dtype).contiguous()[:, None]
    du, ddt, dA, dB, dC, dD, ddt_bias, dinitial = torch.ops.vision_scan_cuda.selective_backward(
        dy, plain(grads[1]), *arguments
    )
    du, ddt = (t[:, 0].transpose(1, 2) for t in (du, ddt))
    dB, dC = (t[:, 0].movedim(1, 3) for t in (dB, dC))
    dA, dD, ddt_bias = (t.sum(0) for t in (dA, dD, ddt_bias))
    found = {0: du, 1: ddt, 2: dA, 3: dB, 4: dC, 5: dD, 6: dz, 7: ddt_bias, 9: dinitial}
    return wanted(inputs, found, needs)


def _arguments_2d(u, dt, A, B, C, D, dt_bias, dt_softplus, index, merge) -> tuple:
    dtype, cells = common_dtype(u, dt, B, C), u.shape[-3] * u.shape[-2]
    lists, whole = lists_of(index)
    u, dt, B, C = (
        t.to(dtype).contiguous().flatten(first, first + 1)
        for t, first in ((u, u.dim() - 3), (dt, 2), (B, 2), (C, 2))
    )
    scale = 1 / index.shape[0] if merge == "mean" else 1.0
    return (
        u, dt, plain(A), B, C, plain(D), plain(dt_bias), dt_softplus, merge != "concat", scale,
        None, lists, None, None, whole and lists.shape[1] == cells,
    )  # fmt: skip


def _scan_2d(u, dt, A, B, C, D, dt_bias, dt_softplus, index, merge) -> Tensor:
    y, _ = torch.ops.vision_scan_cuda.selective(
        *_arguments_2d(u, dt, A, B, C, D, dt_bias, dt_softplus, index, merge)
    )
    return y.unflatten(-2, u.shape[-3:-1]).to(u.dtype)


def _scan_2d_backward(grads, *args) -> list[Tensor]:
    *inputs, needs = args
    arguments = _arguments_2d(*inputs)
    u, A = arguments[0], inputs[2]
    dy = grads[0].to(u.dtype).contiguous().flatten(-3, -2)
    du, ddt, dA, dB, dC, dD, ddt_bias, _ = torch.ops.vision_scan_cuda.selective_backward(dy, None, *arguments)
    dA, dD, ddt_bias = (t.unflatten(0, (-1, A.shape[0])).sum(0) for t in (dA, dD, ddt_bias))
    return wanted(inputs, {0: du, 1: ddt, 2: dA, 3: dB, 4: dC, 5: dD, 6: ddt_bias}, needs)


KERNELS = {
    "selective_scan": (_scan, _serves),
    "selective_scan_backward": (_scan_backward, _serves_backward),
    "selective_scan_2d": (_scan_2d, _serves),
    "selective_scan_2d_backward": (_scan_2d_backward, _serves_backward),
}
