"""VL-Mamba's connectors: a vision selective scan (VSS) over the grid, and linear maps around it.

Source: Qiao et al. 2024, "VL-Mamba" (arXiv:2403.13600). No code was released. The formulas of the two
variants are the paper's; what it leaves open is VMamba's here: the inside of the VSS module (its norm, its
gate, a selection for each direction) and the sum over directions. The paper's bidirectional scan (BSM) is the
order "bi2", its cross scan (CSM) "cross4".
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from vision_scan.modules import SS2D, SS2DConfig, VSSBlock
from vision_scan.orders import sequential_order
from vision_scan.precision import LayerNorm

from .pointwise import KeepsGrid, mlp


@dataclass(frozen=True, kw_only=True)
class VSSConfig(KeepsGrid):
    """What both variants have.

    Attributes:
        order: scan order with one set of scan parameters per visiting list, for instance "cross4", "bi2".
        mixer: sizes of the scan.
    """

    order: str = "cross4"
    mixer: SS2DConfig = field(default_factory=SS2DConfig)

    def __post_init__(self) -> None:
        sequential_order(self.order)  # an unknown name fails here, not at the first image


@dataclass(frozen=True, kw_only=True)
class VSSMLPConfig(VSSConfig):
    kind: Literal["vss_mlp"] = "vss_mlp"


class VSSMLPConnector(nn.Module):
    """MLP(norm(V + VSS(V))) of the features V; the scan is as wide as they are, the MLP has two layers."""

    Config = VSSMLPConfig

    def __init__(self, config: VSSMLPConfig, d_vision: int, d_model: int) -> None:
        super().__init__()
        self.block = VSSBlock(config.mixer, d_vision, config.order, mlp_ratio=0)
        self.norm = LayerNorm(d_vision)
        self.mlp = mlp(d_vision, d_model)

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(self.norm(self.block(features)).flatten(1, 2))


@dataclass(frozen=True, kw_only=True)
class VSSL2Config(VSSConfig):
    kind: Literal["vss_l2"] = "vss_l2"


class VSSL2Connector(nn.Module):
    """linear(norm(V' + VSS(GELU(V')))) with V' = linear(V) of the features V; the scan is as wide as the
    tokens."""

    Config = VSSL2Config

    def __init__(self, config: VSSL2Config, d_vision: int, d_model: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_vision, d_model)
        # Not a VSSBlock: what is added begins before the GELU.
        self.scan = nn.Sequential(nn.GELU(), LayerNorm(d_model), SS2D(config.mixer, d_model, config.order))
        self.norm = LayerNorm(d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, features: Tensor) -> Tensor:
        x = self.in_proj(features)
        return self.out_proj(self.norm(x + self.scan(x)).flatten(1, 2))
