"""ES2D, an atrous selective scan, and the EVSS block around it: a scan and a convolution side by side.

Source: Pei et al. 2024, "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba" (arXiv:2403.09977);
names and shapes of parameters as in its released code (TerryPei/EfficientVMamba, vmamba_efficient.py).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from vision_scan.errors import UserError
from vision_scan.precision import BatchNorm2d, LayerNorm

from .ss2d import MLP, SS2D, SS2DConfig


class ES2D(SS2D):
    """SS2D over disjoint sub-grids of every `step`-th row and column, so that each cell is scanned once.

    A grid that the step does not divide is padded with zeros at the bottom and right for the scan, as the authors
    do: the state decays at a padded cell, where the order's own pads would let it pass.

    Args:
        config, d_model: as of SS2D.
        step: distance of neighbours within a sub-grid; the authors' code is right for 2 alone.
    Raises:
        UserError: if the step is below 1.
    """

    def __init__(self, config: SS2DConfig, d_model: int, step: int = 2) -> None:
        if step < 1:
            raise UserError(f"ES2D: step {step} must be 1 or more")
        super().__init__(config, d_model, f"es2d(step={step})")
        self.step = step

    def _scan(self, u: Tensor) -> Tensor:
        height, width = u.shape[1:3]
        padded = pad(u, (0, 0, 0, -width % self.step, 0, -height % self.step))
        return super()._scan(padded)[:, :height, :width]


class EVSSBlock(nn.Module):
    """x + gate(ES2D(n)) + gate(conv(n)) with n = norm(x) and one gate for both; then x + MLP(norm(x)).

    Args:
        config, d_model, step: as of ES2D.
        mlp_ratio: hidden channels of the MLP, in d_model; 0, as in the released models: there is none.
    """

    def __init__(self, config: SS2DConfig, d_model: int, step: int = 2, mlp_ratio: float = 0.0) -> None:
        super().__init__()
        self.norm = LayerNorm(d_model)
        self.op = ES2D(config, d_model, step)
        self.conv_branch = nn.Sequential(
            nn.Conv2d(d_model, d_model, 3, padding=1, groups=d_model),
            BatchNorm2d(d_model),
            nn.GELU(),
            nn.Conv2d(d_model, d_model, 1),
        )
        self.se = ChannelGate(d_model)
        self.norm2, self.mlp = None, None
        if mlp_ratio > 0:
            self.norm2, self.mlp = LayerNorm(d_model), MLP(d_model, int(mlp_ratio * d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, d_model) -> the same shape and dtype."""
        n = self.norm(x)
        x = x + self.se(self.op(n)) + self.se(self.conv_branch(n.movedim(-1, 1)).movedim(1, -1))
        return x if self.mlp is None else x + self.mlp(self.norm2(x))


class ChannelGate(nn.Module):
    """x times a gate per channel that is made of the mean cell of norm(x): the authors' BiAttn.

    Raises:
        UserError: if an eighth of the channels is none.
    """

    def __init__(self, d_model: int, reduction: int = 8) -> None:
        super().__init__()
        if d_model < reduction:
            raise UserError(f"EVSS: d_model {d_model} must be {reduction} or more, the gate has d_model / {reduction}")
        self.norm = LayerNorm(d_model)
        self.global_reduce = nn.Linear(d_model, d_model // reduction)
        self.channel_select = nn.Linear(d_model // reduction, d_model)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.norm(x).mean((1, 2), keepdim=True)
        return x * torch.sigmoid(self.channel_select(gelu(self.global_reduce(mean))))
