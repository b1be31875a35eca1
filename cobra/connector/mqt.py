"""MQT-LLaVA's connector: learnt queries look at the grid, and any number of the first of them will do."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cobra.typed_config import require_positive
from vision_scan.errors import UserError
from vision_scan.precision import LayerNorm


@dataclass(frozen=True, kw_only=True)
class MQTConfig:
    """A Matryoshka query transformer.

    Attributes:
        num_queries: how many there are, a square (256).
        num_heads: of the attention; divides the width of the features.
        keep: how many tokens it makes, those of the first queries; None: of all. A model that was trained with
            `nested` may be read with any number from 1 on.
        nested: each training step reads the tokens of the first 2, 4, ... or all queries, as `Cobra.loss` draws.
            The processor writes as many image tokens as ever, and the loss takes the others out of its rows again.
            Evaluation and generation read as many as `keep` says.
    """

    kind: Literal["mqt"] = "mqt"
    num_queries: int = 256
    num_heads: int = 16
    keep: int | None = None
    nested: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "num_queries", "num_heads")
        if math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise UserError(f"mqt: num_queries {self.num_queries} must be a square, for instance 64, 144, 256")
        if self.keep is not None and not 1 <= self.keep <= self.num_queries:
            raise UserError(f"mqt: keep {self.keep} must be from 1 to num_queries, {self.num_queries}")
        if self.nested and self.num_kept % 2:
            raise UserError(f"mqt: nested draws even numbers of tokens, up to {self.num_kept}: make it even")

    @property
    def num_kept(self) -> int:
        return self.keep or self.num_queries

    def num_tokens(self, height: int, width: int) -> int:
        return self.num_kept


class MQTConnector(nn.Module):
    """Cross-attention of learnt queries to the features, and a linear map.

    Each token is a fixed mixture of places, as in the released code: a query is the norm of what was learnt plus
    the position of its own place, a key is the norm of a cell's position and of nothing else, so that only the
    values know the picture. Positions are sines and cosines of a square of as many places as there are queries,
    resampled to the grid bicubically. They are computed here and not stored; the release rounds them to half
    precision. Its keys have biases, in norm and projection, that add the same to all scores of a query, to no effect;
    they are left out.

    Source: Hu et al. 2024, "Matryoshka Query Transformer" (arXiv:2405.19315).
    """

    Config = MQTConfig

    def __init__(self, config: MQTConfig, d_vision: int, d_model: int) -> None:
        super().__init__()
        if d_vision % config.num_heads or d_vision % 4:
            raise UserError(
                f"mqt: features of width {d_vision} do not suit num_heads {config.num_heads}: the width must be a "
                "multiple of it and of 4; set connector.num_heads"
            )
        self.config = config
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(config.num_queries, d_vision), std=0.02))
        self.norm_q, self.norm_v = LayerNorm(d_vision, 1e-6), LayerNorm(d_vision, 1e-6)
        self.norm_k = LayerNorm(d_vision, 1e-6, bias=False)
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(d_vision, d_vision) for _ in range(3))
        self.k_proj = nn.Linear(d_vision, d_vision, bias=False)
        self.proj = nn.Linear(d_vision, d_model, bias=False)
        nn.init.normal_(self.proj.weight, std=d_model**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        height, width = features.shape[1:3]
        num_tokens = self.config.num_kept
        positions = query_positions(*self.queries.shape, features.device)
        q = self.queries[:num_tokens] + positions[:num_tokens].to(self.queries.dtype)
        k = resample(positions, height, width).to(self.queries.dtype)
        q, k = self._heads(self.q_proj(self.norm_q(q))), self._heads(self.k_proj(self.norm_k(k)))
        v = self._heads(self.v_proj(self.norm_v(features.flatten(1, 2))))
        # One map for all pictures: their queries and keys are the same.
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        mixed = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return self.proj(self.out_proj(mixed))

    def draw(self) -> int:
        """One of 2, 4, ... up to all tokens, with equal odds, from torch's global generator: a resumed run goes on
        with the draws of an undisturbed one."""
        return 2 * int(torch.randint(1, self.config.num_kept // 2 + 1, ()))

    def _heads(self, x: Tensor) -> Tensor:
        """(..., tokens, d) -> (..., heads, tokens, d of a head)"""
        return x.unflatten(-1, (self.config.num_heads, -1)).transpose(-2, -3)


def query_positions(num_queries: int, d: int, device: torch.device) -> Tensor:
    """Sines and cosines of the places of a square, (num_queries, d), float64: of the column, then of the row."""
    side = math.isqrt(num_queries)
    frequency = 10000.0 ** (-torch.arange(d // 4, device=device, dtype=torch.float64) / (d // 4))
    angle = torch.arange(side, device=device)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], dim=-1)
    columns, rows = waves[None].expand(side, -1, -1), waves[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def resample(positions: Tensor, height: int, width: int) -> Tensor:
    """The positions of a square (places, d) at the cells of a grid, (height * width, d)."""
    side = math.isqrt(len(positions))
    square = positions.mT.unflatten(-1, (side, side))[None]
    return nn.functional.interpolate(square, (height, width), mode="bicubic")[0].flatten(1).mT
