"""Connectors that look at one cell at a time."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn


class KeepsGrid:
    """A Config whose connector makes one token of each cell, in raster order."""

    def num_tokens(self, height: int, width: int) -> int:
        return height * width


class PointwiseConfig(KeepsGrid):
    """A Config whose connector looks at one cell at a time, wherever it stands."""


@dataclass(frozen=True, kw_only=True)
class LinearConfig(PointwiseConfig):
    kind: Literal["linear"] = "linear"


class LinearConnector(nn.Module):
    """One linear map (LLaVA 1)."""

    Config = LinearConfig

    def __init__(self, config: LinearConfig, d_vision: int, d_model: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_vision, d_model)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features.flatten(1, 2))


@dataclass(frozen=True, kw_only=True)
class MLPConfig(PointwiseConfig):
    kind: Literal["mlp"] = "mlp"


class MLPConnector(nn.Module):
    """Linear, GELU, linear (LLaVA 1.5)."""

    Config = MLPConfig

    def __init__(self, config: MLPConfig, d_vision: int, d_model: int) -> None:
        super().__init__()
        self.proj = mlp(d_vision, d_model)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features.flatten(1, 2))


@dataclass(frozen=True, kw_only=True)
class FusedMLPConfig(PointwiseConfig):
    kind: Literal["fused_mlp"] = "fused_mlp"


class FusedMLPConnector(nn.Module):
    """Three linear maps with a hidden width of four times the input (Cobra's, for fused towers)."""

    Config = FusedMLPConfig

    def __init__(self, config: FusedMLPConfig, d_vision: int, d_model: int) -> None:
        super().__init__()
        self.proj = fused_mlp(d_vision, d_model)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features.flatten(1, 2))


def mlp(d_in: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, d_out), nn.GELU(), nn.Linear(d_out, d_out))


def widened_mlp(d_in: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, 4 * d_in), nn.GELU(), nn.Linear(4 * d_in, d_out))


def fused_mlp(d_in: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(*widened_mlp(d_in, d_out), nn.GELU(), nn.Linear(d_out, d_out))
