"""Mamba-2's scan: `ssd` over sequences, `ssd_2d` over grids, `ssd_update` for decoding."""

import torch
from torch import Tensor

from vision_scan.orders import ScanOrder

from .checks import (
    check_heads,
    check_rank,
    check_shape,
    check_skip,
    check_update_length,
    order_index,
    pick_merge,
    update_rows,
)
from .reference import grid
from .reference import ssd as reference
from .register import register, register_inplace

_PARAMETERS = "Tensor? dt_bias, bool dt_softplus, float dt_min, float dt_max"


def _fake_ssd(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens, chunk_size
):
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        (rows, *x.shape[2:], B.shape[-1]), dtype=dtype
    )


def _fake_ssd_2d(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, index, merge, chunk_size):
    lists = (index.shape[0],) if merge == "concat" else ()
    return x.new_empty((x.shape[0], *lists, *x.shape[-4:]))


def _fake_update(
    state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, seq_idx, state_indices
):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_ssd = register(
    "ssd",
    f"Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, {_PARAMETERS}, "
    "Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, int chunk_size",
    2,
    reference.ssd_chunked,
    _fake_ssd,
)
_ssd_2d = register(
    "ssd_2d",
    f"Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, {_PARAMETERS}, "
    "Tensor index, str merge, int chunk_size",
    1,
    grid.ssd_2d,
    _fake_ssd_2d,
)
_ssd_update = register_inplace(
    "ssd_update",
    f"Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    f"{_PARAMETERS}, Tensor? seq_idx, Tensor? state_indices",
    reference.ssd_update,
    _fake_update,
)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    chunk_size: int = 256,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scans sequences: S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t, gated by SiLU(z).

    Args:
        x: (batch, seqlen, nheads, headdim), float32, bfloat16, float16 or float64.
        dt: (batch, seqlen, nheads), any float dtype.
        A: (nheads,), negative.
        B, C: (batch, seqlen, ngroups, d_state); head h uses group h // (nheads / ngroups).
        D: (nheads,) or (nheads, headdim).
        z: (batch, seqlen, nheads, headdim).
        dt_bias: (nheads,), added to dt before the softplus.
        dt_limit: dt is clamped to it, after the softplus.
        initial_state: (batch, nheads, headdim, d_state), or one row per segment with `cu_seqlens`.
        seq_idx: (batch, seqlen), integer: segments; below 0 is padding (see ops/reference/segments.py).
        chunk_size: work is cut into chunks of this length; does not change the result.
        cu_seqlens: (num_segments + 1,): segments packed into the one row of a batch of 1.
    Returns:
        y: (batch, seqlen, nheads, headdim), dtype of x; with `return_final_state` also the final state,
        float32 (float64 for float64 inputs), after the last real token of each row or segment.
    Raises:
        ValueError: on shapes that do not fit.
    Source: Dao & Gu 2024, "Transformers are SSMs" (arXiv:2405.21060), section 6.
    """
    check_rank("x", x, "batch seqlen nheads headdim")
    check_rank("B", B, "batch seqlen ngroups d_state")
    batch, seqlen, nheads, headdim = x.shape
    ngroups, d_state = B.shape[-2:]
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_shape("dt", dt, (batch, seqlen, nheads))
    check_shape("A", A, (nheads,))
    check_shape("B", B, (batch, seqlen, ngroups, d_state))
    check_shape("C", C, (batch, seqlen, ngroups, d_state))
    check_skip(D, (nheads,), headdim)
    check_shape("z", z, x.shape)
    check_shape("dt_bias", dt_bias, (nheads,))
    check_shape("initial_state", initial_state, (rows, nheads, headdim, d_state))
    check_shape("seq_idx", seq_idx, (batch, seqlen))
    check_heads(nheads, ngroups)
    y, state = _ssd(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, *map(float, dt_limit),
        initial_state, seq_idx, cu_seqlens, chunk_size,
    )  # fmt: skip
    return (y, state) if return_final_state else y


def ssd_2d(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    order: str | ScanOrder = "cross4",
    merge: str | None = None,
    chunk_size: int = 256,
) -> Tensor:
    """Scans a grid along the K visiting lists of an order and merges the K results.

    Args:
        x: (batch, height, width, nheads, headdim), or (batch, K, height, width, nheads, headdim).
        dt: (batch, K, height, width, nheads); A, D, dt_bias: (K, nheads).
        B, C: (batch, K, height, width, ngroups, d_state).
        order: name of an order, or a ScanOrder of this height and width. One that is not causal has every cell read
            one sum over all cells, each weighted by dt |A| (Shi et al. 2024, "VSSD", arXiv:2407.18559).
        merge: sum | mean | scatter, or concat: the K results are kept apart; None: the order's own.
    Returns:
        (batch, height, width, nheads, headdim), or (batch, K, height, width, nheads, headdim) for concat.
    Raises:
        ValueError: on shapes that do not fit; UserError: on an unknown order or merge.
    Source: the scan of Dao & Gu 2024 along the orders of Liu et al. 2024, "VMamba" (arXiv:2401.10166).
    """
    batch = x.shape[0]
    height, width, nheads, headdim = x.shape[-4:]
    order, index = order_index(order, height, width, x.device)
    K, (ngroups, d_state) = index.shape[0], B.shape[-2:]
    if x.dim() == 6:
        check_shape("x", x, (batch, K, height, width, nheads, headdim))
    check_shape("dt", dt, (batch, K, height, width, nheads))
    check_shape("A", A, (K, nheads))
    check_shape("B", B, (batch, K, height, width, ngroups, d_state))
    check_shape("C", C, (batch, K, height, width, ngroups, d_state))
    check_skip(D, (K, nheads), headdim)
    check_shape("dt_bias", dt_bias, (K, nheads))
    check_heads(nheads, ngroups)
    merge = pick_merge(merge, order)
    if not order.is_causal:
        y = reference.ssd_noncausal(x, dt, A, B, C, D, dt_bias, dt_softplus, *map(float, dt_limit))
        return grid.merge_grids(y, merge)
    return _ssd_2d(
        x, dt, A, B, C, D, dt_bias, dt_softplus, *map(float, dt_limit), index, merge, chunk_size
    )


def ssd_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    seq_idx: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Advances states by 1 to 16 tokens, in place: the decoding form of `ssd`.

    Args:
        state: (num_slots, nheads, headdim, d_state), overwritten.
        x, dt, A, B, C, D, z, dt_bias, dt_limit, seq_idx: as `ssd`, seqlen 1 to 16.
        state_indices: (batch,) the slot of each row, all different; below 0: the row is skipped and its
            output is 0. None: row i uses slot i.
    Returns:
        y: (batch, seqlen, nheads, headdim), dtype of x.
    Raises:
        ValueError: on shapes that do not fit or more than 16 tokens.
    """
    check_rank("state", state, "num_slots nheads headdim d_state")
    check_rank("x", x, "batch seqlen nheads headdim")
    check_rank("B", B, "batch seqlen ngroups d_state")
    _, nheads, headdim, d_state = state.shape
    rows, seqlen, ngroups = update_rows(state, state_indices), x.shape[1], B.shape[2]
    check_update_length(seqlen)
    check_shape("x", x, (rows, seqlen, nheads, headdim))
    check_shape("dt", dt, (rows, seqlen, nheads))
    check_shape("A", A, (nheads,))
    check_shape("B", B, (rows, seqlen, ngroups, d_state))
    check_shape("C", C, (rows, seqlen, ngroups, d_state))
    check_skip(D, (nheads,), headdim)
    check_shape("z", z, x.shape)
    check_shape("dt_bias", dt_bias, (nheads,))
    check_shape("seq_idx", seq_idx, (rows, seqlen))
    check_heads(nheads, ngroups)
    return _ssd_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, *map(float, dt_limit), seq_idx, state_indices
    )
