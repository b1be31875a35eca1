"""OmniVLM's connectors: several cells side by side in the channels of one token, and an MLP on it.

Source: Chen et al. 2024, "OmniVLM" (arXiv:2412.11475), 27 x 27 cells to 81 tokens. The paper does not say which
cells make a token, so there are both readings: `space_to_depth` takes windows of the grid, `reshape` what stands
together in raster order.

Where a grid or its sequence does not divide, zeros fill it up, at the bottom, the right or the end. They stand in the
same channels of the same tokens in every picture, so the MLP can tell them from content, and any image size that a
tower takes can be trained and compared with other connectors.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import pad

from cobra.typed_config import require_positive

from .pointwise import mlp


@dataclass(frozen=True, kw_only=True)
class SpaceToDepthConfig:
    """A token of each window of factor x factor cells, in raster order of the windows."""

    kind: Literal["space_to_depth"] = "space_to_depth"
    factor: int = 3

    def __post_init__(self) -> None:
        require_positive(self, "factor")

    def num_tokens(self, height: int, width: int) -> int:
        return -(-height // self.factor) * -(-width // self.factor)


class SpaceToDepthConnector(nn.Module):
    """mlp of the concatenated cells of a window, row by row."""

    Config = SpaceToDepthConfig

    def __init__(self, config: SpaceToDepthConfig, d_vision: int, d_model: int) -> None:
        super().__init__()
        self.factor = config.factor
        self.mlp = mlp(config.factor**2 * d_vision, d_model)

    def forward(self, features: Tensor) -> Tensor:
        height, width = features.shape[1:3]
        x = pad(features, (0, 0, 0, -width % self.factor, 0, -height % self.factor))
        # (n, rows, row in the window, columns, column in the window, d_vision), the windows' rows and columns in front
        windows = x.unflatten(2, (-1, self.factor)).unflatten(1, (-1, self.factor)).transpose(2, 3)
        return self.mlp(windows.flatten(1, 2).flatten(2))


@dataclass(frozen=True, kw_only=True)
class ReshapeConfig:
    """A token of each factor x factor cells that follow one another in raster order."""

    kind: Literal["reshape"] = "reshape"
    factor: int = 3

    def __post_init__(self) -> None:
        require_positive(self, "factor")

    def num_tokens(self, height: int, width: int) -> int:
        return -(-height * width // self.factor**2)


class ReshapeConnector(nn.Module):
    """mlp of the concatenated cells."""

    Config = ReshapeConfig

    def __init__(self, config: ReshapeConfig, d_vision: int, d_model: int) -> None:
        super().__init__()
        self.size = config.factor**2
        self.mlp = mlp(self.size * d_vision, d_model)

    def forward(self, features: Tensor) -> Tensor:
        cells = features.flatten(1, 2)
        x = pad(cells, (0, 0, 0, -cells.shape[1] % self.size))
        return self.mlp(x.unflatten(1, (-1, self.size)).flatten(2))
