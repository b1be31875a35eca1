"""SS2D of one picture, cell by cell, written from the description."""

import torch
from torch import Tensor

from vision_scan.modules import SS2D


def visiting_lists(order: str, height: int, width: int) -> list[list[int]]:
    """Those of VMamba's cross scan and of the both-way raster, spelled out."""
    grid = [[row * width + column for column in range(width)] for row in range(height)]
    rows = [cell for line in grid for cell in line]
    columns = [grid[row][column] for column in range(width) for row in range(height)]
    return {"raster": [rows], "column": [columns], "raster_rev": [rows[::-1]], "column_rev": [columns[::-1]],
            "bi2": [rows, rows[::-1]], "cross4": [rows, columns, rows[::-1], columns[::-1]]}[order]  # fmt: skip


def layer_norm(x: Tensor, module) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = ((centred**2).mean(-1, keepdim=True) + module.eps) ** -0.5
    return centred * scale * module.weight + module.bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def slow_ss2d(module: SS2D, x: Tensor) -> Tensor:
    """x (height, width, d_model) -> the same."""
    height, width, _ = x.shape
    u, z = content_and_gate(module, x)
    y = slow_scan(module, u.flatten(0, 1), visiting_lists(module.order, height, width))
    return projected(module, y.view(height, width, -1), z)


def content_and_gate(module: SS2D, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What is scanned, and what gates it if anything does, of x (height, width, d_model)."""
    both = x @ module.in_proj.weight.T
    d_inner = module.conv2d.weight.shape[0]
    z = both[..., d_inner:] if both.shape[-1] > d_inner else None
    return silu(depthwise(both[..., :d_inner], module.conv2d)), z


def projected(module: SS2D, y: Tensor, z: Tensor | None) -> Tensor:
    y = layer_norm(y, module.out_norm)
    return (y if z is None else y * silu(z)) @ module.out_proj.weight.T


def slow_scan(module: SS2D, u: Tensor, lists: list[list[int]]) -> Tensor:
    """u (cells, d_inner) -> the same: the sum of what the lists give their cells."""
    total = torch.zeros_like(u)
    d_inner, d_state, rank = u.shape[-1], module.d_state, module.dt_rank
    for k, cells in enumerate(lists):
        selection = module.x_proj.weight[k * (rank + 2 * d_state) : (k + 1) * (rank + 2 * d_state)]
        channels = slice(k * d_inner, (k + 1) * d_inner)
        A = -torch.exp(module.A_logs[channels])
        state = torch.zeros(d_inner, d_state, dtype=u.dtype)
        for cell in cells:
            low, B, C = (selection @ u[cell]).split([rank, d_state, d_state])
            step = module.dt_projs.weight[channels] @ low + module.dt_projs_bias[k]
            step = torch.log1p(torch.exp(step))[:, None]
            state = torch.exp(step * A) * state + step * B * u[cell][:, None]
            total = total.index_add(0, torch.tensor([cell]), (state @ C + module.Ds[channels] * u[cell])[None])
    return total


def depthwise(content: Tensor, conv: torch.nn.Conv2d) -> Tensor:
    """Sum over the neighbourhood of each cell (height, width, channels), what is outside of the grid counts nothing."""
    height, width, channels = content.shape
    size = conv.weight.shape[-1]
    bias = torch.zeros(channels, dtype=content.dtype) if conv.bias is None else conv.bias
    result = bias.repeat(height, width, 1)
    for row in range(height):
        for column in range(width):
            for i in range(size):
                for j in range(size):
                    y, x = row + i - size // 2, column + j - size // 2
                    if 0 <= y < height and 0 <= x < width:
                        result[row, column] = (
                            result[row, column] + conv.weight[:, 0, i, j] * content[y, x]
                        )
    return result
