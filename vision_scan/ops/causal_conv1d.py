"""The short convolution before a scan: over sequences, over grids along an order, and for decoding."""

from typing import Literal

import torch
from torch import Tensor

from vision_scan.orders import ScanOrder

from .checks import (
    check_rank,
    check_shape,
    check_update_length,
    order_index,
    update_rows,
)
from .reference import causal_conv1d as reference
from .reference import grid
from .register import register, register_inplace

Activation = Literal["silu"] | None


def _fake_conv(x, weight, bias, activation, initial_state, seq_idx, cu_seqlens):
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = x.new_empty((x.shape[0], x.shape[2], x.shape[1])).transpose(1, 2)
    return y, x.new_empty((rows, x.shape[1], weight.shape[1] - 1))


def _fake_conv_2d(x, weight, bias, activation, index):
    return x.new_empty((x.shape[0], index.shape[0], *x.shape[-3:]))


def _fake_update(state, x, weight, bias, activation, seq_idx, state_indices):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_causal_conv1d = register(
    "causal_conv1d",
    "Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? initial_state, Tensor? seq_idx, "
    "Tensor? cu_seqlens",
    2,
    reference.causal_conv1d_shifted,
    _fake_conv,
)
_causal_conv1d_2d = register(
    "causal_conv1d_2d",
    "Tensor x, Tensor weight, Tensor? bias, str activation, Tensor index",
    1,
    grid.causal_conv1d_2d,
    _fake_conv_2d,
)
_causal_conv1d_update = register_inplace(
    "causal_conv1d_update",
    "Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? seq_idx, "
    "Tensor? state_indices",
    reference.causal_conv1d_update,
    _fake_update,
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution; padding is stepped over, a new segment starts from zeros.

    Args:
        x: (batch, d, seqlen), float32, bfloat16, float16 or float64.
        weight: (d, width), the last column weighs the current token; bias: (d,).
        activation: None or "silu".
        initial_state: (batch, d, width - 1), the inputs before the first, oldest first; or one row per
            segment with `cu_seqlens`.
        seq_idx: (batch, seqlen), integer: segments; below 0 is padding (see ops/reference/segments.py).
        cu_seqlens: (num_segments + 1,): segments packed into the one row of a batch of 1.
    Returns:
        y: (batch, d, seqlen), dtype of x; with `return_final_state` also the last width - 1 inputs of each
        row's last segment, (batch, d, width - 1), dtype of x.
    Raises:
        ValueError: on shapes or an activation that do not fit.
    """
    check_rank("x", x, "batch d seqlen")
    batch, d, seqlen = x.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_shape("weight", weight, (d, weight.shape[1]))
    check_shape("bias", bias, (d,))
    check_shape("initial_state", initial_state, (rows, d, weight.shape[1] - 1))
    check_shape("seq_idx", seq_idx, (batch, seqlen))
    y, state = _causal_conv1d(
        x, weight, bias, _activation_name(activation), initial_state, seq_idx, cu_seqlens
    )
    return (y, state) if return_final_state else y


def causal_conv1d_2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "silu",
    order: str | ScanOrder = "cross4",
) -> Tensor:
    """The convolution along each of the K visiting lists of an order.

    Args:
        x: (batch, height, width, d), or (batch, K, height, width, d).
        weight: (d, kernel) or (K, d, kernel); bias: (d,) or (K, d).
        activation: None or "silu".
        order: name of an order, or a ScanOrder of this height and width.
    Returns:
        (batch, K, height, width, d), dtype of x: one grid per list, in grid order; zero where a list does
        not go.
    Raises:
        ValueError: on shapes or an activation that do not fit; UserError: on an unknown order.
    """
    height, width, d = x.shape[-3:]
    order, index = order_index(order, height, width, x.device, "causal_conv1d_2d")
    K, kernel = index.shape[0], weight.shape[-1]
    if x.dim() == 5:
        check_shape("x", x, (x.shape[0], K, height, width, d))
    check_shape("weight", weight, (d, kernel) if weight.dim() == 2 else (K, d, kernel))
    check_shape("bias", bias, (d,) if bias is not None and bias.dim() == 1 else (K, d))
    return _causal_conv1d_2d(x, weight, bias, _activation_name(activation), index)


def causal_conv1d_update(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    seq_idx: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Advances windows by 1 to 16 tokens, in place: the decoding form of `causal_conv1d`.

    Args:
        state: (num_slots, d, width - 1), overwritten.
        x: (batch, d, seqlen), seqlen 1 to 16; weight, bias, activation, seq_idx as `causal_conv1d`.
        state_indices: (batch,) the slot of each row, all different; below 0: the row is skipped and its
            output is 0. None: row i uses slot i.
    Returns:
        y: (batch, d, seqlen), dtype of x.
    Raises:
        ValueError: on shapes that do not fit or more than 16 tokens.
    """
    check_rank("state", state, "num_slots d width-1")
    check_rank("x", x, "batch d seqlen")
    _, d, tail = state.shape
    rows, seqlen = update_rows(state, state_indices), x.shape[2]
    check_update_length(seqlen)
    check_shape("x", x, (rows, d, seqlen))
    check_shape("weight", weight, (d, tail + 1))
    check_shape("bias", bias, (d,))
    check_shape("seq_idx", seq_idx, (rows, seqlen))
    return _causal_conv1d_update(
        state, x, weight, bias, _activation_name(activation), seq_idx, state_indices
    )


def _activation_name(activation: Activation) -> str:
    """An operator's schema has no optional string."""
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    return activation or ""
