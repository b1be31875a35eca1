"""Checks that the public operators share: shapes, merge kinds, update lengths, orders."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vision_scan.errors import UserError
from vision_scan.orders import ScanOrder
from vision_scan.orders import order as make_order


def check_shape(name: str, tensor: Tensor | None, expected: Sequence[int]) -> None:
    """Raises ValueError unless the tensor is None or has the expected shape."""
    if tensor is not None and tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")


def check_rank(name: str, tensor: Tensor, axes: str) -> None:
    """Raises ValueError unless the tensor has as many axes as are named, for instance "batch d seqlen"."""
    if tensor.dim() != len(axes.split()):
        raise ValueError(f"{name} must have shape ({', '.join(axes.split())}), got {tuple(tensor.shape)}")


def check_skip(D: Tensor | None, heads: Sequence[int], headdim: int) -> None:
    """Checks D: one number a head, or one a channel."""
    if D is not None and tuple(D.shape) not in (tuple(heads), (*heads, headdim)):
        raise ValueError(f"D must have shape {tuple(heads)} or {(*heads, headdim)}, got {tuple(D.shape)}")


def check_heads(nheads: int, ngroups: int) -> None:
    if nheads % ngroups:
        raise ValueError(f"nheads {nheads} must be a multiple of ngroups {ngroups}")


def update_rows(state: Tensor, state_indices: Tensor | None) -> int:
    """How many rows an update has: one a slot, or as many as there are indices."""
    if state_indices is None:
        return state.shape[0]
    check_rank("state_indices", state_indices, "batch")
    return state_indices.shape[0]


def check_update_length(seqlen: int) -> None:
    if not 1 <= seqlen <= 16:
        raise ValueError(f"an update takes 1 to 16 tokens, got {seqlen}: use the scan for longer input")


def pick_merge(merge: str | None, order: ScanOrder) -> str:
    """The merge kind that an operator is asked for, or the order's own.

    Raises:
        UserError: on one that an operator cannot do (a gate needs weights: scan.merge_2d).
    """
    merge = merge or order.merge
    if merge not in ("sum", "mean", "scatter", "concat"):
        raise UserError(
            f"merge {merge!r} is not one of sum, mean, scatter, concat; for 'gated' use concat and merge_2d"
        )
    if merge == "scatter" and order.merge != "scatter" and len(order) > 1:
        raise UserError(f"merge 'scatter' needs disjoint lists, those of {order.name!r} overlap; take sum")
    # Disjoint lists hold each cell once: there is nothing to divide by.
    return "sum" if merge == "mean" and order.merge == "scatter" else merge


def order_index(
    order: str | ScanOrder, height: int, width: int, device: torch.device, operator: str | None = None
) -> tuple[ScanOrder, Tensor]:
    """The order of a grid and its visiting lists as one (K, seqlen) tensor on the device.

    Raises:
        ValueError: if it is for another grid; UserError: if it has no sequence and `operator`, if given, needs one.
    """
    if isinstance(order, str):
        order = make_order(order, height, width)
    if (order.height, order.width) != (height, width):
        raise ValueError(
            f"order {order.name!r} is for a {order.height} x {order.width} grid, got {height} x {width}"
        )
    if operator is not None and not order.is_causal:
        raise UserError(f"{operator} reads cells one after the other, which order {order.name!r} does not; take ssd_2d")
    return order, order.to(device).index  # moved once: the same tensor at every call
