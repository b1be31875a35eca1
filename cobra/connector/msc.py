"""ML-Mamba's connector: Mamba-2 along the visiting lists of a scan order."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from cobra.scan_block import ScanBlock, ScanBlocksConfig
from vision_scan.errors import UserError
from vision_scan.precision import LayerNorm

from .pointwise import KeepsGrid, fused_mlp


@dataclass(frozen=True, kw_only=True)
class MSCConfig(ScanBlocksConfig, KeepsGrid):
    """ML-Mamba's Mamba-2 scan connector; its paper's figure has `pre_norm`, its released code has not.

    Attributes:
        projector: what follows the blocks.
    """

    kind: Literal["msc"] = "msc"
    projector: Literal["linear", "fused_mlp"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projector not in ("linear", "fused_mlp"):
            raise UserError(f"msc: projector {self.projector!r} must be one of linear, fused_mlp")


class MSCConnector(nn.Module):
    """Linear and GELU, blocks of 2-D Mamba-2 scans, norm, projector.

    Source: Huang et al. 2024, "ML-Mamba" (arXiv:2407.19832); presets as released and as drawn differ.
    """

    Config = MSCConfig

    def __init__(self, config: MSCConfig, d_vision: int, d_model: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d_vision, d_model), nn.GELU())
        self.blocks = nn.ModuleList(ScanBlock(config, d_model, depth) for depth in range(config.depth))
        self.norm_f = LayerNorm(d_model)
        fused = config.projector == "fused_mlp"
        self.projector = fused_mlp(d_model, d_model) if fused else nn.Linear(d_model, d_model)

    def forward(self, features: Tensor) -> Tensor:
        x = self.mlp(features)
        for block in self.blocks:
            x = block(x)
        return self.projector(self.norm_f(x).flatten(1, 2))
