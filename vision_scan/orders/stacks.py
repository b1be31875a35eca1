"""Orders of stacks of grids: the frames of a video, the slices of a volume, the tiles of a picture.

A stack (batch, frames, height, width, ...) is read as the grid (batch, frames * height, width, ...) that
`flatten(1, 2)` makes of it, so that everything that takes an order takes these.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from vision_scan.errors import UserError, choose

from . import curves, order
from .scan_order import ScanOrder, read_integer, read_size

FIRSTS = {"space": "a frame after the other", "time": "a cell through all frames, then the next cell"}

# Axes of (frames, height, width) from the slowest to the fastest, and what that reads.
_AXES = {
    "H": ((0, 1, 2), "frame by frame, row by row"),
    "W": ((0, 2, 1), "frame by frame, column by column"),
    "T": ((2, 1, 0), "column by column, down it cell by cell, each through all frames"),
}
VOLUME_ORDERS = {
    **{f"{axis}+": about for axis, (_, about) in _AXES.items()},
    **{f"{axis}-": f"{about}, backwards" for axis, (_, about) in _AXES.items()},
    "nd_cycle": "H+ H- W+ W- T+ T-, layer by layer",
}


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


def order_volume(name: str, frames: int, height: int, width: int, depth: int | None = None) -> ScanOrder:
    """The scan order of a volume or a video in which time is an axis like the others.

    Source: Li et al. 2024, "Mamba-ND" (arXiv:2402.05892): "nd_cycle" is its order H+ H- W+ W- T+ T-, a direction a
    layer. The names are the paper's, and what each reads is what the released code does (jacklishufan/Mamba-ND,
    video_classification): flattened with the axes (t, h, w), (t, w, h) and (w, h, t), the last of them running fastest.

    Args:
        name: a key of VOLUME_ORDERS.
        frames, height, width: size of the volume.
        depth: number of the layer that asks; picks its list of "nd_cycle". None keeps all six.
    Returns:
        an order of the grid (frames * height, width).
    Raises:
        UserError: if the name, a size or the depth is not allowed.
    """
    choose("scan order of a volume", name, VOLUME_ORDERS)
    frames = read_integer("frames", frames, 1)
    height, width = read_size(height, width)
    depth = None if depth is None else read_integer("depth", depth, 0)
    cells = torch.arange(frames * height * width, device="cpu").view(frames, height, width)
    lists = {}
    for axis, (axes, _) in _AXES.items():
        lists[f"{axis}+"], lists[f"{axis}-"] = curves.both_ways(cells.permute(axes).flatten())
    chosen = list(lists.values()) if name == "nd_cycle" else [lists[name]]
    schedule = "by_layer" if name == "nd_cycle" else "together"
    built = ScanOrder(chosen, frames * height, width, schedule=schedule, name=f"{name}, {frames} frames")
    return built if depth is None else built.at(depth)


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
