"""EfficientVMamba: EVSS blocks in the first two stages, inverted residuals in the later ones.

Source: Pei et al. 2024, "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba" (arXiv:2403.09977);
sizes, names and shapes after the released code (TerryPei/EfficientVMamba, vmamba_efficient.py). The file that it
takes the inverted residual from was not found: that block is after the same file of hunto/LocalMamba, by one of the
authors.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vision_scan.errors import UserError
from vision_scan.modules import EVSSBlock, SS2DConfig
from vision_scan.precision import BatchNorm2d, LayerNorm

from .tower import StagesConfig, ToChannelsFirst, ToChannelsLast, Tower, halved

PATCH_SIZE = 4
NUM_SCANNED_STAGES = 2


@dataclass(frozen=True, kw_only=True)
class EfficientVMambaConfig(StagesConfig):
    """The defaults are EfficientVMamba-T's; `step` is the distance of neighbours in a scanned sub-grid."""

    kind: Literal["efficientvmamba"] = "efficientvmamba"
    dims: tuple[int, ...] = (48, 96, 192, 384)
    depths: tuple[int, ...] = (2, 2, 4, 2)
    mixer: SS2DConfig = field(default_factory=SS2DConfig)
    step: int = 2

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if min(height, width) < PATCH_SIZE:
            raise UserError(f"image {height} x {width} is smaller than a patch of {PATCH_SIZE} pixels")
        times = len(self.dims) - 1
        return halved(height // PATCH_SIZE, times), halved(width // PATCH_SIZE, times)


class EfficientVMamba(Tower):
    """EfficientVMamba-T, -S and -B: images of at least a patch of 4 x 4 pixels; what does not fill a patch at the
    right and bottom is not seen, and grids are padded with zeros to even sizes between the stages, as released.

    Checked: millions of parameters and operations, head included, against the published tables; names and shapes
    against those that the released code makes, of the inverted residuals as said above. No released file has been
    read.
    """

    Config = EfficientVMambaConfig
    RELEASED: ClassVar[Mapping[str, StagesConfig]] = {
        "efficientvmamba-t": EfficientVMambaConfig(),
        "efficientvmamba-s": EfficientVMambaConfig(dims=(64, 128, 256, 512)),
        "efficientvmamba-b": EfficientVMambaConfig(dims=(96, 192, 384, 768), depths=(2, 2, 9, 2)),
    }
    head_names = ("classifier", "norm", "head")
    old_names: ClassVar[Mapping[str, str]] = {
        "patch_embed.proj.": "patch_embed.0.",
        "patch_embed.norm.": "patch_embed.2.",
    }

    def build(self, config: EfficientVMambaConfig) -> None:
        first = config.dims[0]
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, first, PATCH_SIZE, stride=PATCH_SIZE), ToChannelsLast(), LayerNorm(first)
        )
        wider = [*map(PatchMerging, config.dims, config.dims[1:]), nn.Identity()]
        self.layers = nn.Sequential()
        for stage, (dim, depth, downsample) in enumerate(zip(config.dims, config.depths, wider, strict=True)):
            if stage < NUM_SCANNED_STAGES:
                blocks = nn.Sequential(*(EVSSBlock(config.mixer, dim, config.step) for _ in range(depth)))
                self.layers.append(nn.Sequential(OrderedDict(blocks=blocks, downsample=downsample)))
            else:
                convs = [InvertedResidual(dim) for _ in range(depth)]
                self.layers.append(nn.Sequential(ToChannelsFirst(), *convs, ToChannelsLast(), downsample))

    def features(self, pixels: Tensor) -> Tensor:
        return self.layers(self.patch_embed(pixels))


class PatchMerging(nn.Module):
    """Each 2 x 2 cells as one: their channels side by side, normed, mapped to `wider`; odd grids are padded."""

    def __init__(self, dim: int, wider: int) -> None:
        super().__init__()
        self.norm, self.reduction = LayerNorm(4 * dim), nn.Linear(4 * dim, wider, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class InvertedResidual(nn.Module):
    """x plus a depthwise 3 x 3 convolution between 1 x 1 ones, four times as wide, its channels gated; channels
    first."""

    def __init__(self, dim: int, expand: int = 4, reduction: int = 8) -> None:
        super().__init__()
        hidden = expand * dim
        self.conv_pw = nn.Sequential(nn.Conv2d(dim, hidden, 1, bias=False), BatchNorm2d(hidden), nn.ReLU())
        depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.conv_dw = nn.Sequential(depthwise, BatchNorm2d(hidden), nn.ReLU())
        self.se = SqueezeExcite(hidden, max(1, hidden // reduction))
        self.conv_pw2 = nn.Sequential(nn.Conv2d(hidden, dim, 1, bias=False), BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_pw2(self.se(self.conv_dw(self.conv_pw(x))))


class SqueezeExcite(nn.Module):
    """x times a gate per channel, made of the mean cell; channels first."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.conv_reduce, self.conv_expand = nn.Conv2d(channels, reduced, 1), nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv_expand(self.conv_reduce(x.mean((2, 3), keepdim=True)).relu()))
