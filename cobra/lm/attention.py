"""Causal self-attention with rotary positions, grouped keys and values and an optional sliding window.

The cache is a buffer of slots; the key of position p stands in slot p modulo the number of slots, so that a
full cache and the ring of a sliding window are one thing. `position` tells which token a slot holds, -1
none: padding is never written, and a new segment empties the cache.

Source: Vaswani et al. 2017 (arXiv:1706.03762); RoPE: Su et al. 2021 (arXiv:2104.09864), halves rotated as in
Llama; GQA: Ainslie et al. 2023 (arXiv:2305.13245).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cobra.typed_config import require_positive
from vision_scan.errors import UserError

from .decode import UnservableError, stored
from .mixer import LayerCost, LayerState, Segments
from .precision import Projection, RMSNorm

LEAST_BAND = 256  # queries that read through a window at a time, at least: fewer would leave a processor idle


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Rotations slowed down for contexts longer than the original one, as in Llama 3.1: channels that turn
    less than low_freq_factor times in original_max_position_embeddings tokens are slowed factor-fold, those
    that turn more than high_freq_factor times stay, and between the two the frequencies are blended."""

    kind: Literal["llama3"] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        require_positive(self, "original_max_position_embeddings")
        if self.factor <= 0 or not 0 <= self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"rope_scaling: factor {self.factor} must be above 0, and low_freq_factor "
                f"{self.low_freq_factor} below high_freq_factor {self.high_freq_factor}"
            )

    def scale(self, frequency: Tensor) -> Tensor:
        """Radians per token of each pair of channels -> the same, slowed down."""
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return (1 - kept) * frequency / self.factor + kept * frequency


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """num_heads query heads of headdim share num_kv_heads keys and values.

    Attributes:
        rope_theta: of the rotary positions; None: there are none.
        rotary_dim: channels of a head that turn, the first; None: all.
        window: tokens that a token sees, itself included; None: all.
        qkv_bias, o_bias: of the projections of queries, keys and values (Qwen2), and of the one out.
        qk_norm: whether queries and keys are normed by head, in front of the rotation (Qwen3).
        norm_eps: of these norms.
        gated: whether what a head has read passes through a gate of its own, the sigmoid of a projection (Qiu et al.
            2025, arXiv:2505.06708; Qwen3-Next).
    """

    kind: Literal["attention"] = "attention"
    num_heads: int
    num_kv_heads: int
    headdim: int = 64
    rope_theta: float | None = 10000.0
    window: int | None = None
    rope_scaling: Llama3RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    rotary_dim: int | None = None
    qk_norm: bool = False
    norm_eps: float = 1e-6
    gated: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "num_kv_heads", "headdim")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"attention: num_heads {self.num_heads} must be a multiple of "
                f"num_kv_heads {self.num_kv_heads}"
            )
        turning = self.headdim if self.rotary_dim is None else self.rotary_dim
        if self.rope_theta is not None and (turning % 2 or not 0 < turning <= self.headdim):
            what = f"headdim {self.headdim}" if self.rotary_dim is None else f"rotary_dim {turning}"
            raise UserError(
                f"attention: {what} must be even and from 2 to headdim {self.headdim} for rotary positions"
            )
        if self.rotary_dim is not None and self.rope_theta is None:
            raise UserError("attention: rotary_dim needs rope_theta, which is none")
        if self.rope_scaling is not None and self.rope_theta is None:
            raise UserError("attention: rope_scaling needs rope_theta, which is none")
        if self.window is not None and self.window < 1:
            raise UserError(f"attention: window {self.window} must be 1 or more, or none")

    def slots(self, needed: int) -> int:
        """Slots of a cache for so many tokens."""
        return self.window if self.window is not None else needed

    def cost(self, d_model: int, d_out: int | None = None) -> LayerCost:
        queries, keys, d_out = self.num_heads * self.headdim, self.num_kv_heads * self.headdim, d_out or d_model
        weights = d_model * ((1 + self.gated) * queries + 2 * keys) + queries * d_out
        others = (queries + 2 * keys) * self.qkv_bias + d_out * self.o_bias + 2 * self.headdim * self.qk_norm
        return LayerCost(
            parameters=weights + others,
            flops_per_token=2 * weights,
            flops_per_context_token=4 * queries,
            cache_elements=2 * keys,
            cache_index_bytes=8,  # the position of each slot, int64
            window=self.window,
        )


class Attention(nn.Module):
    """See the contract in mixer.py. State: `k`, `v` (batch, num_kv_heads, slots, headdim) in the model's
    dtype, keys already rotated, and `position` (batch, slots) int64."""

    Config = AttentionConfig
    residual_projection = "o_proj"
    step_states = ("k", "v", "position")
    most_step_tokens = 1

    def __init__(self, config: AttentionConfig, d_model: int, d_out: int | None = None) -> None:
        """d_out: channels that it makes; None: d_model."""
        super().__init__()
        self.config = config
        queries, keys = config.num_heads * config.headdim, config.num_kv_heads * config.headdim
        self.q_proj = Projection(d_model, queries, config.qkv_bias)
        self.k_proj = Projection(d_model, keys, config.qkv_bias)
        self.v_proj = Projection(d_model, keys, config.qkv_bias)
        self.o_proj = Projection(queries, d_out or d_model, config.o_bias)
        self.gate_proj = Projection(d_model, queries) if config.gated else None
        self.q_norm, self.k_norm = (
            RMSNorm(config.headdim, config.norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(proj.weight, std=d_model**-0.5)  # queries, keys and values of unit size

    def allocate(self, batch: int, capacity: int, device, dtype) -> LayerState:
        return allocate_cache(self.config, batch, capacity, device, dtype)

    def add_to(self, decoder, norm: RMSNorm) -> None:
        config = self.config
        if config.rope_scaling or config.rotary_dim or config.qk_norm or config.gated:
            raise UnservableError
        projections = [stored(proj) for proj in (self.q_proj, self.k_proj, self.v_proj, self.o_proj)]
        sizes = [config.num_heads, config.num_kv_heads, config.headdim]
        decoder.add_attention(norm.weight, norm.eps, *projections, sizes, config.rope_theta or 0.0)

    def reserve(self, state: LayerState, lengths: Tensor) -> LayerState:
        """The state with a slot for the next token of each row; a cache that is full is doubled."""
        longest = int(lengths.max()) + 1
        k, v, position = state["k"], state["v"], state["position"]
        if self.config.slots(longest) <= k.shape[2]:
            return state
        return self._place(state, k[:, :, :0], v[:, :, :0], position[:, :0], None, 2 * longest)

    def forward(self, x: Tensor, state: LayerState | None, segments: Segments) -> tuple[Tensor, LayerState]:
        y, state = self.look_up(self.q_proj(x), self.k_proj(x), self.v_proj(x), state, segments)
        if self.gate_proj is not None:
            y = y * self.gate_proj(x).sigmoid()
        return self.o_proj(y), state

    def look_up(
        self, q: Tensor, k: Tensor, v: Tensor, state: LayerState | None, segments: Segments
    ) -> tuple[Tensor, LayerState]:
        """What the heads read, (batch, seqlen, num_heads * headdim), given what was projected: q of as many
        channels, k and v of num_kv_heads * headdim."""
        seqlen = q.shape[1]
        positions, runs = segments.positions_and_runs(seqlen, q.device)
        q, k = self._queries_and_keys(q, k, positions)
        v = self._heads(v)
        if state is not None and segments.overwrite and seqlen == 1:
            y, state = self._decode(q, k, v, positions, state, segments)
        else:
            y, state = self._attend(q, k, v, positions, runs, state, segments)
        return y.transpose(1, 2).flatten(-2), state

    def mix(self, x: Tensor, values: Tensor, segments: Segments) -> Tensor:
        positions, runs = segments.positions_and_runs(x.shape[1], x.device)
        q, k = self._queries_and_keys(self.q_proj(x), self.k_proj(x), positions)
        values = values[:, None].expand(-1, self.config.num_kv_heads, -1, -1)
        y, _ = self._attend(q, k, values, positions, runs, None, segments)
        return y.transpose(1, 2)

    def _queries_and_keys(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What was projected -> (batch, num_heads, seqlen, headdim), keys with num_kv_heads; normed and rotated as the
        layer does."""
        q, k = self.q_norm(self._heads(q)), self.k_norm(self._heads(k))
        if self.config.rope_theta is None:
            return q, k
        turn = self.config.rope_theta, self.config.rope_scaling, self.config.rotary_dim
        return rotate(q, positions, *turn), rotate(k, positions, *turn)

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, seqlen, heads * headdim) -> (batch, heads, seqlen, headdim)."""
        return x.unflatten(-1, (-1, self.config.headdim)).transpose(1, 2)

    def _decode(self, q, k, v, positions, state, segments) -> tuple[Tensor, LayerState]:
        """One token a row, written into the cache in place; a row of padding writes nothing."""
        state = self.reserve(state, segments.starts)
        slots = state["k"].shape[2]
        filled = min(int(segments.starts.max()) + 1, slots)
        if segments.uniform_start is not None:
            slot = segments.uniform_start % slots
            state["k"][:, :, slot], state["v"][:, :, slot] = k[:, :, 0], v[:, :, 0]
            state["position"][:, slot] = positions[:, 0]
            return attend(q, state["k"][:, :, :filled], state["v"][:, :, :filled], None), state
        rows = (positions[:, 0] >= 0).nonzero()[:, 0]
        slot = positions[rows, 0] % slots
        state["k"][rows, :, slot], state["v"][rows, :, slot] = k[rows, :, 0], v[rows, :, 0]
        state["position"][rows, slot] = positions[rows, 0]
        there = state["position"][:, :filled]
        seen = (there >= 0) | (positions < 0)  # a row without keys would be NaN
        y = attend(q, state["k"][:, :, :filled], state["v"][:, :, :filled], seen[:, None, None])
        return torch.where((positions >= 0)[:, None, :, None], y, 0.0), state

    def _attend(self, q, k, v, positions, runs, state, segments) -> tuple[Tensor, LayerState]:
        """Any number of tokens on any rows; nothing is overwritten."""
        longest = int(segments.ends(q.shape[2]).max())
        if state is None and segments.seq_idx is None and self.config.window is None:
            y = attend(q, k, v, None, is_causal=True)
            return y, self._place(None, k, v, positions, runs, longest)
        keys, values, key_positions, key_runs = k, v, positions, runs
        if state is not None:
            keys, values = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
            key_positions = torch.cat([state["position"], positions], 1)
            key_runs = torch.cat([torch.zeros_like(state["position"]), runs], 1)
        window = self.config.window
        if window is None or segments.seq_idx is not None:  # padding takes a window's tokens further apart
            bands = [(slice(None), slice(None))]
        else:
            bands = _bands(q.shape[2], keys.shape[2] - k.shape[2], window)
        parts = [
            self._attend_band(
                q[:, :, queries], keys[:, :, seen], values[:, :, seen],
                (positions[:, queries], runs[:, queries]), (key_positions[:, seen], key_runs[:, seen]),
            )
            for queries, seen in bands
        ]  # fmt: skip
        return torch.cat(parts, 2), self._place(state, k, v, positions, runs, longest)

    def _attend_band(self, q, k, v, query_places, key_places) -> Tensor:
        """Attention by the positions and runs of queries and of keys, each (batch, length)."""
        (positions, runs), (key_positions, key_runs) = query_places, key_places
        gap = positions[:, :, None] - key_positions[:, None, :]
        seen = (gap >= 0) & (key_positions[:, None, :] >= 0) & (runs[:, :, None] == key_runs[:, None, :])
        if self.config.window is not None:
            seen &= gap < self.config.window
        padding = (positions < 0)[:, :, None]
        y = attend(q, k, v, (seen | padding)[:, None])  # a row of no keys would be NaN
        return torch.where(padding[:, None], 0.0, y)

    def _place(self, state, k, v, positions, runs, longest) -> LayerState:
        """A cache of at least `longest` positions with the old keys of the last segment and the new ones."""
        if state is not None:
            if runs is not None:
                old_runs = torch.zeros_like(state["position"])
                runs = torch.cat([old_runs, runs], 1)
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
            positions = torch.cat([state["position"], positions], 1)
            longest = max(longest, state["position"].shape[1])
        slots = self.config.slots(max(longest, 1))
        keep = positions >= 0
        if runs is not None:
            keep = keep & (runs == runs[:, -1:])
        if self.config.window is not None:
            last = torch.where(keep, positions, -1).amax(1, keepdim=True)
            keep = keep & (positions > last - slots)
        target = torch.where(keep, positions % slots, slots)  # one slot more takes what is dropped
        index = target[:, None, :, None].expand_as(k)
        size = (*k.shape[:2], slots + 1, k.shape[3])
        return {
            "k": k.new_zeros(size).scatter(2, index, k)[:, :, :slots].contiguous(),
            "v": v.new_zeros(size).scatter(2, index, v)[:, :, :slots].contiguous(),
            "position": positions.new_full((k.shape[0], slots + 1), -1)
            .scatter(1, target, positions)[:, :slots]
            .contiguous(),
        }


def allocate_cache(config: AttentionConfig, batch: int, capacity: int, device, dtype) -> LayerState:
    """The state of rows that have read nothing."""
    slots = config.slots(max(capacity, 1))
    size = (batch, config.num_kv_heads, slots, config.headdim)
    return {
        "k": torch.zeros(size, device=device, dtype=dtype),
        "v": torch.zeros(size, device=device, dtype=dtype),
        "position": torch.full((batch, slots), -1, device=device),
    }


def _bands(seqlen: int, cached: int, window: int) -> list[tuple[slice, slice]]:
    """Which keys a piece of the queries can see through a window, so that work and memory go with seqlen x window.

    Args:
        seqlen: queries, none of them padding; their own keys stand behind the cached ones.
        cached: slots of the cache, in any order.
    """
    piece = max(window, LEAST_BAND)
    bands = []
    for start in range(0, seqlen, piece):
        stop = min(start + piece, seqlen)
        first = cached + start - window + 1 if start >= window else 0  # from there on no cached key is seen
        bands.append((slice(start, stop), slice(first, cached + stop)))
    return bands


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """Softmax attention; q (batch, num_heads, queries, headdim), k and v with num_kv_heads."""
    shared = q.shape[1] != k.shape[1]
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=shared
    )


def rotate(
    x: Tensor,
    positions: Tensor,
    theta: float,
    scaling: Llama3RopeScaling | None = None,
    rotary_dim: int | None = None,
) -> Tensor:
    """Rotary position embedding: x (batch, heads, seqlen, headdim), of which the first `rotary_dim` turn (None: all),
    positions (batch, seqlen)."""
    if rotary_dim is not None:
        turning, still = x.tensor_split([rotary_dim], dim=-1)
        return torch.cat([rotate(turning, positions, theta, scaling), still], dim=-1)
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    if scaling is not None:
        frequency = scaling.scale(frequency)
    angle = positions[:, None, :, None].to(wide) * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(wide).split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
