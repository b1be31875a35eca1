"""SS2D of one picture, cell by cell, written from the description."""

import torch
from torch import Tensor

from vision_scan.modules import SS2D


def visiting_lists(order: str, height: int, width: int) -> list[list[int]]:
    """Those of VMamba's cross scan and of the both-way raster, spelled out."""
    grid = [[row * width + column for column in range(width)] for row in range(height)]
    rows = [cell for line in grid for cell in line]
    columns = [grid[row][column] for column in range(width) for row in range(height)]
    return {"raster": [rows], "bi2": [rows, rows[::-1]],
            "cross4": [rows, columns, rows[::-1], columns[::-1]]}[order]  # fmt: skip


def layer_norm(x: Tensor, module) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = ((centred**2).mean(-1, keepdim=True) + module.eps) ** -0.5
    return centred * scale * module.weight + module.bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def slow_ss2d(module: SS2D, x: Tensor) -> Tensor:
    """x (height, width, d_model) -> the same."""
    height, width, _ = x.shape
    content, z = (x.reshape(height * width, -1) @ module.in_proj.weight.T).chunk(2, dim=-1)
    u = silu(_convolved(module, content.view(height, width, -1)).flatten(0, 1))
    lists = visiting_lists(module.order, height, width)
    d_inner, d_state, rank = u.shape[-1], module.d_state, module.dt_rank
    total = torch.zeros_like(u)
    for k, cells in enumerate(lists):
        selection = module.x_proj.weight[k * (rank + 2 * d_state) : (k + 1) * (rank + 2 * d_state)]
        channels = slice(k * d_inner, (k + 1) * d_inner)
        A = -torch.exp(module.A_logs[channels])
        state = torch.zeros(d_inner, d_state, dtype=x.dtype)
        for cell in cells:
            low, B, C = (selection @ u[cell]).split([rank, d_state, d_state])
            step = module.dt_projs.weight[channels] @ low + module.dt_projs_bias[k]
            step = torch.log1p(torch.exp(step))[:, None]
            state = torch.exp(step * A) * state + step * B * u[cell][:, None]
            total[cell] += state @ C + module.Ds[channels] * u[cell]
    gated = layer_norm(total, module.out_norm) * silu(z)
    return (gated @ module.out_proj.weight.T).view(height, width, -1)


def _convolved(module: SS2D, content: Tensor) -> Tensor:
    """Sum over the neighbourhood of each cell, what is outside of the grid counts nothing."""
    height, width, _ = content.shape
    size = module.conv2d.weight.shape[-1]
    result = module.conv2d.bias.repeat(height, width, 1)
    for row in range(height):
        for column in range(width):
            for i in range(size):
                for j in range(size):
                    y, x = row + i - size // 2, column + j - size // 2
                    if 0 <= y < height and 0 <= x < width:
                        result[row, column] = (
                            result[row, column] + module.conv2d.weight[:, 0, i, j] * content[y, x]
                        )
    return result
