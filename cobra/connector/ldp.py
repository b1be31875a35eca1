"""Lightweight downsample projectors: an MLP on every cell, pooling to a quarter of the tokens, and a
depthwise convolution that tells a token where it is.

Of a grid of height x width cells they make ceil(height / 2) x ceil(width / 2) tokens, in raster order. The
two published shapes follow: 24 x 24 to 144 (MobileVLM V2), 27 x 27 to 196 (Cobra).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from .pointwise import mlp, widened_mlp


class HalvesGrid:
    """A Config whose connector makes one token of about 2 x 2 cells, in raster order."""

    def num_tokens(self, height: int, width: int) -> int:
        rows, columns = halved(height, width)
        return rows * columns


def halved(height: int, width: int) -> tuple[int, int]:
    """Rows and columns behind the pooling."""
    return -(-height // 2), -(-width // 2)


@dataclass(frozen=True, kw_only=True)
class LDPv2Config(HalvesGrid):
    kind: Literal["ldpv2"] = "ldpv2"


class LDPv2Connector(nn.Module):
    """Linear, GELU, linear; pooling; PEG.

    Source: Chu et al. 2024, "MobileVLM V2" (arXiv:2402.03766), LDPv2.
    """

    Config = LDPv2Config

    def __init__(self, config: LDPv2Config, d_vision: int, d_model: int) -> None:
        super().__init__()
        self.mlp = mlp(d_vision, d_model)
        self.peg = PEG(d_model)

    def forward(self, features: Tensor) -> Tensor:
        return self.peg(pool(self.mlp(features))).flatten(1, 2)


@dataclass(frozen=True, kw_only=True)
class FusedLDPConfig(HalvesGrid):
    kind: Literal["fused_ldp"] = "fused_ldp"


class FusedLDPConnector(nn.Module):
    """LDPv2 with a hidden width of four times the input (Cobra's "fused-ldpnet", for fused towers)."""

    Config = FusedLDPConfig

    def __init__(self, config: FusedLDPConfig, d_vision: int, d_model: int) -> None:
        super().__init__()
        self.mlp = widened_mlp(d_vision, d_model)
        self.peg = PEG(d_model)

    def forward(self, features: Tensor) -> Tensor:
        return self.peg(pool(self.mlp(features))).flatten(1, 2)


def pool(x: Tensor) -> Tensor:
    """Means of cells, (n, height, width, d) -> (n, ceil(height / 2), ceil(width / 2), d); where a side is
    odd, neighbouring means share cells."""
    pooled = nn.functional.adaptive_avg_pool2d(x.movedim(-1, 1), halved(*x.shape[1:3]))
    return pooled.movedim(1, -1)


class PEG(nn.Module):
    """x plus a depthwise convolution of 3 x 3 cells, on (n, height, width, d).

    Source: Chu et al. 2021, "Conditional Positional Encodings" (arXiv:2102.10882).
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(d, d, 3, padding=1, groups=d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.movedim(-1, 1)).movedim(1, -1)
