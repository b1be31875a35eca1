"""LongLLaVA's connector: the map of features made smaller by interpolation, and an MLP on what is left."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import interpolate

from cobra.typed_config import require_positive
from vision_scan.errors import UserError

from .pointwise import mlp


@dataclass(frozen=True, kw_only=True)
class Pool2dConfig:
    """Of height x width cells, ceil(height / factor) x ceil(width / factor) tokens in raster order.

    Attributes:
        factor: how much smaller each side becomes; 2 makes the published 24 x 24 to 12 x 12.
        mode: "2d" interpolates the map, bilinearly; "1d" its cells as one raster sequence, linearly, to as many
            tokens.
    """

    kind: Literal["pool2d"] = "pool2d"
    factor: int = 2
    mode: Literal["2d", "1d"] = "2d"

    def __post_init__(self) -> None:
        require_positive(self, "factor")
        if self.mode not in ("2d", "1d"):
            raise UserError(f"pool2d: mode {self.mode!r} must be one of 2d, 1d")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns behind the pooling."""
        return -(-height // self.factor), -(-width // self.factor)

    def num_tokens(self, height: int, width: int) -> int:
        rows, columns = self.size(height, width)
        return rows * columns


class Pool2dConnector(nn.Module):
    """Interpolation, then linear, GELU, linear.

    A point lies where its cell's centre does (align_corners False) and is read off its nearest cells, without
    a filter: at factor 2 that is the mean of 2 x 2 cells, at larger ones some cells are not seen, and so it is
    along the sequence, where four cells make a token of which the two in the middle are read.

    Source: Wang et al. 2024, "LongLLaVA" (arXiv:2409.02889); its first stage trains with "1d", the others with "2d".
    """

    Config = Pool2dConfig

    def __init__(self, config: Pool2dConfig, d_vision: int, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.mlp = mlp(d_vision, d_model)

    def forward(self, features: Tensor) -> Tensor:
        grid = features.shape[1:3]
        if self.config.mode == "2d":
            x = interpolate(features.movedim(-1, 1), self.config.size(*grid), mode="bilinear").flatten(2)
        else:
            x = interpolate(features.flatten(1, 2).mT, self.config.num_tokens(*grid), mode="linear")
        return self.mlp(x.mT)
