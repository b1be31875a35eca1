"""HiRED: AnyRes with a budget of tokens, shared out among the tiles by what the tower attends to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from vision_scan.errors import UserError

from .anyres import AnyResConfig, TileLayout, join_tiles
from .layout import Layout, Size, TileFrame

if TYPE_CHECKING:
    from cobra.vision_encoder import PatchAttention

Encode = Callable[[Tensor], tuple[Tensor, "list[PatchAttention]"]]


@dataclass(frozen=True)
class BudgetLayout(TileLayout):
    """Tiles of one size of which so many cells become tokens.

    Attributes:
        overview: of the first tile, those that are most attended to.
        budget: of the grid behind it.
    """

    budget: int = 0

    @property
    def num_tokens(self) -> int:
        return self.overview + self.budget


@dataclass(frozen=True, kw_only=True)
class HiREDConfig(AnyResConfig):
    """AnyRes without newlines, of which the cells become tokens that the tower attends to.

    The budget is a share of all tiles' cells, known before an image is looked at. Of it the overview gets
    `overview_share`, and each tile of the grid as much of the rest as its part of the overview gets of the attention in
    an early block. Within a tile, cells go by the attention in the block whose features are taken: that of the class
    token, or of a tower without one, that which a cell gets on average. Tokens stay in order: the overview's, then the
    grid's, row by row over the whole of it. It has no parameters: a model is read with or without it.

    Source: Arif et al. 2024, "HiRED" (arXiv:2408.10945), and its code (hasanar1f/HiRED), from which this differs: the
    grid's budget is met exactly (by Webster's method, where there shares are rounded down and tokens of padding are
    dropped afterwards), padding takes no part, each tile is given the part of the overview that shows it (there, of
    grids with several columns, other rows), and its share goes by the sum of attention, as in the paper, where the code
    counts cells among the most attended. The overview is taken to show the image from edge to edge (`resize=squash`).

    Attributes:
        budget: share of the cells of all tiles, the overview's included, that become tokens.
        overview_share: share of the budget that is the overview's, as far as it has as many cells.
        block: whose attention shares out the budget, counted from the first.
    """

    kind: Literal["hired"] = "hired"
    budget: float = 0.2
    overview_share: float = 0.5
    block: int = 0

    separates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.budget <= 1:
            raise UserError(f"image.tiles.budget={self.budget}: give a share of the cells above 0, up to 1")
        if not 0 <= self.overview_share <= 1:
            raise UserError(f"image.tiles.overview_share={self.overview_share}: give a share of the budget from 0 to 1")
        if self.block < 0:
            raise UserError(f"image.tiles.block={self.block}: count blocks of the tower from 0")

    @property
    def attention_of(self) -> tuple[int, ...]:
        return self.block, -1

    def finish(self, layout: TileLayout) -> BudgetLayout:
        """As many cells as the budget allows, at least one."""
        cells, shown = layout.overview, layout.height * layout.width
        total = max(1, int(self.budget * layout.num_tiles * cells))
        overview = min(max(int(self.overview_share * total), total - shown), cells)
        given = {each.name: getattr(layout, each.name) for each in fields(layout)}
        return BudgetLayout(**{**given, "overview": overview}, budget=min(total - overview, shown))

    def extend(self, connector: nn.Module, d_model: int) -> None:
        """Nothing: there are no newlines."""

    def encode(
        self,
        pixel_values: Tensor,
        layouts: Sequence[Layout],
        encode: Encode,
        connector: nn.Module,
        frame: TileFrame,
    ) -> Tensor:
        tokens, (early, last) = encode(pixel_values)
        first, chosen = 0, []
        for layout in layouts:
            tiles = slice(first, first + layout.num_tiles)
            if layout.num_tiles > 1:
                chosen += choose_cells(tokens[tiles], early.received[first], last.received[tiles], layout, frame.cells)
            else:  # the blank tile of a batch without images
                chosen.append(tokens[first])
            first = tiles.stop
        return torch.cat(chosen)


def choose_cells(tokens: Tensor, early: Tensor, last: Tensor, layout: BudgetLayout, cells: Size) -> list[Tensor]:
    """The tokens of an image that are kept.

    Args:
        tokens: (tiles, cells, d_model).
        early: (cells,), what the overview's cells get in the early block.
        last: (tiles, cells), what all cells get in the last.
        cells: height and width of a tile.
    Returns:
        those of the overview and of the grid, (layout.overview, d_model) and (layout.budget, d_model).
    """
    overview = last[0].argsort(descending=True, stable=True)[: layout.overview].sort().values
    is_shown = _is_shown(layout, cells, last.device)
    counts = share_out(_attention_of_tiles(early, layout, cells), is_shown.sum(1), layout.budget)
    ranks = last[1:].masked_fill(~is_shown, -1.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    is_kept = join_tiles((ranks < counts[:, None])[..., None], layout, cells)[..., 0]
    return [tokens[0, overview], join_tiles(tokens[1:], layout, cells)[is_kept]]


def share_out(scores: Tensor, most: Tensor, total: int) -> Tensor:
    """Shares a whole number out by scores, by the method of Webster (Sainte-Lague): each next one goes where the score
    divided by what was given already, and a half, is greatest.

    Args:
        scores: (n,), not negative.
        most: (n,) whole numbers: what each can have, together `total` or more.
    Returns:
        (n,) int64, of the sum `total`.
    """
    given = torch.arange(max(1, int(most.max())), device=scores.device)
    quotients = (scores[:, None] / (given + 0.5)).masked_fill(given >= most[:, None], -1.0)
    winners = quotients.flatten().argsort(descending=True, stable=True)[:total] // len(given)
    return winners.bincount(minlength=len(scores))


def _is_shown(layout: TileLayout, cells: Size, device: torch.device) -> Tensor:
    """Which cells of the grid's tiles show the image: (rows * columns, height * width)."""
    shown = torch.zeros(layout.rows * cells[0], layout.columns * cells[1], dtype=torch.bool, device=device)
    shown[layout.top :, layout.left :][: layout.height, : layout.width] = True
    return shown.view(layout.rows, cells[0], layout.columns, cells[1]).transpose(1, 2).flatten(2).flatten(0, 1)


def _attention_of_tiles(overview: Tensor, layout: TileLayout, cells: Size) -> Tensor:
    """Of what the cells of an overview get, (height * width,), the part of each tile of the grid: (rows * columns,)."""

    def overlaps(count: int, tile: int, start: int, size: int, pieces: int) -> Tensor:
        """Which share of each of `pieces` equal pieces of `size` lies in each of `count` tiles: (count, pieces)."""
        edges = start + size * torch.arange(pieces + 1, dtype=overview.dtype, device=overview.device) / pieces
        first = tile * torch.arange(count, dtype=overview.dtype, device=overview.device)[:, None]
        inside = torch.minimum(edges[1:], first + tile) - torch.maximum(edges[:-1], first)
        return inside.clamp(min=0) * pieces / size

    rows = overlaps(layout.rows, cells[0], layout.top, layout.height, cells[0])
    columns = overlaps(layout.columns, cells[1], layout.left, layout.width, cells[1])
    return (rows @ overview.view(cells) @ columns.mT).flatten()
