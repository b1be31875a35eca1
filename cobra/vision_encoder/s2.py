"""S2: one tower on an image at several scales, for more detail in the same number of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Union

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from cobra.image import ImageConfig
from cobra.towers import HIERARCHICAL
from vision_scan.errors import UserError

from .small import SmallEncoder
from .timm_towers import FusedEncoder, TimmEncoder

TOWERS: dict[str, type[nn.Module]] = {
    "fused": FusedEncoder,
    "small": SmallEncoder,
    "timm": TimmEncoder,
    **HIERARCHICAL,
}
"""The encoders that can be wrapped."""

TowerConfig = Union[tuple(tower.Config for tower in TOWERS.values())]  # noqa: UP007


@dataclass(frozen=True, kw_only=True)
class S2EncoderConfig:
    """A tower and the scales that it sees an image at.

    Attributes:
        tower: what is run on each tile; a tile is the image's size divided by the largest scale.
        scales: at scale s the image is s x s tiles. The grid is that of the first scale; the image comes in the size
            of the largest, so that its detail is in the pixels.
    """

    kind: Literal["s2"] = "s2"
    tower: TowerConfig
    scales: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) < 1 or len(set(self.scales)) != len(self.scales):
            raise UserError(f"s2: scales {list(self.scales)}: give different whole numbers from 1 on, for instance 1,2")

    @property
    def stride(self) -> int:
        if self.scales[0] != 1:
            raise UserError(
                f"s2: with scales {list(self.scales)} not every number of cells is an image: for tiles of any size "
                "(image.tiles native, uhd) put scale 1 in front"
            )
        return self.tower.stride * max(self.scales)

    def tile(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a tile of an image, in pixels."""
        largest = max(self.scales)
        if height % largest or width % largest:
            raise UserError(
                f"s2: an image of {height} x {width} cannot be cut into {largest} x {largest} tiles: "
                f"make height and width multiples of {largest}"
            )
        return height // largest, width // largest

    def grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.tower.grid(*self.tile(height, width))
        return self.scales[0] * rows, self.scales[0] * columns


class S2Encoder(nn.Module):
    """The features of each scale, brought to the first scale's grid, side by side by channel.

    A scale's image is cut into tiles of the size that the tower was made for; the maps of the tiles, put together
    again, are averaged over the cells that fall into one of the first scale's.

    Source: Shi et al. 2024, "When Do We Not Need Larger Vision Models?" (arXiv:2403.13043), and its code
    (bfshi/scaling_on_scales), for squares; here for any rectangle. As there, images are resized bicubically without
    anti-aliasing, and that and the averages are computed in float32 at least.
    """

    Config = S2EncoderConfig

    def __init__(self, config: S2EncoderConfig, image: ImageConfig) -> None:
        super().__init__()
        self.config = config
        height, width = config.tile(image.height, image.width)
        self.tower = TOWERS[config.tower.kind](config.tower, replace(image, height=height, width=width))
        self.d_model = len(config.scales) * self.tower.d_model

    def check_attention(self, what: str, blocks: Sequence[int]) -> None:
        raise UserError(f"{what} goes by the attention of a tower at one scale, s2 has several: take its tower alone")

    @property
    def towers(self) -> list[nn.Module]:
        """The modules that hold the weights, as those of a FusedEncoder."""
        return list(getattr(self.tower, "towers", [self.tower]))

    def forward(self, pixel_values: Tensor) -> Tensor:
        height, width = self.config.tile(*pixel_values.shape[-2:])
        maps = [self._at_scale(pixel_values, scale, height, width) for scale in self.config.scales]
        return torch.cat([_averaged(x, maps[0].shape[1:3]) for x in maps], dim=-1)

    def _at_scale(self, pixel_values: Tensor, scale: int, height: int, width: int) -> Tensor:
        """The map of an image of `scale` by `scale` tiles of height x width pixels."""
        size = scale * height, scale * width
        if pixel_values.shape[-2:] != size:
            pixel_values = interpolate(_wide(pixel_values), size=size, mode="bicubic").to(pixel_values.dtype)
        return join_tiles(self.tower(cut_tiles(pixel_values, scale)), scale)


def cut_tiles(images: Tensor, count: int) -> Tensor:
    """Images (n, channels, height, width) to count x count tiles each: (count * count * n, channels, height / count,
    width / count), ordered by row, column, image."""
    tiles = images.unflatten(3, (count, -1)).unflatten(2, (count, -1))
    return tiles.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)


def join_tiles(maps: Tensor, count: int) -> Tensor:
    """Undoes `cut_tiles` for the maps of tiles, (count * count * n, height, width, d): (n, count * height,
    count * width, d)."""
    return maps.unflatten(0, (count, count, -1)).permute(2, 0, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)


def _averaged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (n, height, width, d) averaged over areas to a size in cells."""
    if maps.shape[1:3] == size:
        return maps
    return interpolate(_wide(maps).movedim(-1, 1), size=size, mode="area").movedim(1, -1).to(maps.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
