"""Curves through a grid: functions of the (height, width) grid of cell ids to the ids in the order of visiting, or to
several such lists. Options have defaults."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vision_scan.errors import UserError, choose


def _sorted_by(key: Callable[[Tensor, Tensor], Tensor], grid: Tensor) -> Tensor:
    """The entries of a grid in ascending order of key(row, column)."""
    rows, columns = torch.ones_like(grid).nonzero().T
    return grid.flatten()[key(rows, columns).argsort()]


def snake(grid: Tensor) -> Tensor:
    """Rows top to bottom, the first to the right, the next to the left, and so on."""
    path = grid.clone()
    path[1::2] = grid[1::2].flip(1)
    return path.flatten()


def spiral(grid: Tensor) -> Tensor:
    """Clockwise from the top left corner inwards: take the top row, turn the rest, repeat."""
    path = []
    while grid.numel():
        path.append(grid[0])
        grid = grid[1:].rot90()
    return torch.cat(path)


def diagonal(grid: Tensor) -> Tensor:
    """Lines of equal row + column from the top left on, each from top right to bottom left."""
    return _sorted_by(lambda row, column: (row + column) * grid.numel() + row, grid)


def morton(grid: Tensor) -> Tensor:
    """Z curve: by the number whose bits are those of row and column, interleaved."""

    def code(row: Tensor, column: Tensor) -> Tensor:
        bits = range(max(grid.shape).bit_length())
        pairs = [(2 * (row >> bit & 1) + (column >> bit & 1)) << 2 * bit for bit in bits]
        return torch.stack(pairs).sum(0)

    return _sorted_by(code, grid)


def random(grid: Tensor, seed: int = 0) -> list[Tensor]:
    if not 0 <= seed < 2**63:
        raise UserError(f"option seed of scan order 'random' must be in 0 .. 2**63 - 1, not {seed}")
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randperm(grid.numel(), generator=generator, device="cpu")]


def hilbert(grid: Tensor, free_end: bool = True) -> Tensor:
    """Hilbert curve of any rectangle, from its top left corner; every step is between neighbours.

    A long rectangle is cut across, any other is covered by an arch of three parts: down along the
    left, across the bottom, up along the right. Cuts fall on even numbers, so that each part can
    begin and end at two corners of one side: that needs an even side or an odd number of cells.
    With `free_end` the last part may end at its bottom left instead of its top right corner, which
    leaves no rectangle without such a path. On squares of side 2^n this is Hilbert's curve.

    Source: after J. Cerveny's generalized Hilbert curve, github.com/jakubcerveny/gilbert (which
    has a diagonal step where the longer side alone is odd; `free_end` is our way around it).
    """
    height, width = grid.shape
    if height == 1 or width == 1:
        return grid.flatten()
    if free_end and height > width:
        return hilbert(grid.T)
    if 2 * width > 3 * height:
        left = width // 2 + width // 2 % 2
        return torch.cat([hilbert(grid[:, :left], False), hilbert(grid[:, left:], free_end)])
    if free_end and width % 2 == 1 and height % 2 == 0:
        return hilbert(grid.T, False)
    left, top = width // 2, height // 2
    top += top % 2 if height > 2 else 0
    down, up = grid[:top, :left].T, grid[:top, left:].flip(0, 1).T
    return torch.cat([hilbert(part, False) for part in (down, grid[top:], up)])


def both_ways(*paths: Tensor) -> list[Tensor]:
    """The lists, and behind them each of them backwards."""
    return [*paths, *(path.flip(0) for path in paths)]


def snakes(grid: Tensor) -> list[Tensor]:
    """Snakes from the corners top left, top right, bottom left, bottom right, along rows and along columns each."""
    corners = (grid, grid.flip(1), grid.flip(0), grid.flip(0, 1))
    return [snake(view) for corner in corners for view in (corner, corner.T)]


def windows(
    grid: Tensor, window: int = 2, columns: bool = False, backwards: bool = False, pad: str = "keep"
) -> list[Tensor]:
    """Squares of `window` cells a side, row by row or, with `columns`, column by column, each read in the same way."""
    parts = _padded(grid, window, "local").unflatten(0, (-1, window)).unflatten(2, (-1, window))
    path = parts.permute(2, 0, 3, 1) if columns else parts.permute(0, 2, 1, 3)
    path = _without_pads(path.flatten(), pad, "local")
    return [path.flip(0) if backwards else path]


def skips(grid: Tensor, step: int = 2, pad: str = "keep") -> list[Tensor]:
    """From each of the first `step` x `step` cells, every `step`-th row and column; those that begin in an even row are
    read by rows, the others by columns. The published code has step 2 alone."""
    grid = _padded(grid, step, "es2d")
    parts = [(row, grid[row::step, column::step]) for column in range(step) for row in range(step)]
    paths = [(part.T if row % 2 else part).flatten() for row, part in parts]
    return [_without_pads(path, pad, "es2d") for path in paths]


def _padded(grid: Tensor, multiple: int, name: str) -> Tensor:
    """The grid with pads (-1) below and on the right, up to a multiple of both sides."""
    if multiple < 1:
        raise UserError(f"scan order {name!r}: window and step must be 1 or more, not {multiple}")
    height, width = grid.shape
    return torch.nn.functional.pad(grid, (0, -width % multiple, 0, -height % multiple), value=-1)


# Our operators pass pads by; a mixer of another kind reads them as zeros, as the published code does.
PADS = {"keep": "pads stay in the list", "compact": "pads are left out"}


def _without_pads(path: Tensor, pad: str, name: str) -> Tensor:
    choose(f"option pad of scan order {name!r}", pad, PADS)
    return path if pad == "keep" else path[path >= 0]
