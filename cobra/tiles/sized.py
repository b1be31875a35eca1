"""Tiles of their own sizes, in whole cells, and images in their native aspect ratio."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cobra.typed_config import require_positive
from vision_scan.errors import UserError

from .layout import Layout, Size, TileFrame, Tiling


@dataclass(frozen=True)
class SizedLayout(Layout):
    """An image as one tile of its own size, and behind it, maybe, a grid of slices that have one size.

    Attributes:
        stride: height and width of a cell in pixels.
        overview: rows and columns of cells of the first tile.
        overview_tokens: how many it becomes.
        rows, columns: the grid of slices, 0 without one.
        slice: rows and columns of cells of each.
        slice_tokens: how many each becomes, what separates it from the next included.
    """

    stride: int
    overview: Size
    overview_tokens: int
    rows: int = 0
    columns: int = 0
    slice: Size = (0, 0)
    slice_tokens: int = 0

    @property
    def num_slices(self) -> int:
        return self.rows * self.columns

    @property
    def num_tiles(self) -> int:
        return 1 + self.num_slices

    @property
    def num_entries(self) -> int:
        return math.prod(self.overview) + self.num_slices * math.prod(self.slice)

    @property
    def num_tokens(self) -> int:
        return self.overview_tokens + self.num_slices * self.slice_tokens

    def grids(self, cells: Size = (0, 0)) -> list[Size]:
        return [self.overview, *[self.slice] * self.num_slices]


class SizedTiling(Tiling):
    """A Config that gives a `SizedLayout`."""

    varies: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class NativeConfig(SizedTiling):
    """One tile in the image's own shape: height and width are rounded to whole cells, and both made smaller or larger
    alike only as far as the tile then has more or fewer cells than it may.

    Source: Wang et al. 2024, "Qwen2-VL" (arXiv:2409.12191), `smart_resize` of its image processor, in cells instead of
    pixels. Different here: no tile has more than `max_cells`, however long and narrow its image, where there images of
    more than 200 times the one side are refused.

    Attributes:
        min_cells, max_cells: of a tile. An image that cannot have as many as the one without more than the other gets
            fewer.
    """

    kind: Literal["native"] = "native"
    min_cells: int = 4
    max_cells: int = 1024

    def __post_init__(self) -> None:
        require_positive(self, "min_cells", "max_cells")
        if self.min_cells > self.max_cells:
            raise UserError(
                f"image.tiles: min_cells {self.min_cells} is more than max_cells {self.max_cells}: make it smaller"
            )

    def choose(self, height: int, width: int, stride: int) -> Size:
        """Rows and columns of cells for an image of height x width pixels."""
        rows, columns = round(height / stride), round(width / stride)
        if rows * columns < self.min_cells:
            scale = math.sqrt(self.min_cells * stride**2 / (height * width))
            rows, columns = math.ceil(height * scale / stride), math.ceil(width * scale / stride)
        if rows * columns > self.max_cells:
            scale = math.sqrt(height * width / (self.max_cells * stride**2))
            rows, columns = (max(1, math.floor(side / scale / stride)) for side in (height, width))
        # Of a side that was raised to a cell, the other can still be too long.
        return min(rows, self.max_cells), min(columns, self.max_cells)

    def layout(self, height: int, width: int, frame: TileFrame) -> SizedLayout:
        cells = self.choose(height, width, frame.stride)
        return SizedLayout(frame.stride, cells, frame.num_tokens(*cells))

    def largest(self, frame: TileFrame) -> SizedLayout:
        cells = most_tokens(self.max_cells, frame)
        return SizedLayout(frame.stride, cells, frame.num_tokens(*cells))

    def encode(
        self,
        pixel_values: Tensor,
        layouts: Sequence[Layout],
        encode: Callable[[Tensor], Tensor],
        connector: nn.Module,
        frame: TileFrame,
    ) -> Tensor:
        return torch.cat(encode_tiles(pixel_values, layouts, encode))


def most_tokens(max_cells: int, frame: TileFrame) -> Size:
    """Rows and columns of at most so many cells that the connector makes most tokens of; of several, the squarest."""
    grids = ((rows, max_cells // rows) for rows in range(1, max_cells + 1))
    return max(grids, key=lambda grid: (frame.num_tokens(*grid), -abs(grid[0] - grid[1])))


def encode_tiles(patches: Tensor, layouts: Sequence[Layout], encode: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Tokens of each tile; those of one size are encoded together.

    Args:
        patches: (entries, 3, stride, stride), those of a tile row by row, tile after tile.
        layouts: SizedLayout of each image.
        encode: tiles of one size (n, 3, height, width) to their tokens (n, num_tokens, d_model).
    Returns:
        of each tile (num_tokens, d_model).
    """
    grids = [grid for layout in layouts for grid in layout.grids((0, 0))]
    pieces = patches.split([rows * columns for rows, columns in grids])
    alike: dict[Size, list[int]] = defaultdict(list)
    for place, grid in enumerate(grids):
        alike[grid].append(place)
    tokens: dict[int, Tensor] = {}
    for (rows, columns), places in alike.items():
        cells = torch.stack([pieces[place] for place in places]).unflatten(1, (rows, columns))
        tiles = cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        tokens.update(zip(places, encode(tiles), strict=True))
    return [tokens[place] for place in range(len(grids))]
