"""The Mamba mixer.

Source: Gu & Dao 2023, "Mamba" (arXiv:2312.00752), section 3.4; parameter names as in the released
state-spaces checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import vision_scan
from cobra.typed_config import require_positive
from vision_scan.errors import UserError, choose
from vision_scan.precision import Float32Parameters
from vision_scan.step_bias import initial_dt_bias

from .decode import UnservableError, stored
from .heads import by_head
from .mixer import UPDATE_TOKENS, LayerCost, LayerState, Segments
from .precision import Projection, RMSNorm
from .sequence_parallel import selective_scan_map
from .short_conv import ShortConvolution


@dataclass(frozen=True, kw_only=True)
class Mamba1Config:
    """Mamba with d_inner = expand * d_model channels of d_state states each.

    Attributes:
        d_inner: None: expand * d_model.
        dt_rank: channels that dt comes through; None: a sixteenth of d_model, rounded up.
        dt_min, dt_max: at the start dt is log-uniform between them.
        d_xb: of MambaInLlama: x and B have so many channels each, in heads of d_state, of which one stands for several
            heads in a row of C, which has d_inner channels, as keys and values stand for several queries; B, C and what
            dt comes through are projected from the layer's input, as x and z are. None: from x behind the convolution,
            one B and one C for all channels.
        inner_norms: RMS norms of B, C and of what dt comes through, without weights (plain: Falcon-Mamba) or with
            (learned: Jamba).
        norm_eps: of these norms.
        bias: of the projections in and out.
        conv_bias: of the convolution.
    """

    kind: Literal["mamba1"] = "mamba1"
    d_state: int = 16
    expand: int = 2
    d_inner: int | None = None
    d_conv: int = 4
    dt_rank: int | None = None
    d_xb: int | None = None
    inner_norms: Literal["none", "plain", "learned"] = "none"
    norm_eps: float = 1e-6
    bias: bool = False
    conv_bias: bool = True
    dt_min: float = 0.001
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self, "d_state", "expand", "d_conv")
        require_positive(self, *(name for name in ("d_inner", "dt_rank", "d_xb") if getattr(self, name) is not None))
        choose("mamba1: inner_norms", self.inner_norms, dict.fromkeys(("none", "plain", "learned")))
        if not 0 < self.dt_min <= self.dt_max:
            raise UserError("mamba1: dt_min and dt_max must be above 0, dt_min at most dt_max")

    def inner(self, d_model: int) -> int:
        return self.d_inner or self.expand * d_model

    def rank(self, d_model: int) -> int:
        return self.dt_rank or -(-d_model // 16)

    def projected(self, d_model: int) -> list[int]:
        """What the projection in makes, in order: x, z and, with d_xb, B, C and what dt comes through."""
        d_inner = self.inner(d_model)
        if self.d_xb is None:
            return [d_inner, d_inner]
        if d_inner % self.d_xb or self.d_xb % self.d_state:
            raise UserError(
                f"mamba1: d_xb {self.d_xb} must be a multiple of d_state {self.d_state} and divide d_inner {d_inner}"
            )
        return [self.d_xb, d_inner, self.d_xb, d_inner, self.rank(d_model)]

    def cost(self, d_model: int) -> LayerCost:
        d_inner, rank, inner = self.inner(d_model), self.rank(d_model), sum(self.projected(d_model))
        projections = d_model * (inner + d_inner) + d_inner * rank
        projections += 0 if self.d_xb else d_inner * (rank + 2 * self.d_state)
        state = d_inner * self.d_state
        others = self.bias * (inner + d_model) + self.conv_bias * d_inner
        others += (self.inner_norms == "learned") * (rank + 2 * self.d_state)
        return LayerCost(
            parameters=projections + others + d_inner * (self.d_conv + self.d_state + 2),
            # Decay (a product, an exponential), inflow and readout of the state are 7 operations per element.
            flops_per_token=2 * projections + 2 * d_inner * self.d_conv + 7 * state,
            state_elements=state,
            tail_elements=d_inner * (self.d_conv - 1),
        )


class StepProjection(Float32Parameters, nn.Linear):
    """dt's projection, without its bias: that is dt_bias, stays float32 and is added by the scan."""

    float32_parameters = ("bias",)

    def forward(self, low: Tensor) -> Tensor:
        """(..., dt_rank) -> (..., d_inner)."""
        return nn.functional.linear(low, self.weight)


class Mamba1(Float32Parameters):
    """See the contract in mixer.py. State: `conv` (batch, d_inner, d_conv - 1) in the model's dtype and
    `ssm` (batch, d_inner, d_state) in float32."""

    Config = Mamba1Config
    residual_projection = "out_proj"
    reads_shards = True
    step_projection = "dt_proj"
    float32_parameters = ("A_log", "D")
    step_states = ("conv", "ssm")

    def __init__(self, config: Mamba1Config, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.d_inner = d_inner = config.inner(d_model)
        self.dt_rank = rank = config.rank(d_model)
        self.projected = config.projected(d_model)
        self.in_proj = Projection(d_model, sum(self.projected), config.bias)
        self.conv1d = ShortConvolution(d_inner, config.d_conv, config.conv_bias)
        self.x_proj = None if config.d_xb else Projection(d_inner, rank + 2 * config.d_state)
        self.dt_proj = StepProjection(rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, config.d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = Projection(d_inner, d_model, config.bias)
        self.dt_norm, self.B_norm, self.C_norm = (
            nn.Identity()
            if config.inner_norms == "none"
            else RMSNorm(d, config.norm_eps, elementwise_affine=config.inner_norms == "learned")
            for d in (rank, config.d_state, config.d_state)
        )
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.dt_proj.bias.copy_(initial_dt_bias(d_inner, dt_min=config.dt_min, dt_max=config.dt_max))

    def allocate(self, batch: int, capacity: int, device, dtype) -> LayerState:
        wide = torch.promote_types(dtype, torch.float32)
        return {
            "conv": torch.zeros(batch, self.d_inner, self.config.d_conv - 1, device=device, dtype=dtype),
            "ssm": torch.zeros(batch, self.d_inner, self.config.d_state, device=device, dtype=wide),
        }

    def step_sizes(self, projected: Tensor) -> Tensor:
        """dt as the scan takes it, (batch, seqlen, d_inner) float32, from what `dt_proj` gives."""
        return nn.functional.softplus(projected.float() + self.dt_proj.bias)

    def add_to(self, decoder, norm: RMSNorm) -> None:
        if self.config.inner_norms != "none" or self.x_proj is None:
            raise UnservableError
        in_proj, x_proj, out_proj = map(stored, (self.in_proj, self.x_proj, self.out_proj))
        projections = in_proj, x_proj, stored(self.dt_proj, StepProjection), out_proj
        parameters = [self.conv1d.weight, self.conv1d.bias, self.dt_proj.bias, self.A_log, self.D]
        sizes = [self.d_inner, self.config.d_state, self.dt_rank, self.config.d_conv]
        decoder.add_mamba1(norm.weight, norm.eps, *projections, parameters, sizes)

    def forward(self, x: Tensor, state: LayerState | None, segments: Segments) -> tuple[Tensor, LayerState]:
        u, z, *others = self.in_proj(x).split(self.projected, dim=-1)
        u = by_head(u, self.config.d_state, self.d_inner).flatten(-2) if others else u
        u, z = u.transpose(1, 2), z.transpose(1, 2)
        update = state is not None and segments.overwrite and x.shape[1] <= UPDATE_TOKENS
        mix = self._update if update else self._scan
        y, state = mix(u, z, others, state, segments)
        return self.out_proj(y.transpose(1, 2)), state

    def _scan(self, u, z, others, state, segments) -> tuple[Tensor, LayerState]:
        state = state or {"conv": None, "ssm": None}
        u, conv = self.conv1d.scan(u, state["conv"], segments)
        inputs, initial_state = self._scan_inputs(u, others), state["ssm"]
        if segments.shard is not None:
            own = selective_scan_map(u, *inputs, self.dt_proj.bias, segments.seq_idx)
            initial_state = segments.shard.entering_state(*own)
        y, ssm = vision_scan.selective_scan(
            u, *inputs, z=z, initial_state=initial_state, return_final_state=True,
            seq_idx=segments.seq_idx, **self._scan_parameters(),
        )  # fmt: skip
        return y, {"conv": conv, "ssm": ssm}

    def _update(self, u, z, others, state, segments) -> tuple[Tensor, LayerState]:
        u = self.conv1d.update(u, state["conv"], segments)
        y = vision_scan.selective_scan_update(
            state["ssm"], u, *self._scan_inputs(u, others), z=z, seq_idx=segments.seq_idx, **self._scan_parameters()
        )
        return y, state

    def _scan_inputs(self, u: Tensor, others: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """dt before its bias, A, B and C for u (batch, d_inner, seqlen); with d_xb, B, C and what dt comes through are
        given (batch, seqlen, ...), and B and C have a group for each head."""
        d_state = self.config.d_state
        if self.x_proj is None:
            B, C, low = others
            B, C = (norm(by_head(t, d_state, self.d_inner)) for norm, t in ((self.B_norm, B), (self.C_norm, C)))
        else:
            low, B, C = self.x_proj(u.transpose(1, 2)).split([self.dt_rank, d_state, d_state], dim=-1)
            B, C = self.B_norm(B), self.C_norm(C)
        dt = self.dt_proj(self.dt_norm(low)).transpose(1, 2)
        return dt, -torch.exp(self.A_log), B.movedim(1, -1), C.movedim(1, -1)

    def _scan_parameters(self) -> dict:
        return {"D": self.D, "dt_bias": self.dt_proj.bias, "dt_softplus": True}
