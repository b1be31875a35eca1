"""The Mamba-2 mixer.

Source: Dao & Gu 2024, "Transformers are SSMs" (arXiv:2405.21060), section 7; parameter names and order of
the projections as in the released state-spaces checkpoints.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import vision_scan
from cobra.typed_config import require_positive
from vision_scan.errors import UserError
from vision_scan.precision import Float32Parameters
from vision_scan.step_bias import initial_dt_bias

from .decode import stored
from .mixer import UPDATE_TOKENS, LayerCost, LayerState, Segments
from .precision import Projection, RMSNorm
from .sequence_parallel import ssd_map
from .short_conv import ShortConvolution


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Mamba-2 with d_inner = expand * d_model in heads of headdim. At the start dt is log-uniform in
    [dt_min, dt_max] and -A uniform in A_init_range, so a head forgets over about 1 / (dt -A) tokens; in use
    dt is clamped to dt_limit."""

    kind: Literal["mamba2"] = "mamba2"
    d_state: int = 128
    headdim: int = 64
    expand: int = 2
    ngroups: int = 1
    d_conv: int = 4
    chunk_size: int = 256
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    dt_min: float = 0.001
    dt_max: float = 0.1
    A_init_range: tuple[float, ...] = (1.0, 16.0)
    dt_limit: tuple[float, ...] = (0.0, math.inf)

    def __post_init__(self) -> None:
        require_positive(self, "d_state", "headdim", "expand", "ngroups", "d_conv", "chunk_size")
        for name in ("dt_limit", "A_init_range"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or bounds[0] > bounds[1]:
                raise UserError(f"mamba2: {name} {bounds} must be a lower and an upper bound")
        if not 0 < self.dt_min <= self.dt_max or self.A_init_range[0] <= 0:
            raise UserError("mamba2: dt_min, dt_max and A_init_range must be above 0, dt_min at most dt_max")

    def nheads(self, d_model: int) -> int:
        d_inner = self.expand * d_model
        if d_inner % self.headdim or (d_inner // self.headdim) % self.ngroups:
            raise UserError(
                f"mamba2: expand * d_model = {d_inner} must be a multiple of headdim {self.headdim}, "
                f"and the number of heads a multiple of ngroups {self.ngroups}"
            )
        return d_inner // self.headdim

    def conv_channels(self, d_model: int) -> int:
        return self.expand * d_model + 2 * self.ngroups * self.d_state

    def cost(self, d_model: int) -> LayerCost:
        nheads, channels = self.nheads(d_model), self.conv_channels(d_model)
        d_inner = self.expand * d_model
        projections = d_model * (d_inner + channels + nheads) + d_inner * d_model
        state = d_inner * self.d_state
        return LayerCost(
            parameters=projections + channels * (self.d_conv + 1) + 3 * nheads + d_inner,
            # Decay, inflow and readout of the state are 5 operations per element.
            flops_per_token=2 * projections + 2 * channels * self.d_conv + 5 * state,
            state_elements=state,
            tail_elements=channels * (self.d_conv - 1),
        )


class Mamba2(Float32Parameters):
    """See the contract in mixer.py. State: `conv` (batch, channels, d_conv - 1) in the model's dtype and
    `ssm` (batch, nheads, headdim, d_state) in float32."""

    Config = Mamba2Config
    residual_projection = "out_proj"
    reads_shards = True
    step_projection = "in_proj"
    float32_parameters = ("dt_bias", "A_log", "D")
    step_states = ("conv", "ssm")

    def __init__(self, config: Mamba2Config, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.d_inner = config.expand * d_model
        self.nheads = config.nheads(d_model)
        channels = config.conv_channels(d_model)
        self.in_proj = Projection(d_model, self.d_inner + channels + self.nheads)
        self.conv1d = ShortConvolution(channels, config.d_conv)
        self.dt_bias = nn.Parameter(initial_dt_bias(self.nheads, dt_min=config.dt_min, dt_max=config.dt_max))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(*config.A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = RMSNorm(self.d_inner, config.norm_eps)
        self.out_proj = Projection(self.d_inner, d_model)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Keys, queries and values of unit size that are the tokens' own, the convolution being near the
        identity, and equal projections for B and C, so that a token reads what tokens like it have written:
        a small model learns to look things up much sooner.

        Source: Trockman et al. 2024, "Mimetic Initialization Helps State Space Models Learn to Recall"
        (arXiv:2410.11135).
        """
        nn.init.normal_(self.in_proj.weight, std=self.in_proj.in_features**-0.5)
        groups = self.config.ngroups * self.config.d_state
        _, _, B, C, _ = self.in_proj.weight.split([self.d_inner, self.d_inner, groups, groups, self.nheads])
        C.copy_(B)
        self.conv1d.start_near_identity()

    def allocate(self, batch: int, capacity: int, device, dtype) -> LayerState:
        channels, taps = self.conv1d.weight.shape[0], self.config.d_conv - 1
        wide = torch.promote_types(dtype, torch.float32)
        size = (batch, self.nheads, self.config.headdim, self.config.d_state)
        return {
            "conv": torch.zeros(batch, channels, taps, device=device, dtype=dtype),
            "ssm": torch.zeros(size, device=device, dtype=wide),
        }

    def forward(self, x: Tensor, state: LayerState | None, segments: Segments) -> tuple[Tensor, LayerState]:
        channels = self.conv1d.weight.shape[0]
        z, xBC, dt = self.in_proj(x).split([self.d_inner, channels, self.nheads], dim=-1)
        update = state is not None and segments.overwrite and x.shape[1] <= UPDATE_TOKENS
        mix = self._update if update else self._scan
        y, state = mix(xBC.transpose(1, 2), dt, state, segments)
        config = self.config
        y = vision_scan.gated_rmsnorm(
            y.flatten(-2), self.norm.weight, z, config.norm_eps,
            self.d_inner // config.ngroups, config.norm_before_gate,
        )  # fmt: skip
        return self.out_proj(y), state

    def step_sizes(self, projected: Tensor) -> Tensor:
        """dt as the scan takes it, (batch, seqlen, nheads) float32, from what `in_proj` gives."""
        dt = projected[..., -self.nheads :].float() + self.dt_bias
        return nn.functional.softplus(dt).clamp(*self.config.dt_limit)

    def add_to(self, decoder, norm: RMSNorm) -> None:
        config = self.config
        decoder.add_mamba2(
            norm.weight, norm.eps, stored(self.in_proj), stored(self.out_proj),
            [self.conv1d.weight, self.conv1d.bias, self.dt_bias, self.A_log, self.D, self.norm.weight],
            [self.nheads, config.headdim, config.ngroups, config.d_state, config.d_conv],
            [config.norm_eps, *config.dt_limit, float(config.norm_before_gate)],
        )  # fmt: skip

    def _scan(self, xBC, dt, state, segments) -> tuple[Tensor, LayerState]:
        state = state or {"conv": None, "ssm": None}
        xBC, conv = self.conv1d.scan(xBC, state["conv"], segments)
        inputs, initial_state = self._ssd_inputs(xBC, dt), state["ssm"]
        if segments.shard is not None:
            own = ssd_map(*inputs[:4], self.dt_bias, self.config.dt_limit, segments.seq_idx)
            initial_state = segments.shard.entering_state(*own)
        y, ssm = vision_scan.ssd(
            *inputs,
            initial_state=initial_state,
            return_final_state=True,
            seq_idx=segments.seq_idx,
            chunk_size=self.config.chunk_size,
            **self._ssd_parameters(),
        )
        return y, {"conv": conv, "ssm": ssm}

    def _update(self, xBC, dt, state, segments) -> tuple[Tensor, LayerState]:
        xBC = self.conv1d.update(xBC, state["conv"], segments)
        y = vision_scan.ssd_update(
            state["ssm"], *self._ssd_inputs(xBC, dt), seq_idx=segments.seq_idx, **self._ssd_parameters()
        )
        return y, state

    def _ssd_inputs(self, xBC: Tensor, dt: Tensor) -> tuple[Tensor, ...]:
        groups = self.config.ngroups * self.config.d_state
        x, B, C = xBC.transpose(1, 2).split([self.d_inner, groups, groups], dim=-1)
        x = x.unflatten(-1, (self.nheads, self.config.headdim))
        B, C = (t.unflatten(-1, (self.config.ngroups, self.config.d_state)) for t in (B, C))
        return x, dt, -torch.exp(self.A_log), B, C

    def _ssd_parameters(self) -> dict:
        return {
            "D": self.D,
            "dt_bias": self.dt_bias,
            "dt_softplus": True,
            "dt_limit": self.config.dt_limit,
        }
