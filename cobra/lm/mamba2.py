"""The Mamba-2 mixer.

Source: Dao & Gu 2024, "Transformers are SSMs" (arXiv:2405.21060), section 7; parameter names and order of
the projections as in the released state-spaces checkpoints.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import vision_scan
from cobra.typed_config import require_positive
from vision_scan.errors import UserError
from vision_scan.ops import NO_DECAY, discretize, skip_and_gate
from vision_scan.precision import Float32Parameters
from vision_scan.step_bias import initial_dt_bias

from .decode import UnservableError, stored
from .heads import by_head
from .mixer import UPDATE_TOKENS, LayerCost, LayerState, Segments
from .precision import Projection, RMSNorm
from .sequence_parallel import ssd_map
from .short_conv import ShortConvolution

_Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x, dt, A, B, C


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Mamba-2 with d_inner = expand * d_model in heads of headdim. At the start dt is log-uniform in
    [dt_min, dt_max] and -A uniform in A_init_range, so a head forgets over about 1 / (dt -A) tokens; in use
    dt is clamped to dt_limit.

    Attributes:
        d_inner: channels in front of the projection out; None: expand * d_model.
        d_ssm: how many of them are the recurrence's; the others are a gated feed-forward layer's. None: all.
        ngroups: groups of heads that share B and C, and of channels that are normed together.
        d_xb: channels of x and, as many, of B; a head of them stands for several heads of C in a row, as keys and
            values stand for several queries (MambaInLlama). None: every head has its own x, every group its own B.
        rmsnorm: whether y is normed around its gate; otherwise it is gated alone.
        norm_before_gate: whether the norm comes first.
        bias: of both projections.
        conv_bias: of the convolution.
        conv_activation: behind the convolution; None: nothing.
        z_bias: of z alone, beside `bias`.
        D_has_hdim: whether each channel has a skip of its own, or those of a head share one.
        discrete: whether a token's decay is exp(-softplus(dt)), without A_log and dt_bias, and what it adds is not
            multiplied by dt (Llamba).
    """

    kind: Literal["mamba2"] = "mamba2"
    d_state: int = 128
    headdim: int = 64
    expand: int = 2
    d_inner: int | None = None
    d_ssm: int | None = None
    ngroups: int = 1
    d_xb: int | None = None
    d_conv: int = 4
    chunk_size: int = 256
    rmsnorm: bool = True
    norm_before_gate: bool = False
    bias: bool = False
    conv_bias: bool = True
    conv_activation: Literal["silu"] | None = "silu"
    z_bias: bool = False
    D_has_hdim: bool = False
    discrete: bool = False
    norm_eps: float = 1e-5
    dt_min: float = 0.001
    dt_max: float = 0.1
    A_init_range: tuple[float, ...] = (1.0, 16.0)
    dt_limit: tuple[float, ...] = (0.0, math.inf)

    def __post_init__(self) -> None:
        require_positive(self, "d_state", "headdim", "expand", "ngroups", "d_conv", "chunk_size")
        require_positive(self, *(name for name in ("d_inner", "d_ssm", "d_xb") if getattr(self, name) is not None))
        if self.conv_activation not in ("silu", None):
            raise UserError(f"mamba2: conv_activation {self.conv_activation!r} must be 'silu' or none")
        for name in ("dt_limit", "A_init_range"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or bounds[0] > bounds[1]:
                raise UserError(f"mamba2: {name} {bounds} must be a lower and an upper bound")
        if not 0 < self.dt_min <= self.dt_max or self.A_init_range[0] <= 0:
            raise UserError("mamba2: dt_min, dt_max and A_init_range must be above 0, dt_min at most dt_max")

    def widths(self, d_model: int) -> tuple[int, int]:
        """Channels of the feed-forward part, and of the recurrence."""
        d_inner = self.d_inner or self.expand * d_model
        d_ssm = self.d_ssm or d_inner
        if d_ssm > d_inner:
            raise UserError(f"mamba2: d_ssm {d_ssm} must be at most d_inner {d_inner}")
        return d_inner - d_ssm, d_ssm

    def nheads(self, d_model: int) -> int:
        _, d_ssm = self.widths(d_model)
        if d_ssm % self.headdim or (d_ssm // self.headdim) % self.ngroups:
            what = "d_ssm" if self.d_ssm else "d_inner" if self.d_inner else "expand * d_model"
            raise UserError(
                f"mamba2: {what} = {d_ssm} must be a multiple of headdim {self.headdim}, "
                f"and the number of heads a multiple of ngroups {self.ngroups}"
            )
        return d_ssm // self.headdim

    def convolved(self, d_model: int) -> list[int]:
        """Channels of x, B and C."""
        _, d_ssm = self.widths(d_model)
        groups = self.ngroups * self.d_state
        if self.d_xb is None:
            return [d_ssm, groups, groups]
        if d_ssm % self.d_xb or self.d_xb % self.headdim or self.headdim != self.d_state or groups != d_ssm:
            raise UserError(
                f"mamba2: d_xb {self.d_xb} must be a multiple of headdim {self.headdim} and divide {d_ssm} channels, "
                f"d_state {self.d_state} must be headdim, and ngroups {self.ngroups} the number of heads"
            )
        return [self.d_xb, self.d_xb, groups]

    def conv_channels(self, d_model: int) -> int:
        return sum(self.convolved(d_model))

    def projected(self, d_model: int) -> list[int]:
        """What the projection in makes, in order: both inputs of the feed-forward part, z, x | B | C, dt."""
        d_mlp, d_ssm = self.widths(d_model)
        return [d_mlp, d_mlp, d_ssm, self.conv_channels(d_model), self.nheads(d_model)]

    def cost(self, d_model: int) -> LayerCost:
        nheads, channels = self.nheads(d_model), self.conv_channels(d_model)
        d_mlp, d_ssm = self.widths(d_model)
        inner, outer = sum(self.projected(d_model)), d_mlp + d_ssm
        projections = d_model * (inner + outer)
        biases = self.bias * (inner + d_model) + self.conv_bias * channels + self.z_bias * d_ssm
        state = d_ssm * self.d_state
        return LayerCost(
            parameters=projections
            + biases
            + channels * self.d_conv
            + 2 * nheads * (not self.discrete)
            + (d_ssm if self.D_has_hdim else nheads)
            + self.rmsnorm * d_ssm,
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
        self.d_mlp, self.d_ssm = config.widths(d_model)
        self.nheads = config.nheads(d_model)
        self.projected, self.convolved = config.projected(d_model), config.convolved(d_model)
        self.in_proj = Projection(d_model, sum(self.projected), config.bias)
        self.conv1d = ShortConvolution(
            config.conv_channels(d_model), config.d_conv, config.conv_bias, config.conv_activation
        )
        self.z_bias = nn.Parameter(torch.zeros(self.d_ssm)) if config.z_bias else None
        self.dt_bias, self.A_log, self.dt_limit = None, None, config.dt_limit
        if config.discrete:
            self.float32_parameters = ("D",)
            self.dt_limit = (max(config.dt_limit[0], NO_DECAY), config.dt_limit[1])
        else:
            self.dt_bias = nn.Parameter(initial_dt_bias(self.nheads, dt_min=config.dt_min, dt_max=config.dt_max))
            self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(*config.A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.d_ssm if config.D_has_hdim else self.nheads))
        self.norm = RMSNorm(self.d_ssm, config.norm_eps) if config.rmsnorm else None
        self.out_proj = Projection(self.d_mlp + self.d_ssm, d_model, config.bias)
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
        *_, B, C, _ = self.in_proj.weight.split([*self.projected[:-2], *self.convolved, self.nheads])
        C.copy_(by_head(B.T, self.config.d_state, len(C)).flatten(-2).T)
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
        gate, up, z, xBC, dt = self.in_proj(x).split(self.projected, dim=-1)
        z = z if self.z_bias is None else z + self.z_bias
        update = state is not None and segments.overwrite and x.shape[1] <= UPDATE_TOKENS
        mix = self._update if update else self._scan
        own_gate = None if self.norm is not None else z.unflatten(-1, (self.nheads, -1))
        y, state = mix(xBC.transpose(1, 2), dt, own_gate, state, segments)
        y = y.flatten(-2)
        if self.norm is not None:
            config = self.config
            y = vision_scan.gated_rmsnorm(
                y, self.norm.weight, z, config.norm_eps, self.d_ssm // config.ngroups, config.norm_before_gate
            )
        if self.d_mlp:
            y = torch.cat([nn.functional.silu(gate) * up, y], dim=-1)
        return self.out_proj(y), state

    def mix(self, x: Tensor, values: Tensor, segments: Segments) -> Tensor:
        *_, xBC, dt = self.in_proj(x).split(self.projected, dim=-1)
        xBC, _ = self.conv1d.scan(xBC.transpose(1, 2), None, segments)
        _, B, C = self._heads(xBC)
        values = values[:, :, None].expand(-1, -1, self.nheads, -1)
        inputs, options = self._ssd_inputs(values, B, C, dt, None)
        y = vision_scan.ssd(
            *inputs, seq_idx=segments.seq_idx, chunk_size=self.config.chunk_size, **{**options, "D": None}
        )
        real = 1 if segments.seq_idx is None else (segments.seq_idx >= 0)[..., None, None]
        return y + self.D.view(self.nheads, -1).mean(1)[:, None] * values * real

    def step_sizes(self, projected: Tensor) -> Tensor:
        """dt as the scan takes it, (batch, seqlen, nheads) float32, from what `in_proj` gives."""
        return discretize(projected[..., -self.nheads :], self.dt_bias, True, *self.dt_limit, torch.float32)

    def add_to(self, decoder, norm: RMSNorm) -> None:
        config = self.config
        is_plain = self.norm is not None and not self.d_mlp and not config.D_has_hdim and not config.discrete
        if not is_plain or config.d_xb or config.z_bias or config.conv_activation is None:
            raise UnservableError
        decoder.add_mamba2(
            norm.weight, norm.eps, stored(self.in_proj), stored(self.out_proj),
            [self.conv1d.weight, self.conv1d.bias, self.dt_bias, self.A_log, self.D, self.norm.weight],
            [self.nheads, config.headdim, config.ngroups, config.d_state, config.d_conv],
            [config.norm_eps, *config.dt_limit, float(config.norm_before_gate)],
        )  # fmt: skip

    def _scan(self, xBC, dt, z, state, segments) -> tuple[Tensor, LayerState]:
        state = state or {"conv": None, "ssm": None}
        xBC, conv = self.conv1d.scan(xBC, state["conv"], segments)
        inputs, options = self._ssd_inputs(*self._heads(xBC), dt, z)
        initial_state = state["ssm"]
        if segments.shard is not None:
            own = ssd_map(*inputs[:4], self.dt_bias, self.dt_limit, segments.seq_idx)
            initial_state = segments.shard.entering_state(*own)
        y, ssm = vision_scan.ssd(
            *inputs,
            initial_state=initial_state,
            return_final_state=True,
            seq_idx=segments.seq_idx,
            chunk_size=self.config.chunk_size,
            **options,
        )
        return self._complete(y, xBC, z), {"conv": conv, "ssm": ssm}

    def _update(self, xBC, dt, z, state, segments) -> tuple[Tensor, LayerState]:
        xBC = self.conv1d.update(xBC, state["conv"], segments)
        inputs, options = self._ssd_inputs(*self._heads(xBC), dt, z)
        y = vision_scan.ssd_update(state["ssm"], *inputs, seq_idx=segments.seq_idx, **options)
        return self._complete(y, xBC, z), state

    def _ssd_inputs(
        self, x: Tensor, B: Tensor, C: Tensor, dt: Tensor, z: Tensor | None
    ) -> tuple[_Inputs, dict[str, Any]]:
        """What `vision_scan.ssd` takes. As it multiplies by dt what comes in, it is handed that divided by dt where a
        token is not to be; the smallest dt, which decays nothing in any dtype, is large enough to divide by."""
        options = {"dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": self.dt_limit}
        if self.A_log is not None:
            return (x, dt, -torch.exp(self.A_log), B, C), {**options, "D": self._skip, "z": z}
        wide = torch.promote_types(x.dtype, torch.float32)
        steps = discretize(dt, None, True, *self.dt_limit, wide)
        return (x.to(wide) / steps[..., None], dt, -torch.ones_like(steps[0, 0]), B, C), options

    def _complete(self, y: Tensor, xBC: Tensor, z: Tensor | None) -> Tensor:
        """What the scan has not done, if it knows x divided by dt alone: the skip and the gate."""
        return skip_and_gate(y, self._heads(xBC)[0], self._skip, z).to(xBC.dtype) if self.config.discrete else y

    def _heads(self, xBC: Tensor) -> list[Tensor]:
        """(batch, channels, seqlen) -> x (batch, seqlen, nheads, headdim), B, C (batch, seqlen, ngroups, d_state)."""
        x, B, C = xBC.transpose(1, 2).split(self.convolved, dim=-1)
        groups = self.config.ngroups * self.config.d_state
        return [
            by_head(x, self.config.headdim, self.d_ssm),
            *(by_head(t, self.config.d_state, groups) for t in (B, C)),
        ]

    @property
    def _skip(self) -> Tensor:
        return self.D.view(self.nheads, -1) if self.config.D_has_hdim else self.D
