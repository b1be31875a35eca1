"""Fewer tokens of a picture, without training: which cells of a tower's grid are kept, and which are merged.

A reduction goes by what the last attention of the tower says (`PatchAttention`), that of the block whose features the
connector gets. It makes exactly `num_tokens` tokens of each tile, in the raster order of the cells that they stem
from, and has no parameters: a model is read with or without it, and learns with it too. (Of large images in several
tiles, tiles/hired.py keeps the tokens of a budget.)
"""

from dataclasses import dataclass
from typing import Literal, Union

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vision_scan.errors import UserError

from .connector import ConnectorConfig, KeepsGrid, PointwiseConfig
from .vision_encoder import PatchAttention


@dataclass(frozen=True, kw_only=True)
class TokenReduction:
    """What all have.

    Attributes:
        behind: where tokens become fewer. "vision_encoder": in front of the connector, as published, which then has
            to look at one cell at a time; "connector": behind it, which then has to make one token of each cell: so
            a scan still sees the whole grid.
    """

    behind: Literal["vision_encoder", "connector"] = "vision_encoder"

    def check(self, grid: tuple[int, int], connector: ConnectorConfig) -> None:
        """Raises UserError if a grid has fewer cells than tokens are to be made, or the connector does not suit."""
        height, width = grid
        if not 1 <= self.num_tokens <= height * width:
            raise UserError(
                f"token_reduction: {self.num_tokens} tokens, but a tile has {height} x {width} cells: give from 1 to "
                f"{height * width}"
            )
        needed = {"vision_encoder": PointwiseConfig, "connector": KeepsGrid}
        if self.behind not in needed:
            raise UserError(f"token_reduction.behind={self.behind!r}: allowed are {', '.join(needed)}")
        if not isinstance(connector, needed[self.behind]):
            what = "looks at one cell at a time" if self.behind == "vision_encoder" else "makes one token of each cell"
            hint = ", or token_reduction.behind=connector" if isinstance(connector, KeepsGrid) else ""
            raise UserError(
                f"token_reduction behind the {self.behind} needs a connector that {what}, {connector.kind} does not: "
                f"take for instance mlp{hint}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of a tile."""
        raise NotImplementedError

    def reduce(self, x: Tensor, attention: PatchAttention) -> Tensor:
        """The tokens (n, cells, d) of tiles made fewer: (n, num_tokens, d) in the dtype of x."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class VisionZipConfig(TokenReduction):
    """The cells that get most attention as they are, and a few that stand for the rest.

    Of the rest, in raster order, every so many-th cell is taken as a contextual token, and the mean of those cells
    whose keys are most like its own (by the cosine) is added to it. Attention is that of the class token; of a tower
    without one, that which a cell gets on average, as published.

    Source: Yang et al. 2024, "VisionZip" (arXiv:2412.04467), and its code. Different here: contextual tokens stand at
    their places among the others, not behind them; the class token, there one of the dominant ones, is not a token,
    because towers hand out patches alone.

    Attributes:
        dominant: cells kept as they are.
        contextual: tokens that stand for the rest; 0: the rest is dropped.
    """

    kind: Literal["visionzip"] = "visionzip"
    dominant: int = 54
    contextual: int = 10

    def __post_init__(self) -> None:
        if min(self.dominant, self.contextual) < 0 or self.num_tokens < 1:
            raise UserError(
                f"visionzip: dominant {self.dominant}, contextual {self.contextual}: give 0 or more each, together 1"
            )

    @property
    def num_tokens(self) -> int:
        return self.dominant + self.contextual

    def reduce(self, x: Tensor, attention: PatchAttention) -> Tensor:
        ranked = attention.received.argsort(dim=1, descending=True, stable=True)
        dominant, rest = (part.sort(dim=1).values for part in ranked.tensor_split([self.dominant], dim=1))
        if not self.contextual:
            return _cells(x, dominant)
        step = max(1, rest.shape[1] // self.contextual)
        is_contextual = torch.zeros(rest.shape[1], dtype=torch.bool, device=x.device)
        is_contextual[: step * self.contextual : step] = True
        contextual, others = rest[:, is_contextual], rest[:, ~is_contextual]
        nearest = _cosines(_cells(attention.keys, others), _cells(attention.keys, contextual)).argmax(-1)
        merged = _cells(x, contextual) + group_means(_cells(x, others), nearest, self.contextual)
        places = torch.cat([dominant, contextual], dim=1)
        return _cells(torch.cat([_cells(x, dominant), merged], dim=1), places.argsort(dim=1))


@dataclass(frozen=True, kw_only=True)
class ToMeConfig(TokenReduction):
    """Cells that are most like another are merged with it, until `num_tokens` are left.

    Tokens at even places are each matched with the most similar one at an odd place, by the cosine of their keys, and
    the most similar pairs become their mean, weighted by the number of cells in each; this is repeated, as a round
    merges half of the tokens at most. Between rounds the key of a token is the mean of its cells' keys.

    Source: Bolya et al. 2023, "Token Merging" (arXiv:2210.09461), bipartite soft matching. There it makes the tower
    itself faster, a few tokens in each block, with attention weighted by sizes; here the tower is left as it is and
    the language model reads less. Between rounds, too, tokens stay in raster order; the released code then has those
    that were not merged in front.

    Attributes:
        num_tokens: tokens of a tile.
    """

    kind: Literal["tome"] = "tome"
    num_tokens: int = 64

    def reduce(self, x: Tensor, attention: PatchAttention) -> Tensor:
        return group_means(x, similar_groups(attention.keys, self.num_tokens), self.num_tokens)


def similar_groups(keys: Tensor, num_groups: int) -> Tensor:
    """Cells put together by bipartite soft matching, see `ToMeConfig`.

    Args:
        keys: (n, cells, headdim).
        num_groups: from 1 to the number of cells.
    Returns:
        (n, cells) int64: the group of each cell; groups are numbered in the raster order of the cell that the others
        were merged into.
    """
    n, count, _ = keys.shape
    groups = torch.arange(count, device=keys.device).expand(n, -1)
    while count > num_groups:
        fewer = min(count - num_groups, count // 2)
        metric = group_means(keys, groups, count)
        similarity, partner = _cosines(metric[:, ::2], metric[:, 1::2]).max(-1)
        sources = similarity.topk(fewer, dim=1).indices
        places = torch.arange(count, device=keys.device).expand(n, -1)
        targets = places.scatter(1, 2 * sources, 2 * partner.gather(1, sources) + 1)
        numbers = (targets == places).cumsum(1) - 1
        groups = numbers.gather(1, targets).gather(1, groups)
        count -= fewer
    return groups


def group_means(x: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Means over groups of tokens, summed in float32 at least.

    Args:
        x: (n, tokens, d).
        groups: (n, tokens) int64, from 0 to num_groups - 1.
    Returns:
        (n, num_groups, d) in the dtype of x; 0 for a group without tokens.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = wide.new_zeros(len(x), num_groups, x.shape[-1])
    sums = sums.scatter_add(1, groups[..., None].expand_as(x), wide)
    sizes = wide.new_zeros(len(x), num_groups).scatter_add(1, groups, torch.ones_like(groups, dtype=wide.dtype))
    return (sums / sizes.clamp(min=1)[..., None]).to(x.dtype)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of (n, i, d) and (n, j, d) each with each: (n, i, j), in their dtype under autocast too, so that training
    matches as evaluation does."""
    with torch.autocast(a.device.type, enabled=False):
        return normalize(a, dim=-1) @ normalize(b, dim=-1).mT


def _cells(x: Tensor, places: Tensor) -> Tensor:
    """Of x (n, cells, d) those at places (n, m): (n, m, d)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


TOKEN_REDUCTIONS: dict[str, type[TokenReduction]] = {"tome": ToMeConfig, "visionzip": VisionZipConfig}

TokenReductionConfig = Union[tuple(TOKEN_REDUCTIONS.values())]  # noqa: UP007
