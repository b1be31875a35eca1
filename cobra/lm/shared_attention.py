"""Mamba-2 that reads, beside the residual stream, what a transformer block makes of it; layers share the weights of the
block.

The block reads the stream together with the embeddings that the tokens came with. Each layer that uses it adds low-rank
matrices of its own to the block's projections and projects what comes out; this is added to what the layer's Mamba-2
reads, not to the stream.

Source: Zamba (Glorioso et al. 2024, arXiv:2405.16712) and Zamba2 (2024, arXiv:2411.15242).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vision_scan.errors import UserError

from .attention import Attention, AttentionConfig, allocate_cache
from .mamba2 import Mamba2, Mamba2Config
from .mixer import LayerCost, LayerState, Segments
from .mlp import ACTIVATIONS, MLP, MLPConfig
from .parallel import join, part_of
from .precision import Projection, RMSNorm


@dataclass(frozen=True, kw_only=True)
class SharedBlockConfig:
    """Attention over 2 * d_model channels and, behind it without a residual connection, a feed-forward layer, with a
    norm in front of each."""

    attention: AttentionConfig
    mlp: MLPConfig
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.attention.gated or not self.mlp.gated:
            raise UserError("shared_attention: attention.gated must be false in a shared block, and mlp.gated true")

    def cost(self, d_model: int) -> LayerCost:
        norms = LayerCost(parameters=3 * d_model, flops_per_token=0)
        return self.attention.cost(2 * d_model, d_model) + self.mlp.cost(d_model) + norms


@dataclass(frozen=True, kw_only=True)
class SharedAttentionConfig:
    """Mamba-2 with a shared block in front.

    Attributes:
        block: number of the block, from 0; layers of one number have one, and say the same of it.
        shared: what the block is.
        mamba: behind it.
        attention_rank: of what the layer adds to the projections of queries, keys and values; 0: nothing.
        mlp_rank: of what it adds to the projections into the feed-forward layer; 0: nothing.
    """

    kind: Literal["shared_attention"] = "shared_attention"
    block: int = 0
    shared: SharedBlockConfig
    mamba: Mamba2Config
    attention_rank: int = 0
    mlp_rank: int = 0

    def __post_init__(self) -> None:
        if min(self.attention_rank, self.mlp_rank) < 0:
            raise UserError(
                f"shared_attention: attention_rank {self.attention_rank} and mlp_rank {self.mlp_rank} must be 0 or more"
            )

    def added(self, d_model: int) -> dict[str, tuple[int, int, int]]:
        """Channels in, rank and channels out of what is added to projections, by name."""
        attention, wide = self.shared.attention, 2 * d_model
        queries, keys = attention.num_heads * attention.headdim, attention.num_kv_heads * attention.headdim
        sizes = {
            "q": (wide, self.attention_rank, queries),
            "k": (wide, self.attention_rank, keys),
            "v": (wide, self.attention_rank, keys),
            "gate_up": (d_model, self.mlp_rank, 2 * self.shared.mlp.d_ff),
        }
        return {name: size for name, size in sizes.items() if size[1]}

    def cost(self, d_model: int) -> LayerCost:
        shared = self.shared.cost(d_model)
        own = d_model**2 + sum(rank * (given + made) for given, rank, made in self.added(d_model).values())
        use = LayerCost(parameters=own, flops_per_token=2 * own, shared_parameters=shared.parameters)
        return shared + use + self.mamba.cost(d_model)


class SharedBlock(nn.Module):
    """What layers of one number have in common."""

    def __init__(self, config: SharedBlockConfig, d_model: int) -> None:
        super().__init__()
        self.norm = RMSNorm(2 * d_model, config.norm_eps)
        self.attention = Attention(config.attention, 2 * d_model, d_model)
        self.mlp_norm = RMSNorm(d_model, config.norm_eps)
        self.mlp = MLP(config.mlp, d_model)

    def forward(
        self, x: Tensor, state: LayerState | None, segments: Segments, added: nn.ModuleDict, dtype: torch.dtype
    ) -> tuple[Tensor, LayerState]:
        """x (batch, seqlen, 2 * d_model) -> (batch, seqlen, d_model) of `dtype`, and the state of the attention.

        Args:
            added: what the layer adds to projections, by the names of `SharedAttentionConfig.added`.
        """
        x = self.norm(x).to(dtype)
        attention, mlp = self.attention, self.mlp
        projections = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
        q, k, v = (_sum(x, proj, added, name) for name, proj in projections.items())
        y, state = attention.look_up(q, k, v, state, segments)
        y = self.mlp_norm(attention.o_proj(y))
        gate, up = mlp.gate_proj(y), mlp.up_proj(y)
        if "gate_up" in added:
            more_gate, more_up = added["gate_up"](y).chunk(2, dim=-1)
            gate, up = gate + more_gate, up + more_up
        return mlp.down_proj(ACTIVATIONS[mlp.activation](gate) * up), state


def _sum(x: Tensor, projection: nn.Module, added: nn.ModuleDict, name: str) -> Tensor:
    return projection(x) + added[name](x) if name in added else projection(x)


class SharedAttention(nn.Module):
    """See the contract in mixer.py. State: that of the attention, with `0.` in front of each name, and that of Mamba-2,
    with `1.`. The weights of the block are the language model's, which has them once."""

    Config = SharedAttentionConfig

    def __init__(self, config: SharedAttentionConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.added = nn.ModuleDict(
            {
                name: nn.Sequential(Projection(given, rank), Projection(rank, made))
                for name, (given, rank, made) in config.added(d_model).items()
            }
        )
        self.proj = Projection(d_model, d_model)
        self.mamba = Mamba2(config.mamba, d_model)

    def allocate(self, batch: int, capacity: int, device, dtype) -> LayerState:
        attention = allocate_cache(self.config.shared.attention, batch, capacity, device, dtype)
        return join([attention, self.mamba.allocate(batch, capacity, device, dtype)])

    def forward(
        self, x: Tensor, state: LayerState | None, segments: Segments, norm: RMSNorm, shared: SharedBlock
    ) -> tuple[Tensor, LayerState]:
        """x (batch, seqlen, d_model) is the residual stream, `norm` the one in front of the Mamba-2."""
        assert segments.embeddings is not None
        dtype = segments.embeddings.dtype
        attention, mamba = (None, None) if state is None else (part_of(state, 0), part_of(state, 1))
        both = torch.cat([x, segments.embeddings.to(x.dtype)], dim=-1)
        y, attention = shared(both, attention, segments, self.added, dtype)
        y, mamba = self.mamba(norm(x + self.proj(y)).to(dtype), mamba, segments)
        return y, join([attention, mamba])
