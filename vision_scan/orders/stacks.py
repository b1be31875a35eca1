"""Orders of stacks of grids: the frames of a video, the tiles of a picture.

A stack (batch, frames, height, width, ...) is read as the grid (batch, frames * height, width, ...) that
`flatten(1, 2)` makes of it, so that everything that takes an order takes these.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from vision_scan.errors import UserError, choose

from . import order
from .scan_order import ScanOrder, read_integer

FIRSTS = {"space": "a frame after the other", "time": "a cell through all frames, then the next cell"}


def order_video(
    name: str,
    frames: int,
    height: int,
    width: int,
    first: Literal["space", "time"] = "space",
    backwards: bool = False,
    depth: int | None = None,
    **options: Any,
) -> ScanOrder:
    """The scan order of a video: a frame is read along the order `name`, time runs forwards.

    Args:
        name, depth, options: as `vision_scan.order`, of one frame.
        frames, height, width: size of the video.
        first: "space": a frame after the other; "time": a cell through all frames, then the next cell.
        backwards: behind the lists, each of them again from its end to its begin: with "raster" the bidirectional scan
            of Li et al. 2024, "VideoMamba" (arXiv:2403.06977). Without it every list is causal in time under
            first="space".
    Returns:
        an order of the grid (frames * height, width).
    Raises:
        UserError: as `vision_scan.order`.
    """
    frames = read_integer("frames", frames, 1)
    choose("first of a video's scan order", first, FIRSTS)
    frame = order(name, height, width, depth, **options)
    start = torch.arange(frames, device="cpu") * (frame.height * frame.width)
    lists = [_at_frames(path, start, first) for path in frame]
    if backwards and frame.merge == "scatter":
        raise UserError(f"the lists of {frame.name!r} are disjoint: a video cannot be read backwards too; take cross4")
    lists += [path.flip(0) for path in lists] if backwards else []
    label = f"{frame.name}, {frames} frames, {first} first{', both ways' if backwards else ''}"
    return replace(frame, lists=lists, height=frames * frame.height, name=label)


def _at_frames(path: Tensor, start: Tensor, first: str) -> Tensor:
    cells = path + start[:, None] if first == "space" else path[:, None] + start
    pads = path[None] < 0 if first == "space" else path[:, None] < 0
    return cells.masked_fill(pads, -1).flatten()


def order_tiles(
    name: str, rows: int, columns: int, height: int, width: int, depth: int | None = None, **options: Any
) -> ScanOrder:
    """The scan order of a picture that was cut into tiles, read as the whole picture that they make.

    Tile by tile is `order_video` with a frame for each tile.

    Args:
        name, depth, options: as `vision_scan.order`, of the whole picture.
        rows, columns: of tiles; the tiles are stacked row by row.
        height, width: of a tile, in cells.
    Returns:
        an order of the grid (rows * columns * height, width).
    Raises:
        UserError: as `vision_scan.order`.
    """
    rows, columns = read_integer("rows", rows, 1), read_integer("columns", columns, 1)
    height, width = read_integer("height", height, 1), read_integer("width", width, 1)
    whole = order(name, rows * height, columns * width, depth, **options)
    stacked = torch.arange(rows * columns * height * width, device="cpu").view(rows, columns, height, width)
    cells = stacked.transpose(1, 2).flatten()  # of the whole picture, row by row: which cell of the stack
    lists = [torch.where(path < 0, -1, cells[path.clamp(min=0)]) for path in whole]
    label = f"{whole.name}, {rows}x{columns} tiles"
    return replace(whole, lists=lists, height=rows * columns * height, width=width, name=label)
