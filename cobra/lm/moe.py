"""A mixture of experts: each token goes through a few of many feed-forward layers, which a router chooses.

Source: Shazeer et al. 2017 (arXiv:1701.06538); shared experts and the sigmoid router with a correction of its scores:
DeepSeek-AI 2024 (arXiv:2412.19437); experts in fewer channels: Nemotron 3 (NVIDIA 2025). Nothing here balances the
load of the experts in training.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cobra.typed_config import require_positive
from vision_scan.errors import UserError, choose
from vision_scan.precision import Float32Parameters

from .mixer import LayerCost, LayerState, Segments
from .mlp import MLP, MLPConfig
from .precision import Projection


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Experts of d_ff channels each, of which a token goes through `top_k`.

    Attributes:
        activation, gated: of the experts, see MLPConfig.
        scores: how the router's logits become weights, over all experts: by a softmax, or the sigmoid of each, to
            which a learned correction is added where experts are chosen (not where they are weighed).
        norm_topk: whether the weights of the chosen are divided by their sum.
        routed_scale: what they are multiplied by then.
        num_groups, top_groups: experts are chosen among the `top_groups` of `num_groups` groups whose two best
            experts have most together.
        shared_d_ff: channels of the expert that every token goes through; 0: there is none.
        shared_gate: whether it has a gate, the sigmoid of a number that a projection gives.
        d_latent: channels that the other experts read and write, between two projections; None: d_model.
    """

    kind: Literal["moe"] = "moe"
    num_experts: int
    top_k: int
    d_ff: int
    activation: str = "silu"
    gated: bool = True
    scores: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk: bool = True
    routed_scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    shared_d_ff: int = 0
    shared_gate: bool = False
    d_latent: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "num_experts", "top_k", "num_groups", "top_groups")
        if self.d_latent is not None:
            require_positive(self, "d_latent")
        self.expert(self.d_ff)  # its own checks
        choose("moe: scores", self.scores, dict.fromkeys(("softmax", "sigmoid")))
        per_group, rest = divmod(self.num_experts, self.num_groups)
        if rest or self.top_groups > self.num_groups or self.top_k > self.top_groups * per_group:
            raise UserError(
                f"moe: top_k {self.top_k} of {self.num_experts} experts in {self.top_groups} of {self.num_groups} "
                "groups: groups must be of one size, and have as many experts as are chosen"
            )
        if self.shared_d_ff < 0 or (self.shared_gate and not self.shared_d_ff):
            raise UserError(
                f"moe: shared_d_ff {self.shared_d_ff} must be 0 or more, and above 0 for a shared_gate"
            )

    def expert(self, d_ff: int) -> MLPConfig:
        return MLPConfig(d_ff=d_ff, activation=self.activation, gated=self.gated)

    def cost(self, d_model: int) -> LayerCost:
        d = self.d_latent or d_model
        expert = self.expert(self.d_ff).cost(d)
        common = LayerCost(parameters=self.num_experts * d_model, flops_per_token=2 * self.num_experts * d_model)
        if self.d_latent is not None:
            common += LayerCost(parameters=2 * d_model * d, flops_per_token=4 * d_model * d)
        if self.shared_d_ff:
            common += self.expert(self.shared_d_ff).cost(d_model)
        if self.shared_gate:
            common += LayerCost(parameters=d_model, flops_per_token=2 * d_model)
        return LayerCost(
            parameters=common.parameters + self.num_experts * expert.parameters,
            flops_per_token=common.flops_per_token + self.top_k * expert.flops_per_token,
            idle_parameters=(self.num_experts - self.top_k) * expert.parameters,
        )


class Router(Float32Parameters):
    """Which experts a token goes through, and with which weights, computed in float32."""

    float32_parameters = ("weight",)

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, d_model).normal_(std=d_model**-0.5))
        if config.scores == "sigmoid":
            self.register_buffer("correction", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (tokens, d_model) -> numbers of experts and weights, (tokens, top_k) each."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.to(self.weight.dtype), self.weight)
        if config.scores == "softmax":
            weights = merits = logits.softmax(-1)
        else:
            weights = logits.sigmoid()
            merits = weights + self.correction.to(weights.dtype)
        if config.top_groups < config.num_groups:
            groups = merits.unflatten(-1, (config.num_groups, -1))
            best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1).topk(config.top_groups, dim=-1).indices
            is_open = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=x.device).scatter(-1, best, True)
            merits = groups.masked_fill(~is_open[..., None], -torch.inf).flatten(-2)
        chosen = merits.topk(config.top_k, dim=-1).indices
        weights = weights.gather(-1, chosen)
        if config.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights * config.routed_scale


class MoE(nn.Module):
    """See the contract in mixer.py. It has no state."""

    Config = MoEConfig
    reads_shards = True

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        d = config.d_latent or d_model
        self.router = Router(config, d_model)
        self.experts = nn.ModuleList(MLP(config.expert(config.d_ff), d) for _ in range(config.num_experts))
        self.shared = MLP(config.expert(config.shared_d_ff), d_model) if config.shared_d_ff else None
        self.shared_gate = Projection(d_model, 1) if config.shared_gate else None
        self.down_proj = Projection(d_model, d) if config.d_latent else None
        self.up_proj = Projection(d, d_model) if config.d_latent else None

    def allocate(self, batch: int, capacity: int, device, dtype) -> LayerState:
        return {}

    def forward(self, x: Tensor, state: LayerState | None, segments: Segments) -> tuple[Tensor, LayerState]:
        tokens = x.flatten(0, 1)
        chosen, weights = self.router(tokens)
        inner = tokens if self.down_proj is None else self.down_proj(tokens)
        y = torch.zeros_like(inner)
        for number in chosen.unique().tolist():
            rows, place = (chosen == number).nonzero(as_tuple=True)
            out, _ = self.experts[number](inner[rows], None, segments)
            y = y.index_add(0, rows, (out * weights[rows, place, None].to(out.dtype)).to(y.dtype))
        if self.up_proj is not None:
            y = self.up_proj(y)
        if self.shared is not None:
            shared, _ = self.shared(tokens, None, segments)
            y = y + (shared if self.shared_gate is None else self.shared_gate(tokens).sigmoid() * shared)
        return y.view_as(x), {}
