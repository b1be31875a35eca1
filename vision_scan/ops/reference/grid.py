"""The two-dimensional forms: a grid read through visiting lists, scanned, and put back.

`index` (K, seqlen) holds K visiting lists: position t of list k reads cell index[k, t] = i * width + j;
-1 is a pad. Everything that depends on a token (x, dt, B, C) is read through the same list.
"""

from typing import Any

import torch
from torch import Tensor

from .causal_conv1d import causal_conv1d_shifted
from .selective_scan import selective_scan_chunked
from .ssd import ssd_chunked


class Rearrange(torch.autograd.Function):
    """y[:, k, t] = x[:, k, index[k, t]], zeros where the index is -1; `inverse` undoes `index`.

    Every entry of x is read at most once, so the gradient is the same gather with the two maps
    exchanged: no atomic additions, the same bits on every run and device.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, is_dense: bool) -> Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.is_dense = is_dense
        lists = torch.arange(index.shape[0], device=index.device)[:, None]
        if is_dense:
            return x[:, lists, index]
        pad = (index < 0).view(*index.shape, *[1] * (x.dim() - 3))
        return x[:, lists, index.clamp(min=0)].masked_fill(pad, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        index, inverse = ctx.saved_tensors
        return Rearrange.apply(grads[0], inverse, index, ctx.is_dense), None, None, None


def read_grid(x: Tensor, index: Tensor) -> Tensor:
    """A grid that all lists read, (batch, cells, ...) -> (batch, K, seqlen, ...), zero at pads."""
    return read_grids(x[:, None].expand(-1, index.shape[0], *x.shape[1:]), index)


def read_grids(x: Tensor, index: Tensor) -> Tensor:
    """Each list reads a grid of its own, (batch, K, cells, ...) -> (batch, K, seqlen, ...)."""
    inverse = rank_map(index, x.shape[2])
    return Rearrange.apply(x, index, inverse, _is_dense(index, inverse))


def write_grids(y: Tensor, index: Tensor, cells: int) -> Tensor:
    """Puts sequences back, (batch, K, seqlen, ...) -> (batch, K, cells, ...), zero where a list does not
    go."""
    inverse = rank_map(index, cells)
    return Rearrange.apply(y, inverse, index, _is_dense(index, inverse))


def rank_map(index: Tensor, cells: int) -> Tensor:
    """(K, seqlen) -> (K, cells): at which position of each list a cell is read, -1 for never."""
    position = torch.arange(index.shape[1], device=index.device).expand_as(index)
    target = torch.where(index < 0, cells, index)  # one cell more takes the pads
    ranks = index.new_full((index.shape[0], cells + 1), -1)
    return ranks.scatter(1, target, position)[:, :cells]


def _is_dense(index: Tensor, inverse: Tensor) -> bool:
    return bool((index >= 0).all()) and bool((inverse >= 0).all())


def merge_grids(y: Tensor, merge: str) -> Tensor:
    """y (batch, K, cells, ...) -> (batch, cells, ...); `concat` keeps the K grids apart."""
    if merge == "concat":
        return y
    return y.mean(1) if merge == "mean" else y.sum(1)


def _per_list_pads(index: Tensor, batch: int) -> list[Tensor | None]:
    """seq_idx of each list: None where it has no pads."""
    return [
        None if bool((row >= 0).all()) else torch.where(row >= 0, 0, -1).expand(batch, -1)
        for row in index
    ]


def _flatten_cells(t: Tensor, first: int) -> Tensor:
    return t.flatten(first, first + 1)


def ssd_2d(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, index, merge, chunk_size) -> Tensor:
    """Arguments as `vision_scan.ssd_2d`, the order as an index."""
    height, width, nheads, _ = x.shape[-4:]
    batch, K = dt.shape[:2]
    read = read_grids if x.dim() == 6 else read_grid
    x = read(_flatten_cells(x, x.dim() - 4), index)
    dt, B, C = (read_grids(_flatten_cells(t, 2), index) for t in (dt, B, C))
    if all(pads is None for pads in _per_list_pads(index, batch)):
        # The lists become heads of one scan: (batch, K, seqlen, heads) -> (batch, seqlen, K * heads).
        x, dt, B, C = (t.movedim(1, 2).flatten(2, 3) for t in (x, dt, B, C))
        A, D, dt_bias = (None if t is None else t.flatten(0, 1) for t in (A, D, dt_bias))
        y, _ = ssd_chunked(
            x, dt, A, B, C, D, None, dt_bias, dt_softplus, dt_min, dt_max, None, None, None, chunk_size
        )
        y = y.unflatten(2, (K, nheads)).movedim(2, 1)
    else:
        D_, bias_ = ([None] * K if t is None else t for t in (D, dt_bias))
        parts = [
            ssd_chunked(
                x[:, k], dt[:, k], A[k], B[:, k], C[:, k], D_[k], None, bias_[k], dt_softplus,
                dt_min, dt_max, None, pads, None, chunk_size,
            )[0]
            for k, pads in enumerate(_per_list_pads(index, batch))
        ]  # fmt: skip
        y = torch.stack(parts, dim=1)
    return merge_grids(write_grids(y, index, height * width), merge).unflatten(
        2 if merge == "concat" else 1, (height, width)
    )


def selective_scan_2d(u, dt, A, B, C, D, dt_bias, dt_softplus, index, merge) -> Tensor:
    """Arguments as `vision_scan.selective_scan_2d`, the order as an index."""
    height, width, d = u.shape[-3:]
    batch, K = dt.shape[:2]
    read = read_grids if u.dim() == 5 else read_grid
    u = read(_flatten_cells(u, u.dim() - 3), index)
    dt, B, C = (read_grids(_flatten_cells(t, 2), index) for t in (dt, B, C))
    u, dt = (t.transpose(2, 3) for t in (u, dt))  # batch K d seqlen
    B, C = (t.movedim(2, -1) for t in (B, C))  # batch K ngroups d_state seqlen
    if all(pads is None for pads in _per_list_pads(index, batch)):
        u, dt, B, C = (t.flatten(1, 2) for t in (u, dt, B, C))
        A, D, dt_bias = (None if t is None else t.flatten(0, 1) for t in (A, D, dt_bias))
        y, _ = selective_scan_chunked(u, dt, A, B, C, D, None, dt_bias, dt_softplus, None, None, None)
        y = y.unflatten(1, (K, d))
    else:
        D_, bias_ = ([None] * K if t is None else t for t in (D, dt_bias))
        parts = [
            selective_scan_chunked(
                u[:, k], dt[:, k], A[k], B[:, k], C[:, k], D_[k], None, bias_[k], dt_softplus,
                None, pads, None,
            )[0]
            for k, pads in enumerate(_per_list_pads(index, batch))
        ]  # fmt: skip
        y = torch.stack(parts, dim=1)
    return merge_grids(write_grids(y.transpose(2, 3), index, height * width), merge).unflatten(
        2 if merge == "concat" else 1, (height, width)
    )


def causal_conv1d_2d(x, weight, bias, activation, index) -> Tensor:
    """Arguments as `vision_scan.causal_conv1d_2d`, the order as an index."""
    height, width, d = x.shape[-3:]
    read = read_grids if x.dim() == 5 else read_grid
    x = read(_flatten_cells(x, x.dim() - 3), index)
    batch, K = x.shape[:2]
    weight = weight.expand(K, -1, -1) if weight.dim() == 2 else weight
    bias = bias.expand(K, -1) if bias is not None and bias.dim() == 1 else bias
    if all(pads is None for pads in _per_list_pads(index, batch)):
        flat = x.movedim(1, 2).flatten(2, 3).transpose(1, 2)  # batch K*d seqlen
        flat_bias = None if bias is None else bias.flatten()
        y, _ = causal_conv1d_shifted(flat, weight.flatten(0, 1), flat_bias, activation, None, None, None)
        y = y.transpose(1, 2).unflatten(2, (K, d)).movedim(2, 1)
    else:
        parts = [
            causal_conv1d_shifted(
                x[:, k].transpose(1, 2), weight[k], None if bias is None else bias[k], activation,
                None, pads, None,
            )[0].transpose(1, 2)
            for k, pads in enumerate(_per_list_pads(index, batch))
        ]  # fmt: skip
        y = torch.stack(parts, dim=1)
    return write_grids(y, index, height * width).unflatten(2, (height, width))
