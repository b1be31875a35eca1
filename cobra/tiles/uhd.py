"""LLaVA-UHD: an overview, and slices in about the shape of the image."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cobra.typed_config import require_positive

from .layout import Layout, Size, TileFrame
from .sized import SizedLayout, SizedTiling, encode_tiles, most_tokens


@dataclass(frozen=True, kw_only=True)
class UHDConfig(SizedTiling):
    """An overview in the image's shape, and behind it a grid of slices, each with about as many pixels as
    `image.height` x `image.width`.

    As many slices as the image has times these pixels would be ideal; of all grids of one slice fewer, as many and one
    more, that is taken whose columns / rows is nearest to width / height of the image, by logarithms. An image that has
    no more pixels than a slice is its overview alone. Nothing is padded or cut off: overview and slices are resized to
    whole cells, rounded down, so that the shape of the image changes by less than a cell.

    Source: Guo et al. 2024, "LLaVA-UHD" (arXiv:2403.11703), and its code (thunlp/LLaVA-UHD, llava/slice_process.py).
    Different here: no tile has more cells than fit into `image.height` x `image.width` pixels, where there the longer
    side of an extremely long image knows no limit; the separators are learned here, and the language model's own tokens
    "," and "\\n" there. Its resampler of 64 tokens a slice is a choice of connector (mqt).

    Attributes:
        max_slices: of an image.
    """

    kind: Literal["uhd"] = "uhd"
    max_slices: int = 7

    separates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive(self, "max_slices")

    def choose(self, height: int, width: int, tile: Size) -> Size:
        """Rows and columns of slices for an image of height x width pixels; (0, 0): none."""
        ideal = min(math.ceil(width * height / math.prod(tile)), self.max_slices)
        if ideal <= 1:
            return 0, 0
        grids = [
            (count // columns, columns)
            for count in (ideal - 1, ideal, ideal + 1)
            if 1 < count <= self.max_slices
            for columns in range(1, count + 1)
            if count % columns == 0
        ]
        shape = math.log(width / height)
        return min(grids, key=lambda grid: abs(shape - math.log(grid[1] / grid[0])))

    def layout(self, height: int, width: int, frame: TileFrame) -> SizedLayout:
        overview = fit_cells(height, width, frame)
        tokens = frame.num_tokens(*overview)
        rows, columns = self.choose(height, width, frame.tile)
        if not rows:
            return SizedLayout(frame.stride, overview, tokens)
        cells = fit_cells(max(1, height // rows), max(1, width // columns), frame)
        return SizedLayout(frame.stride, overview, tokens, rows, columns, cells, frame.num_tokens(*cells) + 1)

    def largest(self, frame: TileFrame) -> SizedLayout:
        cells = most_tokens(max_cells(frame), frame)
        tokens = frame.num_tokens(*cells)
        if self.max_slices == 1:
            return SizedLayout(frame.stride, cells, tokens)
        return SizedLayout(frame.stride, cells, tokens, self.max_slices, 1, cells, tokens + 1)

    def extend(self, connector: nn.Module, d_model: int) -> None:
        connector.separators = SliceSeparators(d_model)

    def encode(
        self,
        pixel_values: Tensor,
        layouts: Sequence[Layout],
        encode: Callable[[Tensor], Tensor],
        connector: nn.Module,
        frame: TileFrame,
    ) -> Tensor:
        return connector.separators(encode_tiles(pixel_values, layouts, encode), layouts)


def max_cells(frame: TileFrame) -> int:
    """How many cells a tile has at most."""
    return max(1, math.prod(frame.tile) // frame.stride**2)


def fit_cells(height: int, width: int, frame: TileFrame) -> Size:
    """Rows and columns of cells of about as many pixels as a tile has, in the shape of height x width."""
    ratio = width / height
    inner_height = max(1, int(math.sqrt(math.prod(frame.tile)) / math.sqrt(ratio)))
    inner_width = int(inner_height * ratio)
    rows = min(max(1, inner_height // frame.stride), max_cells(frame))
    return rows, min(max(1, inner_width // frame.stride), max_cells(frame) // rows)


class SliceSeparators(nn.Module):
    """The tokens of tiles in reading order: the overview, then the slices row by row, a learned token behind each, one
    behind the last of a row and another one behind the others.

    Source: see `UHDConfig`.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.comma, self.newline = (nn.Parameter(torch.randn(d_model) / math.sqrt(d_model)) for _ in range(2))

    def forward(self, tokens: Sequence[Tensor], layouts: Sequence[SizedLayout]) -> Tensor:
        """Joins the tokens of images.

        Args:
            tokens: of each tile of all images (num_tokens, d_model), as `layouts` count them.
        Returns:
            (tokens of all images, d_model), in the dtype of `tokens`.
        """
        separators = torch.stack([self.comma, self.newline]).to(tokens[0].dtype)
        # Nothing of them where no image has slices, so that they get a gradient, of zero, then too.
        joined, tiles = [separators[:0]], iter(tokens)
        for layout in layouts:
            joined.append(next(tiles))
            for number in range(1, layout.num_slices + 1):
                is_last = number % layout.columns == 0
                joined += [next(tiles), separators[is_last : is_last + 1]]
        return torch.cat(joined)
