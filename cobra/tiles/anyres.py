"""AnyRes: an overview, and the image at a higher resolution cut into a grid of tiles of one size."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vision_scan.errors import UserError

from .layout import Layout, Size, TileFrame, Tiling


@dataclass(frozen=True)
class TileLayout(Layout):
    """Tiles of one size, and which tokens they become.

    Attributes:
        overview: tokens of the whole image as one tile, the first.
        rows, columns: the grid of tiles behind it, 0 without one.
        top, left: the first row and column of cells, counted over all tiles, that show the image and not padding.
        height, width: how many rows and columns do; a row becomes its cells and a newline.
    """

    overview: int
    rows: int = 0
    columns: int = 0
    top: int = 0
    left: int = 0
    height: int = 0
    width: int = 0

    @property
    def num_tiles(self) -> int:
        return 1 + self.rows * self.columns

    @property
    def num_entries(self) -> int:
        return self.num_tiles

    @property
    def num_tokens(self) -> int:
        return self.overview + self.height * (self.width + 1)

    def grids(self, cells: Size) -> list[Size]:
        return [cells] * self.num_tiles


@dataclass(frozen=True, kw_only=True)
class AnyResConfig(Tiling):
    """Grids of tiles that an image may be cut into, behind an overview of one tile.

    Source: AnyRes of LLaVA-NeXT (Liu et al. 2024; LLaVA-VL/LLaVA-NeXT, llava/mm_utils.py), whose "pinpoints" are these
    grids in pixels, with the merge "spatial_unpad". Different here: of an extremely long image one row or column of
    cells is left at least, where there all can be taken for padding.

    Attributes:
        grids: rows and columns of tiles. Of several that serve an image equally well the first is taken.
    """

    kind: Literal["anyres"] = "anyres"
    grids: tuple[tuple[int, ...], ...] = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))

    needs_cells: ClassVar[bool] = True
    separates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.grids or any(len(grid) != 2 or min(grid) < 1 for grid in self.grids):
            shown = [list(grid) for grid in self.grids]
            raise UserError(f"image.tiles.grids={shown}: give pairs of rows and columns from 1 on, as [[1, 2], [2, 2]]")

    def choose(self, height: int, width: int, tile: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the grid in which most of an image's pixels are left, of those the one that wastes the
        fewest of its own.

        Args:
            height, width: of the image, in pixels.
            tile: height and width of a tile.
        """

        def merit(grid: tuple[int, int]) -> tuple[int, int]:
            full = grid[0] * tile[0], grid[1] * tile[1]
            scale = min(full[1] / width, full[0] / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            return effective, effective - full[0] * full[1]

        return max(((rows, columns) for rows, columns in self.grids), key=merit)

    def layout(self, height: int, width: int, frame: TileFrame) -> TileLayout:
        cells = frame.cells
        rows, columns = self.choose(height, width, frame.tile)
        full = rows * cells[0], columns * cells[1]
        # What shows the image is told from its shape alone, rounded down, and the padding on both sides is the same.
        if width / height > full[1] / full[0]:
            inner = max(1, int(round(height * (full[1] / width), 7))), full[1]
        else:
            inner = full[0], max(1, int(round(width * (full[0] / height), 7)))
        top, left = (full[0] - inner[0]) // 2, (full[1] - inner[1]) // 2
        kept = full[0] - 2 * top, full[1] - 2 * left
        return self.finish(TileLayout(cells[0] * cells[1], rows, columns, top, left, *kept))

    def largest(self, frame: TileFrame) -> TileLayout:
        """That of an image without padding in the largest grid."""
        cells = frame.cells
        full = ((rows, columns, rows * cells[0], columns * cells[1]) for rows, columns in self.grids)
        layouts = (TileLayout(cells[0] * cells[1], rows, columns, 0, 0, *size) for rows, columns, *size in full)
        return max(map(self.finish, layouts), key=lambda layout: layout.num_tokens)

    def finish(self, layout: TileLayout) -> TileLayout:
        """A layout of which all cells that show the image become tokens, as this tiling has it."""
        return layout

    def extend(self, connector: nn.Module, d_model: int) -> None:
        connector.unpad = SpatialUnpad(d_model)

    def encode(
        self,
        pixel_values: Tensor,
        layouts: Sequence[Layout],
        encode: Callable[[Tensor], Tensor],
        connector: nn.Module,
        frame: TileFrame,
    ) -> Tensor:
        return connector.unpad(encode(pixel_values), layouts, frame.cells)


def fit(height: int, width: int, full: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image that is resized to fit into `full`, its shape kept."""
    down, across = full[0] / height, full[1] / width
    if across < down:
        return min(math.ceil(height * across), full[0]), full[1]
    return full[0], min(math.ceil(width * down), full[1])


def join_tiles(tiles: Tensor, layout: TileLayout, cells: tuple[int, int]) -> Tensor:
    """The map that a grid of tiles (rows * columns, height * width, d) shows, without padding: (layout.height,
    layout.width, d)."""
    grid = tiles.view(layout.rows, layout.columns, *cells, tiles.shape[-1])
    whole = grid.transpose(1, 2).reshape(layout.rows * cells[0], layout.columns * cells[1], tiles.shape[-1])
    return whole[layout.top :, layout.left :][: layout.height, : layout.width]


class SpatialUnpad(nn.Module):
    """The tokens of tiles in reading order: the overview, then the rows of the grid without padding, a learned newline
    behind each.

    Source: see `AnyResConfig`.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.newline = nn.Parameter(torch.randn(d_model) / math.sqrt(d_model))

    def forward(self, tokens: Tensor, layouts: Sequence[TileLayout], cells: tuple[int, int]) -> Tensor:
        """Joins the tokens of images.

        Args:
            tokens: (tiles of all images, height * width, d_model), as `layouts` counts them.
            layouts: of each image.
            cells: height and width of a tile.
        Returns:
            (tokens of all images, d_model), in the dtype of `tokens`.
        """
        joined = []
        for tiles, layout in zip(tokens.split([layout.num_tiles for layout in layouts]), layouts, strict=True):
            joined += [tiles[0], self._lines(tiles[1:], layout, cells)]
        return torch.cat(joined)

    def _lines(self, tiles: Tensor, layout: TileLayout, cells: tuple[int, int]) -> Tensor:
        kept = join_tiles(tiles, layout, cells)
        newlines = self.newline.to(tiles.dtype).expand(layout.height, 1, -1)
        return torch.cat([kept, newlines], dim=1).flatten(0, 1)
