"""GroupMamba: modulated layers whose quarters of channels are scanned in one direction each.

Source: Shaker et al. 2024, "GroupMamba: Parameter-Efficient and Accurate Group Visual State Space Model"
(arXiv:2407.13772); sizes, names and shapes after the released code (Amshaker/GroupMamba, groupmamba.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from cobra.typed_config import require_positive
from vision_scan.errors import UserError
from vision_scan.modules import DIRECTIONS, GROUP, GroupMambaBlock, SS2DConfig
from vision_scan.orders import sequential_order
from vision_scan.precision import BatchNorm2d, LayerNorm

from .tower import StagesConfig, Tower, halved


@dataclass(frozen=True, kw_only=True)
class GroupMambaConfig(StagesConfig):
    """The defaults are GroupMamba-T's; `orders` are those of the chunks of channels, d_stem is the stem's width."""

    kind: Literal["groupmamba"] = "groupmamba"
    dims: tuple[int, ...] = (64, 128, 348, 448)
    depths: tuple[int, ...] = (3, 4, 9, 3)
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    d_stem: int = 32
    mixer: SS2DConfig = GROUP
    orders: tuple[str, ...] = DIRECTIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "d_stem")
        if len(self.mlp_ratios) != len(self.dims):
            raise UserError(f"groupmamba: {len(self.mlp_ratios)} mlp_ratios for {len(self.dims)} dims: give as many")
        for order in self.orders:
            sequential_order(order)  # an unknown name fails here, not when the model is built

    def grid(self, height: int, width: int) -> tuple[int, int]:
        times = 1 + len(self.dims)
        return halved(height, times), halved(width, times)


class GroupMamba(Tower):
    """GroupMamba-T, -S and -B: images of any size, a cell for each 32 x 32 pixels begun.

    Checked: millions of parameters, head included, against the published table; names and shapes against those that
    the released code makes. No released file has been read. Not found: the mean and standard deviation of its
    pixels; they are ImageNet's here, as of the code that it is based on.
    """

    Config = GroupMambaConfig
    RELEASED: ClassVar[Mapping[str, StagesConfig]] = {
        "groupmamba-t": GroupMambaConfig(),
        "groupmamba-s": GroupMambaConfig(dims=(64, 128, 348, 512), depths=(3, 4, 16, 3), d_stem=64),
        "groupmamba-b": GroupMambaConfig(dims=(96, 192, 424, 512), depths=(3, 6, 21, 3), d_stem=64),
    }
    head_names = ("norm4", "post_network", "head", "dist_head")

    def build(self, config: GroupMambaConfig) -> None:
        embeds = [Stem(config.d_stem, config.dims[0]), *map(Downsample, config.dims, config.dims[1:])]
        stages = zip(embeds, config.dims, config.depths, config.mlp_ratios, strict=True)
        for stage, (embed, dim, depth, mlp_ratio) in enumerate(stages, start=1):
            blocks = [GroupMambaBlock(dim, config.mixer, config.orders, mlp_ratio) for _ in range(depth)]
            self.add_module(f"patch_embed{stage}", embed)
            self.add_module(f"block{stage}", nn.Sequential(*blocks))
            if stage < len(embeds):  # the last norm belongs to the head
                self.add_module(f"norm{stage}", LayerNorm(dim, eps=1e-6))

    def features(self, pixels: Tensor) -> Tensor:
        x = pixels.movedim(1, -1)
        for part in self.children():  # in the order in which they were added
            x = part(x)
        return x


class Downsample(nn.Module):
    """A 3 x 3 convolution with stride 2, then a norm; channels last."""

    def __init__(self, dim: int, wider: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, wider, 3, stride=2, padding=1)
        self.norm = LayerNorm(wider)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.movedim(-1, 1)).movedim(1, -1))


class Stem(Downsample):
    """Three convolutions on half the image's rows and columns in front of the first Downsample."""

    def __init__(self, d_stem: int, dim: int) -> None:
        super().__init__(d_stem, dim)
        layers: list[nn.Module] = []
        for before, size, stride in ((3, 7, 2), (d_stem, 3, 1), (d_stem, 3, 1)):
            conv = nn.Conv2d(before, d_stem, size, stride=stride, padding=size // 2, bias=False)
            layers += [conv, BatchNorm2d(d_stem), nn.ReLU()]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.conv(x.movedim(-1, 1)).movedim(1, -1))
