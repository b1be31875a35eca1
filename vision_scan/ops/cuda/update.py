"""`ssd_update`, `selective_scan_update` and `causal_conv1d_update` on the kernels of csrc/cuda/update.h."""

import torch
from torch import Tensor

from ..layout import plain
from .layout import DTYPES, common_dtype, marks_of

MOST_STATES = 256  # kMostStates in csrc/cuda/update.h
MOST_TAPS = 16  # kMostTaps
MOST_ROWS = 65535  # of a grid of blocks


def _serves(state: Tensor, x: Tensor, *others) -> bool:
    """The state is worked on where it lies."""
    return (
        state.dtype == torch.float32
        and state.is_contiguous()
        and state.shape[-1] <= MOST_STATES
        and x.dtype in DTYPES
        and 0 < x.shape[0] <= MOST_ROWS
        and state.numel() > 0
    )


def _serves_conv(state: Tensor, x: Tensor, weight: Tensor, *others) -> bool:
    return (
        state.dtype in DTYPES
        and torch.promote_types(state.dtype, x.dtype) == state.dtype
        and state.is_contiguous()
        and weight.shape[-1] <= MOST_TAPS
        and 0 < x.shape[0] <= MOST_ROWS
        and x.numel() > 0
    )


def _of_tokens(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous for each token, as a piece of a projection is."""
    if t is None:
        return None
    t = t.to(dtype)
    return t if t[0, 0].is_contiguous() else t.contiguous()


def _slots(state_indices: Tensor | None) -> Tensor | None:
    return None if state_indices is None else state_indices.to(torch.int32).contiguous()


def _ssd(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, seq_idx, state_indices) -> Tensor:
    dtype = common_dtype(x, dt, B, C, *(() if z is None else (z,)))
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    x_, dt, B, C, z = (_of_tokens(t, dtype) for t in (x, dt, B, C, z))
    torch.ops.vision_scan_cuda.ssd_update(
        state, None, x_, dt, plain(A), False, B, C, plain(D), z, plain(dt_bias), dt_softplus, dt_min, dt_max,
        marks_of(seq_idx), _slots(state_indices), y, False,
    )  # fmt: skip
    return y.to(x.dtype)


def _selective(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, state_indices) -> Tensor:
    dtype = common_dtype(u, dt, B, C, *(() if z is None else (z,)))
    y = torch.empty(u.shape, dtype=dtype, device=u.device)
    B, C = (t[:, None] if t.dim() == 3 else t for t in (B, C))  # one group
    u_, dt, B, C, z = (None if t is None else t.to(dtype).contiguous() for t in (u, dt, B, C, z))
    torch.ops.vision_scan_cuda.selective_update(
        state, u_, dt, plain(A), B, C, plain(D), z, plain(dt_bias), dt_softplus,
        marks_of(seq_idx), _slots(state_indices), y,
    )  # fmt: skip
    return y.to(u.dtype)


def _conv(state, x, weight, bias, activation, seq_idx, state_indices) -> Tensor:
    x_, weight, bias = (None if t is None else t.to(state.dtype) for t in (x, weight, bias))
    y = torch.empty(x.shape, dtype=state.dtype, device=x.device)
    torch.ops.vision_scan_cuda.conv_update(
        state, x_, weight.contiguous(), None if bias is None else bias.contiguous(), activation == "silu",
        marks_of(seq_idx), _slots(state_indices), y,
    )  # fmt: skip
    return y.to(x.dtype)


KERNELS = {
    "ssd_update": (_ssd, _serves),
    "selective_scan_update": (_selective, _serves),
    "causal_conv1d_update": (_conv, _serves_conv),
}
