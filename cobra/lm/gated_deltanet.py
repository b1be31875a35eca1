"""The Gated DeltaNet mixer: a matrix state that is corrected towards what each token says, rather than added to.

Source: Yang, Kautz & Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv:2412.06464),
in the form of Qwen3-Next and Qwen3.5: several value heads to a key head, a norm of each head before its gate. Names as
there, but one input projection with rows in the order q, k, v, z, b, a, whole blocks of all heads, where Qwen3-Next
deals q, k, v, z and b, a out by key head and Qwen3.5 has a projection for qkv, z, b and a each.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import vision_scan
from cobra.typed_config import require_positive
from vision_scan.errors import UserError
from vision_scan.precision import Float32Parameters
from vision_scan.step_bias import initial_dt_bias

from .mixer import UPDATE_TOKENS, LayerCost, LayerState, Segments
from .precision import Projection, RMSNorm
from .short_conv import ShortConvolution

LENGTH_EPS = 1e-6  # under the root of the squared length of a query or key


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig:
    """num_v_heads states of head_v_dim x head_k_dim; num_v_heads / num_k_heads of them in a row share queries and
    keys. A state fades by exp(-dt A) a token; at the start dt is log-uniform in [dt_min, dt_max] and A uniform in
    A_init_range, so a head forgets over about 1 / (dt A) tokens. norm_eps is of the norm of the heads."""

    kind: Literal["gated_deltanet"] = "gated_deltanet"
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int = 128
    head_v_dim: int = 128
    d_conv: int = 4
    chunk_size: int = 64
    norm_eps: float = 1e-6
    dt_min: float = 0.001
    dt_max: float = 0.1
    A_init_range: tuple[float, ...] = (1.0, 16.0)

    def __post_init__(self) -> None:
        require_positive(self, "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "d_conv", "chunk_size")
        if self.num_v_heads % self.num_k_heads:
            raise UserError(
                f"gated_deltanet: num_v_heads {self.num_v_heads} must be a multiple of num_k_heads {self.num_k_heads}"
            )
        if len(self.A_init_range) != 2 or not 0 < self.A_init_range[0] <= self.A_init_range[1]:
            raise UserError(
                f"gated_deltanet: A_init_range {self.A_init_range} must be a lower and an upper bound, both above 0"
            )
        if not 0 < self.dt_min <= self.dt_max:
            raise UserError("gated_deltanet: dt_min and dt_max must be above 0, dt_min at most dt_max")

    @property
    def key_dim(self) -> int:
        """Channels of all queries, and of all keys."""
        return self.num_k_heads * self.head_k_dim

    @property
    def value_dim(self) -> int:
        return self.num_v_heads * self.head_v_dim

    @property
    def in_sizes(self) -> tuple[int, ...]:
        """Rows of the input projection: q, k and v, through the convolution; z; b; a."""
        return 2 * self.key_dim + self.value_dim, self.value_dim, self.num_v_heads, self.num_v_heads

    def cost(self, d_model: int) -> LayerCost:
        channels = self.in_sizes[0]
        projections = d_model * (sum(self.in_sizes) + self.value_dim)
        state = self.value_dim * self.head_k_dim
        return LayerCost(
            parameters=projections + channels * self.d_conv + 2 * self.num_v_heads + self.head_v_dim,
            # Decay, answer, correction and readout of the state are 7 operations per element.
            flops_per_token=2 * projections + 2 * channels * self.d_conv + 7 * state,
            state_elements=state,
            tail_elements=channels * (self.d_conv - 1),
        )


class GatedDeltaNet(Float32Parameters):
    """See the contract in mixer.py. State: `conv` (batch, channels, d_conv - 1) in the model's dtype and
    `ssm` (batch, num_v_heads, head_v_dim, head_k_dim) in float32."""

    Config = GatedDeltaNetConfig
    residual_projection = "out_proj"
    step_projection = "in_proj"
    float32_parameters = ("dt_bias", "A_log")

    def __init__(self, config: GatedDeltaNetConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.in_proj = Projection(d_model, sum(config.in_sizes))
        self.conv1d = ShortConvolution(config.in_sizes[0], config.d_conv, bias=False)
        self.dt_bias = nn.Parameter(initial_dt_bias(config.num_v_heads, dt_min=config.dt_min, dt_max=config.dt_max))
        self.A_log = nn.Parameter(torch.empty(config.num_v_heads).uniform_(*config.A_init_range).log())
        self.norm = RMSNorm(config.head_v_dim, config.norm_eps)  # of each head, the weight shared by all
        self.out_proj = Projection(config.value_dim, d_model)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """As Mamba-2 starts (mamba2.py), and for the same reason: channels that are the tokens' own, and equal
        projections for queries and keys, so that a token reads what tokens like it have written."""
        nn.init.normal_(self.in_proj.weight, std=self.in_proj.in_features**-0.5)
        key_dim = self.config.key_dim
        self.in_proj.weight[:key_dim] = self.in_proj.weight[key_dim : 2 * key_dim]
        self.conv1d.start_near_identity()

    def allocate(self, batch: int, capacity: int, device, dtype) -> LayerState:
        config = self.config
        wide = torch.promote_types(dtype, torch.float32)
        size = (batch, config.num_v_heads, config.head_v_dim, config.head_k_dim)
        return {
            "conv": torch.zeros(batch, config.in_sizes[0], config.d_conv - 1, device=device, dtype=dtype),
            "ssm": torch.zeros(size, device=device, dtype=wide),
        }

    def forward(self, x: Tensor, state: LayerState | None, segments: Segments) -> tuple[Tensor, LayerState]:
        config = self.config
        qkv, z, b, a = self.in_proj(x).split(config.in_sizes, dim=-1)
        gates = self._gates(b, a)
        update = state is not None and segments.overwrite and x.shape[1] <= UPDATE_TOKENS
        mix = self._update if update else self._scan
        y, state = mix(qkv.transpose(1, 2), gates, state, segments)
        y = vision_scan.gated_rmsnorm(
            y.flatten(-2), self.norm.weight.repeat(config.num_v_heads), z, config.norm_eps, config.head_v_dim,
            norm_before_gate=True,
        )  # fmt: skip
        return self.out_proj(y), state

    def mix(self, x: Tensor, values: Tensor, segments: Segments) -> Tensor:
        qkv, _, b, a = self.in_proj(x).split(self.config.in_sizes, dim=-1)
        qkv, _ = self.conv1d.scan(qkv.transpose(1, 2), None, segments)
        q, k, _ = self._heads(qkv)
        values = values[:, :, None].expand(-1, -1, self.config.num_v_heads, -1)
        return vision_scan.gated_delta_rule(
            q, k, values, *self._gates(b, a), seq_idx=segments.seq_idx, chunk_size=self.config.chunk_size
        )

    def _gates(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm of the decay, and the share of an answer that is corrected, (batch, seqlen, num_v_heads)."""
        return -torch.exp(self.A_log) * self.step_sizes(a), b.to(self.A_log.dtype).sigmoid()

    def step_sizes(self, projected: Tensor) -> Tensor:
        """dt as the decay takes it, (batch, seqlen, num_v_heads) float32, from what `in_proj` gives."""
        a = projected[..., -self.config.num_v_heads :]
        return nn.functional.softplus(a.to(self.dt_bias.dtype) + self.dt_bias)

    def _scan(self, qkv, gates, state, segments) -> tuple[Tensor, LayerState]:
        state = state or {"conv": None, "ssm": None}
        qkv, conv = self.conv1d.scan(qkv, state["conv"], segments)
        y, ssm = vision_scan.gated_delta_rule(
            *self._heads(qkv),
            *gates,
            initial_state=state["ssm"],
            return_final_state=True,
            seq_idx=segments.seq_idx,
            chunk_size=self.config.chunk_size,
        )
        return y, {"conv": conv, "ssm": ssm}

    def _update(self, qkv, gates, state, segments) -> tuple[Tensor, LayerState]:
        qkv = self.conv1d.update(qkv, state["conv"], segments)
        y = vision_scan.gated_delta_rule_update(
            state["ssm"], *self._heads(qkv), *gates, seq_idx=segments.seq_idx
        )
        return y, state

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k of unit length, float32 or wider, (batch, seqlen, num_k_heads, head_k_dim), and v."""
        config = self.config
        q, k, v = qkv.transpose(1, 2).split([config.key_dim, config.key_dim, config.value_dim], dim=-1)
        q, k = (_unit(t.unflatten(-1, (config.num_k_heads, config.head_k_dim))) for t in (q, k))
        return q, k, v.unflatten(-1, (config.num_v_heads, config.head_v_dim))


def _unit(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LENGTH_EPS)
