"""Carry a grid through the visiting lists of a scan order, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from vision_scan.errors import UserError, choose
from vision_scan.ops.reference.grid import Rearrange
from vision_scan.orders import MERGES, ScanOrder
from vision_scan.orders import order as get_order


def scan_2d(x: Tensor, order: str | ScanOrder) -> Tensor:
    """Read a grid along every list of a scan order: y[:, k, t] = x at cell order[k][t].

    Args:
        x: channels last, (batch, height, width, ...), any dtype.
        order: name of an order, or a ScanOrder of this height and width.
    Returns:
        (batch, num_orders, seqlen, ...), dtype of x; zeros at pads.
    Raises:
        UserError: if the order is unknown or of another size, or x has fewer than three axes.
    """
    if x.dim() < 3:
        raise UserError(f"scan_2d takes (batch, height, width, ...), not {tuple(x.shape)}; "
                        "give the grid its own two axes")
    order = get_order(order, *x.shape[1:3]).to(x.device)
    cells = x.flatten(1, 2).unsqueeze(1).expand(-1, len(order), *[-1] * (x.dim() - 2))
    return Rearrange.apply(cells, order.index, order.inverse, order.is_dense)


def merge_2d(
    y: Tensor, order: ScanOrder, merge: str | None = None, gate: Tensor | None = None
) -> Tensor:
    """Write sequences back to the grid and merge the lists' results; the way back from scan_2d.

    Args:
        y: (batch, num_orders, seqlen, ...), any floating dtype; what stands at pads is ignored.
        order: the ScanOrder that was read (a name would not tell the height and width).
        merge: a key of MERGES; None takes that of the order. `mean` divides by the number of lists
            that hold a cell; `scatter` needs disjoint lists.
        gate: only for `gated`, and needed there: weights on the grid that broadcast to (batch,
            num_orders, height, width), or with y's further axes to the full shape.
    Returns:
        (batch, height, width, ...), dtype of y; under `concat` (batch, num_orders, height, width,
        ...), zeros where a list does not hold a cell.
    Raises:
        UserError: if the shape of y, the merge or the gate does not fit.
    """
    if not isinstance(order, ScanOrder):
        raise UserError(f"merge_2d takes a ScanOrder, not {order!r}; "
                        "make it with vision_scan.order(name, height, width)")
    merge = order.merge if merge is None else merge
    choose("merge", merge, MERGES)
    if y.dim() < 3 or y.shape[1:3] != order.index.shape:
        raise UserError(f"{order!r} merges (batch, {len(order)}, {order.seqlen}, ...), "
                        f"not {tuple(y.shape)}; give what scan_2d returned for it")
    if (merge == "gated") != (gate is not None):
        raise UserError(f"merge {merge!r} {'needs a' if gate is None else 'takes no'} gate; "
                        "a gate belongs to merge 'gated' and to no other")
    if merge == "scatter" and order.merge != "scatter" and len(order) > 1:
        raise UserError(f"merge 'scatter' needs disjoint lists, and those of {order!r} overlap; "
                        "merge by sum, mean, gated or concat")
    order = order.to(y.device)
    grids = Rearrange.apply(y, order.inverse, order.index, order.is_dense)
    grids = grids.unflatten(2, (order.height, order.width))
    if merge == "concat":
        return grids
    if gate is not None:
        grids = (_match_gate(gate, grids) * grids).to(y.dtype)
    total = grids.sum(1)
    return total / len(order) if merge == "mean" and order.merge != "scatter" else total


def _match_gate(gate: Tensor, grids: Tensor) -> Tensor:
    """Give a gate of up to four axes the further axes of the grids; check that it broadcasts."""
    if gate.dim() <= 4:
        gate = gate[(...,) + (None,) * (grids.dim() - 4)]
    try:
        fits = torch.broadcast_shapes(gate.shape, grids.shape) == grids.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise UserError(f"a gate of shape {tuple(gate.shape)} does not broadcast to "
                        f"{tuple(grids.shape)}; give (batch, num_orders, height, width)")
    return gate
