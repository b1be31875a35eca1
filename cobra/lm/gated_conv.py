"""The gated short convolution of LFM2: a layer that remembers a few tokens.

Source: Liquid AI 2025, "LFM2 Technical Report" (arXiv:2511.23404); names as in transformers' Lfm2.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cobra.typed_config import require_positive

from .mixer import UPDATE_TOKENS, LayerCost, LayerState, Segments
from .precision import Projection
from .short_conv import ShortConvolution


@dataclass(frozen=True, kw_only=True)
class GatedConvConfig:
    """out(C * conv(B * x)), with B, C and x from one projection and a convolution over d_conv tokens of each channel.

    Attributes:
        bias: of the projections and the convolution.
    """

    kind: Literal["gated_conv"] = "gated_conv"
    d_conv: int = 3
    bias: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "d_conv")

    def cost(self, d_model: int) -> LayerCost:
        projections = 4 * d_model**2
        return LayerCost(
            parameters=projections + d_model * self.d_conv + self.bias * 5 * d_model,
            flops_per_token=2 * projections + 2 * d_model * (self.d_conv + 1),
            tail_elements=d_model * (self.d_conv - 1),
        )


class GatedConv(nn.Module):
    """See the contract in mixer.py. State: `conv` (batch, d_model, d_conv - 1) in the model's dtype."""

    Config = GatedConvConfig
    residual_projection = "out_proj"
    reads_shards = True

    def __init__(self, config: GatedConvConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.in_proj = Projection(d_model, 3 * d_model, config.bias)
        self.conv = ShortConvolution(d_model, config.d_conv, config.bias, activation=None)
        self.out_proj = Projection(d_model, d_model, config.bias)
        nn.init.normal_(self.in_proj.weight, std=d_model**-0.5)  # of unit size, as an attention layer's
        self.conv.start_near_identity()

    def allocate(self, batch: int, capacity: int, device, dtype) -> LayerState:
        return {"conv": torch.zeros(batch, len(self.conv.weight), self.config.d_conv - 1, device=device, dtype=dtype)}

    def forward(self, x: Tensor, state: LayerState | None, segments: Segments) -> tuple[Tensor, LayerState]:
        B, C, x = self.in_proj(x).transpose(1, 2).chunk(3, dim=1)
        if state is not None and segments.overwrite and x.shape[2] <= UPDATE_TOKENS:
            y, tail = self.conv.update(B * x, state["conv"], segments), state["conv"]
        else:
            y, tail = self.conv.scan(B * x, None if state is None else state["conv"], segments)
        return self.out_proj((C * y).transpose(1, 2)), {"conv": tail}
