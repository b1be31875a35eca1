"""What every way of cutting images into tiles has: a frame to cut by, and layouts of images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

Size = tuple[int, int]
"""Height and width, or rows and columns."""


def count_cells(height: int, width: int) -> int:
    """Tokens of a connector that makes one of each cell."""
    return height * width


@dataclass(frozen=True)
class TileFrame:
    """What the rest of a model says about tiles.

    Attributes:
        tile: height and width of a tile in pixels, `image.height` and `image.width`.
        cells: rows and columns of features that the tower makes of such a tile.
        stride: height and width of a cell in pixels; looked at by tilings that `varies` only.
        num_tokens: how many the connector makes of so many rows and columns of cells.
    """

    tile: Size
    cells: Size
    stride: int = 0
    num_tokens: Callable[[int, int], int] = count_cells


class Layout:
    """The tiles of an image, and how many tokens they become."""

    @property
    def images(self) -> "Sequence[Layout]":
        """Itself; of a video, its frames."""
        return (self,)

    @property
    def num_tiles(self) -> int:
        raise NotImplementedError

    @property
    def num_entries(self) -> int:
        """Entries of `pixel_values` that the image has."""
        raise NotImplementedError

    @property
    def num_tokens(self) -> int:
        raise NotImplementedError

    def grids(self, cells: Size) -> list[Size]:
        """Rows and columns of cells of each tile; `cells` are those of a tile that has no size of its own."""
        raise NotImplementedError


class Tiling:
    """A Config whose images become several tiles, or tiles of their own sizes.

    All follows from height and width of an image, so that rows are measured from the headers of their images.

    Attributes:
        varies: whether tiles have sizes of their own. If so, an entry of `pixel_values` is not a tile but a patch of
            `TileFrame.stride` pixels each way, a tile's patches stand row by row, and the tower has to take any number
            of rows and columns of them.
        needs_cells: whether the connector has to make one token of each cell.
        separates: whether there are tokens between those of tiles.
    """

    varies: ClassVar[bool] = False
    needs_cells: ClassVar[bool] = False
    separates: ClassVar[bool] = False

    @property
    def attention_of(self) -> tuple[int, ...]:
        """Blocks of the tower, see cobra/vision_encoder, by whose attention cells are chosen; none: by none."""
        return ()

    def layout(self, height: int, width: int, frame: TileFrame) -> Layout:
        """The layout of an image of height x width pixels."""
        raise NotImplementedError

    def largest(self, frame: TileFrame) -> Layout:
        """A layout that no image's exceeds in tokens."""
        raise NotImplementedError

    def extend(self, connector: nn.Module, d_model: int) -> None:
        """Gives a connector the modules that join tiles, whose learning, freezing and checkpoints then are its own."""

    def encode(
        self,
        pixel_values: Tensor,
        layouts: Sequence[Layout],
        encode: Callable[[Tensor], Any],
        connector: nn.Module,
        frame: TileFrame,
    ) -> Tensor:
        """The tokens of images, one image behind another: (tokens, d_model).

        Args:
            pixel_values: (entries, 3, height, width), as `layouts` count them.
            encode: tiles of one size (n, 3, height, width) to their tokens (n, num_tokens, d_model); where there is
                `attention_of`, to these and a list of `PatchAttention`.
            connector: what `extend` was called with.
        """
        raise NotImplementedError
