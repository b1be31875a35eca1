"""Blocks of Mamba-2 over a grid, along the visiting lists of a scan order: of scan connectors and of towers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

import vision_scan
from cobra.lm.mamba2 import Mamba2, Mamba2Config
from cobra.lm.precision import Projection, RMSNorm
from cobra.typed_config import require_positive
from vision_scan.errors import UserError
from vision_scan.orders import sequential_order
from vision_scan.precision import Float32Parameters, LayerNorm

# What becomes of the results of the lists, (n, K, height, width, d_inner), in front of the output projection.
COMBINATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y.sum(1),
    "mean": lambda y: y.mean(1),
    "gated": lambda y: y.sum(1),
    "concat": lambda y: y.movedim(1, -2).flatten(-2),
}

PLAIN_MIXER = {
    "d_ssm": None, "d_xb": None, "rmsnorm": True, "bias": False, "conv_bias": True, "conv_activation": "silu",
    "z_bias": False, "D_has_hdim": False, "discrete": False,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScanBlocksConfig:
    """Blocks that read a grid along a scan order.

    Attributes:
        order: scan order with one set of scan parameters per visiting list, for instance "cross4", "bi2".
        lists: what a list reads: all channels, as in VMamba; or a share of them, so that all lists together cost what
            one does, as in GroupMamba (the number of heads is then a multiple of the number of lists).
        combine: how the directions are put together, where each has all channels: summed, averaged, weighed by a gate
            that sees the cell (gated), or by an output projection of all their channels (concat).
        pre_norm: a norm in front of the mixer.
        swiglu: a gated feed-forward layer behind the mixer.
        depth: number of blocks.
        mixer: sizes of the Mamba-2 mixer.
    """

    order: str = "cross4"
    lists: Literal["all", "share"] = "all"
    combine: Literal["sum", "mean", "gated", "concat"] = "sum"
    pre_norm: bool = True
    swiglu: bool = True
    depth: int = 1
    mixer: Mamba2Config = field(default_factory=Mamba2Config)

    def __post_init__(self) -> None:
        example = sequential_order(self.order)  # an unknown name fails here, not at the first image
        require_positive(self, "depth")
        for name, allowed in (("combine", COMBINATIONS), ("lists", ("all", "share"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"scan blocks: {name} {getattr(self, name)!r} must be one of {', '.join(allowed)}")
        for name, usual in PLAIN_MIXER.items():
            if getattr(self.mixer, name) != usual:
                raise UserError(f"scan blocks: mixer.{name} must be {usual}, which is the default: leave it out")
        if self.lists == "share" and self.combine in ("gated", "concat"):
            raise UserError(
                f"scan blocks: combine {self.combine!r} needs lists of all channels, and under lists=share each has a "
                "share of them: set lists=all, or combine=sum"
            )
        if self.lists == "share" and example.merge == "scatter" and len(example) > 1:
            raise UserError(
                f"scan blocks: the lists of {self.order!r} hold different cells and cost what one does already; with a "
                "share each, cells would lack the other channels: set lists=all"
            )


class ScanBlock(nn.Module):
    """x + scan(norm(x)), then x + swiglu(norm(x)), on (n, height, width, d_model)."""

    def __init__(self, config: ScanBlocksConfig, d_model: int, depth: int) -> None:
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
    whose lists take turns. Heads that are shared out have the initial values that they would have under one list."""

    float32_parameters = ("dt_bias", "A_log", "D")

    def __init__(self, config: ScanBlocksConfig, d_model: int, depth: int) -> None:
        super().__init__()
        self.order, self.depth, self.combine, self.config = config.order, depth, config.combine, config.mixer
        K = len(sequential_order(config.order, depth))
        self.shares = S = K if config.lists == "share" else 1
        lists = [Mamba2(config.mixer, d_model) for _ in range(K // S)]
        self.d_inner, self.nheads = lists[0].d_ssm, lists[0].nheads
        if self.nheads % S or (S > 1 and config.mixer.ngroups > 1):
            raise UserError(
                f"scan blocks: {K} lists of {config.order!r} cannot share {self.nheads} heads in "
                f"{config.mixer.ngroups} groups; heads must be a multiple of the lists, in one group, or set lists=all"
            )
        self.in_proj, self.out_proj = lists[0].in_proj, lists[0].out_proj
        if self.combine == "concat":  # each list begins with the output projection that it would have alone
            self.out_proj = Projection(K * self.d_inner, d_model)
            self.out_proj.weight = nn.Parameter(torch.cat([m.out_proj.weight.detach() for m in lists], dim=1))
        self.gate = nn.Linear(d_model, K) if self.combine == "gated" else None
        self.norm = RMSNorm(self.d_inner, config.mixer.norm_eps)
        self.conv_weight = nn.Parameter(torch.cat([self._deal(m.conv1d.weight[:, 0].detach()) for m in lists]))
        self.conv_bias = nn.Parameter(torch.cat([self._deal(m.conv1d.bias.detach()) for m in lists]))
        for name in self.float32_parameters:
            stacked = torch.cat([getattr(m, name).detach().view(S, -1) for m in lists])
            self.register_parameter(name, nn.Parameter(stacked))

    def _deal(self, channels: Tensor) -> Tensor:
        """Of the channels of a convolution (d_inner + 2 d_state of every group, ...) those of each share: its part of
        the inner ones, and all of B's and C's."""
        inner, states = channels.split([self.d_inner, len(channels) - self.d_inner])
        inner, states = inner.unflatten(0, (self.shares, -1)), states.expand(self.shares, *states.shape)
        return torch.cat([inner, states], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        config, K = self.config, len(self.conv_bias)
        groups = config.ngroups * config.d_state
        z, inner, states, dt = self.in_proj(x).split([self.d_inner, self.d_inner, 2 * groups, self.nheads], dim=-1)
        if self.shares > 1:
            inner, dt = (part.unflatten(-1, (K, -1)).movedim(-2, 1) for part in (inner, dt))
            states = states[:, None].expand(-1, K, -1, -1, -1)
        else:
            dt = dt[:, None].expand(-1, K, -1, -1, -1)
        order = vision_scan.order(self.order, *x.shape[1:3], self.depth)
        xBC = torch.cat([inner, states], dim=-1)
        xBC = vision_scan.causal_conv1d_2d(xBC, self.conv_weight, self.conv_bias, "silu", order)
        inner, B, C = xBC.split([self.d_inner // self.shares, groups, groups], dim=-1)
        y = vision_scan.ssd_2d(
            inner.unflatten(-1, (-1, config.headdim)),
            dt,
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
        if self.shares > 1:
            y = y.movedim(1, -2).flatten(-2)[:, None]
        # The gate belongs to the cell, not to the direction; each direction that has all channels is normed on its own.
        y = vision_scan.gated_rmsnorm(
            y, self.norm.weight, z[:, None].expand_as(y), config.norm_eps,
            self.d_inner // config.ngroups, config.norm_before_gate,
        )  # fmt: skip
        if self.gate is not None:
            y = y * self.gate(x).sigmoid().movedim(-1, 1).unsqueeze(-1)
        return self.out_proj(COMBINATIONS[self.combine](y))
