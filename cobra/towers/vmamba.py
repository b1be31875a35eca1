"""VMamba's final models: VSS blocks without a gate, strided convolutions between the stages.

Source: Liu et al. 2024, "VMamba: Visual State Space Model" (arXiv:2401.10166); sizes, names and shapes after the
released configurations and code (MzeroMiko/VMamba: vmambav2v_tiny_224, vmambav2_small_224, vmambav2_base_224).
"""

import itertools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from vision_scan.modules import VMAMBA, SS2DConfig, VSSBlock
from vision_scan.orders import sequential_order
from vision_scan.precision import LayerNorm

from .tower import StagesConfig, ToChannelsFirst, ToChannelsLast, Tower, halved

S2 = SS2DConfig(d_state=1, expand=2.0, conv_bias=False, has_gate=False)


@dataclass(frozen=True, kw_only=True)
class VMambaConfig(StagesConfig):
    """The defaults are VMamba-T's (s1l8); any scan order of whole grids serves, the released models have cross4."""

    kind: Literal["vmamba"] = "vmamba"
    dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 8, 2)
    mixer: SS2DConfig = VMAMBA
    order: str = "cross4"
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        sequential_order(self.order)  # an unknown name fails here, not when the model is built

    def grid(self, height: int, width: int) -> tuple[int, int]:
        times = 1 + len(self.dims)
        return halved(height, times), halved(width, times)


class VMamba(Tower):
    """VMamba-T (s1l8), -S and -B (s2l15): images of any size, a cell for each 32 x 32 pixels begun.

    Checked: the number of parameters, head included, is the authors' to the last one; names and shapes are those
    that the released code makes. No released file has been read.
    """

    Config = VMambaConfig
    RELEASED: ClassVar[Mapping[str, StagesConfig]] = {
        "vmamba-t": VMambaConfig(),
        "vmamba-s": VMambaConfig(depths=(2, 2, 15, 2), mixer=S2),
        "vmamba-b": VMambaConfig(dims=(128, 256, 512, 1024), depths=(2, 2, 15, 2), mixer=S2),
    }
    head_names = ("classifier", "norm", "head")

    def build(self, config: VMambaConfig) -> None:
        first = config.dims[0]
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, first // 2, 3, stride=2, padding=1),
            ToChannelsLast(),
            LayerNorm(first // 2),
            ToChannelsFirst(),
            nn.GELU(),
            nn.Conv2d(first // 2, first, 3, stride=2, padding=1),
            ToChannelsLast(),
            LayerNorm(first),
        )
        wider = [*map(_downsample, config.dims, config.dims[1:]), nn.Identity()]
        self.layers = nn.Sequential()
        numbers = itertools.count()  # of blocks, through all stages
        for dim, depth, downsample in zip(config.dims, config.depths, wider, strict=True):
            blocks = [
                VSSBlock(config.mixer, dim, config.order, config.mlp_ratio, next(numbers)) for _ in range(depth)
            ]
            self.layers.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks), downsample=downsample)))

    def features(self, pixels: Tensor) -> Tensor:
        return self.layers(self.patch_embed(pixels))


def _downsample(dim: int, wider: int) -> nn.Module:
    conv = nn.Conv2d(dim, wider, 3, stride=2, padding=1)
    return nn.Sequential(ToChannelsFirst(), conv, ToChannelsLast(), LayerNorm(wider))
