"""Mamba-1's scan: `selective_scan` over sequences, `selective_scan_2d` over grids,
`selective_scan_update` for decoding."""

import torch
from torch import Tensor

from vision_scan.orders import ScanOrder

from .checks import (
    check_heads,
    check_rank,
    check_shape,
    check_update_length,
    order_index,
    pick_merge,
    update_rows,
)
from .reference import grid
from .reference import selective_scan as reference
from .register import register, register_inplace


def _fake_scan(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens):
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.promote_types(u.dtype, torch.float32)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, u.new_empty((rows, *A.shape), dtype=dtype)


def _fake_scan_2d(u, dt, A, B, C, D, dt_bias, dt_softplus, index, merge):
    lists = (index.shape[0],) if merge == "concat" else ()
    return u.new_empty((u.shape[0], *lists, *u.shape[-3:]))


def _fake_update(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, state_indices):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


_selective_scan = register(
    "selective_scan",
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens",
    2,
    reference.selective_scan_chunked,
    _fake_scan,
)
_selective_scan_2d = register(
    "selective_scan_2d",
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, "
    "Tensor index, str merge",
    1,
    grid.selective_scan_2d,
    _fake_scan_2d,
)
_selective_scan_update = register_inplace(
    "selective_scan_update",
    "Tensor(a!) state, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus, Tensor? seq_idx, Tensor? state_indices",
    reference.selective_scan_update,
    _fake_update,
)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scans sequences: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t . h_t + D u_t, gated by SiLU(z).

    Args:
        u, dt, z: (batch, d, seqlen), float32, bfloat16, float16 or float64.
        A: (d, d_state), negative.
        B, C: (batch, d_state, seqlen), or (batch, ngroups, d_state, seqlen): channel c uses group
            c // (d / ngroups).
        D, dt_bias: (d,).
        initial_state: (batch, d, d_state), or one row per segment with `cu_seqlens`.
        seq_idx: (batch, seqlen), integer: segments; below 0 is padding (see ops/reference/segments.py).
        cu_seqlens: (num_segments + 1,): segments packed into the one row of a batch of 1.
    Returns:
        y: (batch, d, seqlen), dtype of u; with `return_final_state` also the final state (batch, d,
        d_state), float32 (float64 for float64 inputs).
    Raises:
        ValueError: on shapes that do not fit.
    Source: Gu & Dao 2023, "Mamba" (arXiv:2312.00752), algorithm 2.
    """
    check_rank("u", u, "batch d seqlen")
    check_rank("A", A, "d d_state")
    batch, d, seqlen = u.shape
    d_state = A.shape[1]
    groups = () if B.dim() == 3 else (B.shape[1],)
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_shape("dt", dt, u.shape)
    check_shape("A", A, (d, d_state))
    check_shape("B", B, (batch, *groups, d_state, seqlen))
    check_shape("C", C, (batch, *groups, d_state, seqlen))
    check_shape("z", z, u.shape)
    check_shape("D", D, (d,))
    check_shape("dt_bias", dt_bias, (d,))
    check_shape("initial_state", initial_state, (rows, d, d_state))
    check_shape("seq_idx", seq_idx, (batch, seqlen))
    check_heads(d, groups[0] if groups else 1)
    y, state = _selective_scan(
        u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens
    )
    return (y, state) if return_final_state else y


def selective_scan_2d(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    order: str | ScanOrder = "cross4",
    merge: str | None = None,
) -> Tensor:
    """Scans a grid, channels last, along the K visiting lists of an order and merges the K results.

    Args:
        u: (batch, height, width, d), or (batch, K, height, width, d).
        dt: (batch, K, height, width, d); A: (K, d, d_state); D, dt_bias: (K, d).
        B, C: (batch, K, height, width, ngroups, d_state).
        order: name of an order, or a ScanOrder of this height and width.
        merge: sum | mean | scatter, or concat: the K results are kept apart; None: the order's own.
    Returns:
        (batch, height, width, d), or (batch, K, height, width, d) for concat.
    Raises:
        ValueError: on shapes that do not fit; UserError: on an unknown order or merge.
    Source: Liu et al. 2024, "VMamba" (arXiv:2401.10166), SS2D.
    """
    batch = u.shape[0]
    height, width, d = u.shape[-3:]
    order, index = order_index(order, height, width, u.device, "selective_scan_2d")
    K, d_state, ngroups = index.shape[0], A.shape[2], B.shape[-2]
    if u.dim() == 5:
        check_shape("u", u, (batch, K, height, width, d))
    check_shape("dt", dt, (batch, K, height, width, d))
    check_shape("A", A, (K, d, d_state))
    check_shape("B", B, (batch, K, height, width, ngroups, d_state))
    check_shape("C", C, (batch, K, height, width, ngroups, d_state))
    check_shape("D", D, (K, d))
    check_shape("dt_bias", dt_bias, (K, d))
    check_heads(d, ngroups)
    merge = pick_merge(merge, order)
    return _selective_scan_2d(u, dt, A, B, C, D, dt_bias, dt_softplus, index, merge)


def selective_scan_update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    seq_idx: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Advances states by 1 to 16 tokens, in place: the decoding form of `selective_scan`.

    Args:
        state: (num_slots, d, d_state), overwritten.
        u, dt, A, B, C, D, z, dt_bias, seq_idx: as `selective_scan`, seqlen 1 to 16.
        state_indices: (batch,) the slot of each row, all different; below 0: the row is skipped and its
            output is 0. None: row i uses slot i.
    Returns:
        y: (batch, d, seqlen), dtype of u.
    Raises:
        ValueError: on shapes that do not fit or more than 16 tokens.
    """
    check_rank("state", state, "num_slots d d_state")
    check_rank("u", u, "batch d seqlen")
    _, d, d_state = state.shape
    rows, seqlen = update_rows(state, state_indices), u.shape[2]
    groups = () if B.dim() == 3 else (B.shape[1],)
    check_update_length(seqlen)
    check_shape("u", u, (rows, d, seqlen))
    check_shape("dt", dt, u.shape)
    check_shape("A", A, (d, d_state))
    check_shape("B", B, (rows, *groups, d_state, seqlen))
    check_shape("C", C, (rows, *groups, d_state, seqlen))
    check_shape("D", D, (d,))
    check_shape("z", z, u.shape)
    check_shape("dt_bias", dt_bias, (d,))
    check_shape("seq_idx", seq_idx, (rows, seqlen))
    check_heads(d, groups[0] if groups else 1)
    return _selective_scan_update(
        state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, state_indices
    )
