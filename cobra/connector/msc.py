"""ML-Mamba's connector: Mamba-2 along the visiting lists of a scan order."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

import vision_scan
from cobra.lm.mamba2 import Mamba2, Mamba2Config
from cobra.lm.precision import RMSNorm
from cobra.typed_config import require_positive
from vision_scan.errors import UserError
from vision_scan.orders import sequential_order
from vision_scan.precision import Float32Parameters, LayerNorm

from .pointwise import KeepsGrid, fused_mlp


@dataclass(frozen=True, kw_only=True)
class MSCConfig(KeepsGrid):
    """ML-Mamba's Mamba-2 scan connector.

    Attributes:
        order: scan order with one set of scan parameters per visiting list, for instance "cross4", "bi2".
        combine: how the directions are put together.
        pre_norm: a norm in front of the mixer (in the paper's figure; not in the released code).
        swiglu: a gated feed-forward layer behind the mixer.
        depth: number of blocks.
        projector: what follows the blocks.
        mixer: sizes of the Mamba-2 mixer.
    """

    kind: Literal["msc"] = "msc"
    order: str = "cross4"
    combine: Literal["sum", "mean"] = "sum"
    pre_norm: bool = True
    swiglu: bool = True
    depth: int = 1
    projector: Literal["linear", "fused_mlp"] = "linear"
    mixer: Mamba2Config = field(default_factory=Mamba2Config)

    def __post_init__(self) -> None:
        sequential_order(self.order)  # an unknown name fails here, not at the first image
        require_positive(self, "depth")
        for name, allowed in (("combine", ("sum", "mean")), ("projector", ("linear", "fused_mlp"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"msc: {name} {getattr(self, name)!r} must be one of {', '.join(allowed)}")


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


class ScanBlock(nn.Module):
    """x + scan(norm(x)), then x + swiglu(norm(x)), on (n, height, width, d_model)."""

    def __init__(self, config: MSCConfig, d_model: int, depth: int) -> None:
        super().__init__()
        self.pre_norm = LayerNorm(d_model) if config.pre_norm else nn.Identity()
        self.mixer = ScanMixer(config, d_model, depth)
        self.norm, self.mlp = None, None
        if config.swiglu:
            self.norm, self.mlp = LayerNorm(d_model), SwiGLU(d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.pre_norm(x))
        return x if self.mlp is None else x + self.mlp(self.norm(x))


class SwiGLU(nn.Module):
    """w3(SiLU(w1 x) * w2 x), all of the same width, with biases."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(nn.functional.silu(self.w1(x)) * self.w2(x))


class ScanMixer(Float32Parameters):
    """Mamba-2 along every visiting list of an order: projections and norm are shared, each list has its
    own convolution, dt_bias, A_log and D (stacked on the first axis). `depth` is the number of the block, for orders
    whose lists take turns."""

    float32_parameters = ("dt_bias", "A_log", "D")

    def __init__(self, config: MSCConfig, d_model: int, depth: int) -> None:
        super().__init__()
        self.order, self.depth, self.combine, self.config = config.order, depth, config.combine, config.mixer
        K = len(sequential_order(config.order, depth))
        lists = [Mamba2(config.mixer, d_model) for _ in range(K)]
        self.d_inner, self.nheads = lists[0].d_inner, lists[0].nheads
        self.in_proj, self.out_proj = lists[0].in_proj, lists[0].out_proj
        self.norm = RMSNorm(self.d_inner, config.mixer.norm_eps)
        self.conv_weight = nn.Parameter(torch.stack([m.conv1d.weight[:, 0].detach() for m in lists]))
        self.conv_bias = nn.Parameter(torch.stack([m.conv1d.bias.detach() for m in lists]))
        for name in self.float32_parameters:
            self.register_parameter(
                name, nn.Parameter(torch.stack([getattr(m, name).detach() for m in lists]))
            )

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        channels, groups = self.conv_bias.shape[1], config.ngroups * config.d_state
        z, xBC, dt = self.in_proj(x).split([self.d_inner, channels, self.nheads], dim=-1)
        order = vision_scan.order(self.order, *x.shape[1:3], self.depth)
        xBC = vision_scan.causal_conv1d_2d(xBC, self.conv_weight, self.conv_bias, "silu", order)
        inner, B, C = xBC.split([self.d_inner, groups, groups], dim=-1)
        y = vision_scan.ssd_2d(
            inner.unflatten(-1, (self.nheads, config.headdim)),
            dt[:, None].expand(-1, len(order), -1, -1, -1),
            -torch.exp(self.A_log),
            B.unflatten(-1, (config.ngroups, config.d_state)),
            C.unflatten(-1, (config.ngroups, config.d_state)),
            self.D,
            self.dt_bias,
            dt_softplus=True,
            dt_limit=config.dt_limit,
            order=order,
            merge="concat",
            chunk_size=config.chunk_size,
        ).flatten(-2)
        # The gate belongs to the cell, not to the direction; each direction is normed on its own.
        y = vision_scan.gated_rmsnorm(
            y, self.norm.weight, z[:, None].expand_as(y), config.norm_eps,
            self.d_inner // config.ngroups, config.norm_before_gate,
        )  # fmt: skip
        return self.out_proj(y.sum(1) if self.combine == "sum" else y.mean(1))
