"""GroupMamba's modulated layer: each quarter of the channels is scanned in one direction of its own.

Source: Shaker et al. 2024, "GroupMamba: Parameter-Efficient and Accurate Group Visual State Space Model"
(arXiv:2407.13772); names and shapes of parameters as in its released code (Amshaker/GroupMamba, groupmamba.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

from vision_scan.errors import UserError
from vision_scan.precision import LayerNorm

from .ss2d import SS2D, SS2DConfig

GROUP = SS2DConfig(d_state=1, expand=1.0)
DIRECTIONS = ("raster", "column", "raster_rev", "column_rev")


class GroupMambaLayer(nn.Module):
    """Of n = norm(x): SS2D of each chunk of channels along its own order, times n and a learned scalar, times a
    gate per channel made of the mean cell of n; the same norm again; a linear map.

    Args:
        d_model: channels in and out.
        config: sizes of the scans, each d_model / 4 wide.
        orders: one scan order for each chunk of channels, in order.
        reduction: the gate goes through d_model / reduction channels, rounded down.
    Raises:
        UserError: on an unknown order, or if d_model does not divide into the chunks or the gate has no channel.
    """

    def __init__(
        self,
        d_model: int,
        config: SS2DConfig = GROUP,
        orders: Sequence[str] = DIRECTIONS,
        reduction: int = 16,
    ) -> None:
        super().__init__()
        if not orders or d_model % len(orders) or d_model < reduction:
            raise UserError(
                f"GroupMamba: d_model {d_model} must be a multiple of the {len(orders)} orders, and {reduction} or more"
            )
        self.num_groups = len(orders)
        self.norm = LayerNorm(d_model)
        self.fc1, self.fc2 = nn.Linear(d_model, d_model // reduction), nn.Linear(d_model // reduction, d_model)
        for group, order in enumerate(orders, start=1):
            setattr(self, f"mamba_g{group}", SS2D(config, d_model // len(orders), order))
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, d_model) -> the same shape and dtype."""
        n = self.norm(x)
        gate = torch.sigmoid(self.fc2(relu(self.fc1(n.mean((1, 2), keepdim=True)))))
        chunks = enumerate(n.chunk(self.num_groups, dim=-1), start=1)
        y = torch.cat([getattr(self, f"mamba_g{group}")(chunk) for group, chunk in chunks], dim=-1)
        return self.proj(self.norm(y * self.skip_scale * n * gate))


class GroupMambaBlock(nn.Module):
    """x + layer(x), then x + MLP(norm(x)), whose hidden channels pass a depthwise convolution.

    Args:
        d_model, config, orders: as of GroupMambaLayer.
        mlp_ratio: hidden channels of the MLP, in d_model.
    """

    def __init__(
        self,
        d_model: int,
        config: SS2DConfig = GROUP,
        orders: Sequence[str] = DIRECTIONS,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.attn = GroupMambaLayer(d_model, config, orders)
        self.norm2 = LayerNorm(d_model, eps=1e-6)
        self.mlp = ConvMLP(d_model, int(mlp_ratio * d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, d_model) -> the same shape and dtype."""
        x = x + self.attn(x)
        return x + self.mlp(self.norm2(x))


class ConvMLP(nn.Module):
    """Linear, depthwise 3 x 3 convolution, GELU, linear; channels last."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(d_ff, d_ff, 3, padding=1, groups=d_ff)})

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x).movedim(-1, 1)
        return self.fc2(gelu(self.dwconv["dwconv"](hidden).movedim(1, -1)))
