"""The scan of Gated DeltaNet: `gated_delta_rule` over sequences, `gated_delta_rule_update` for decoding."""

import torch
from torch import Tensor

from .checks import check_rank, check_shape, check_update_length, update_rows
from .reference import gated_delta_rule as reference
from .register import register, register_inplace

_TOKENS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale"


def _fake(q, k, v, g, beta, scale, initial_state, seq_idx, cu_seqlens, chunk_size):
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.promote_types(v.dtype, torch.float32)
    return torch.empty_like(v, memory_format=torch.contiguous_format), v.new_empty(
        (rows, *v.shape[2:], k.shape[-1]), dtype=dtype
    )


def _fake_update(state, q, k, v, g, beta, scale, seq_idx, state_indices):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


_gated_delta_rule = register(
    "gated_delta_rule",
    f"{_TOKENS}, Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, int chunk_size",
    2,
    reference.gated_delta_rule_chunked,
    _fake,
)
_gated_delta_rule_update = register_inplace(
    "gated_delta_rule_update",
    f"Tensor(a!) state, {_TOKENS}, Tensor? seq_idx, Tensor? state_indices",
    reference.gated_delta_rule_update,
    _fake_update,
)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scans sequences: S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, y_t = scale S_t q_t.

    Args:
        q, k: (batch, seqlen, num_k_heads, head_k_dim), any float dtype; head h of v uses key head
            h // (num_v_heads / num_k_heads). Taken as they are: keys should have unit length.
        v: (batch, seqlen, num_v_heads, head_v_dim), float32, bfloat16, float16 or float64.
        g: (batch, seqlen, num_v_heads), any float dtype: the logarithm of the decay, at most 0, -inf included.
        beta: (batch, seqlen, num_v_heads), any float dtype: 0 writes nothing, 1 replaces what the key had.
        scale: of q; None: head_k_dim ** -0.5.
        initial_state: (batch, num_v_heads, head_v_dim, head_k_dim), or one row per segment with `cu_seqlens`.
        seq_idx: (batch, seqlen), integer: segments; below 0 is padding (see ops/reference/segments.py).
        chunk_size: work is cut into chunks of this length; does not change the result.
        cu_seqlens: (num_segments + 1,): segments packed into the one row of a batch of 1.
    Returns:
        y: (batch, seqlen, num_v_heads, head_v_dim), dtype of v; with `return_final_state` also the final state,
        float32 (float64 for float64 values), after the last real token of each row or segment.
    Raises:
        ValueError: on shapes that do not fit.
    Source: Yang, Kautz & Hatamizadeh 2024, "Gated Delta Networks" (arXiv:2412.06464), section 3.
    """
    check_rank("k", k, "batch seqlen num_k_heads head_k_dim")
    check_rank("v", v, "batch seqlen num_v_heads head_v_dim")
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check_tokens(q, k, v, g, beta, seq_idx)
    check_shape("initial_state", initial_state, (rows, *v.shape[2:], k.shape[-1]))
    y, state = _gated_delta_rule(
        q, k, v, g, beta, _resolve(scale, k), initial_state, seq_idx, cu_seqlens, chunk_size
    )
    return (y, state) if return_final_state else y


def gated_delta_rule_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    seq_idx: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Advances states by 1 to 16 tokens, in place: the decoding form of `gated_delta_rule`.

    Args:
        state: (num_slots, num_v_heads, head_v_dim, head_k_dim), overwritten.
        q, k, v, g, beta, scale, seq_idx: as `gated_delta_rule`, seqlen 1 to 16.
        state_indices: (batch,) the slot of each row, all different; below 0: the row is skipped and its
            output is 0. None: row i uses slot i.
    Returns:
        y: (batch, seqlen, num_v_heads, head_v_dim), dtype of v.
    Raises:
        ValueError: on shapes that do not fit or more than 16 tokens.
    """
    check_rank("state", state, "num_slots num_v_heads head_v_dim head_k_dim")
    check_rank("k", k, "batch seqlen num_k_heads head_k_dim")
    check_rank("v", v, "batch seqlen num_v_heads head_v_dim")
    rows, (_, num_v_heads, head_v_dim, head_k_dim) = update_rows(state, state_indices), state.shape
    check_update_length(v.shape[1])
    check_shape("v", v, (rows, v.shape[1], num_v_heads, head_v_dim))
    check_shape("k", k, (rows, v.shape[1], k.shape[2], head_k_dim))
    _check_tokens(q, k, v, g, beta, seq_idx)
    return _gated_delta_rule_update(state, q, k, v, g, beta, _resolve(scale, k), seq_idx, state_indices)


def _resolve(scale: float | None, k: Tensor) -> float:
    return k.shape[-1] ** -0.5 if scale is None else float(scale)


def _check_tokens(q, k, v, g, beta, seq_idx) -> None:
    """That inputs of the ranks of k and v have the same tokens and heads."""
    batch, seqlen, num_v_heads, _ = v.shape
    num_k_heads, head_k_dim = k.shape[2:]
    check_shape("k", k, (batch, seqlen, num_k_heads, head_k_dim))
    check_shape("q", q, k.shape)
    check_shape("g", g, (batch, seqlen, num_v_heads))
    check_shape("beta", beta, (batch, seqlen, num_v_heads))
    check_shape("seq_idx", seq_idx, (batch, seqlen))
    if num_v_heads % num_k_heads:
        raise ValueError(f"num_v_heads {num_v_heads} must be a multiple of num_k_heads {num_k_heads}")
