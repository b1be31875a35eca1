"""The Mamba-3 mixer: a trapezoidal rule in place of the short convolution, decays that depend on the token, and states
that turn; with a rank above 1 (MIMO) several keys, queries and values for each token and a state of the same size.

Source: Lahoti et al. 2026, "Mamba-3" (arXiv:2603.15569); parameter names, shapes and the order of the projections as
in the module of state-spaces/mamba, with A from its heavy-tailed map (its first versions took a softplus). States turn
in pairs (2i, 2i + 1) with a rank of 1 and (i, i + d_state // 2) above: so does that module where it decodes, as its
kernels for the two differ, and published weights could be read as they are. No checkpoint of either has been published.
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

from .mixer import UPDATE_TOKENS, LayerCost, LayerState, Segments
from .precision import Projection, RMSNorm


@dataclass(frozen=True, kw_only=True)
class Mamba3Config:
    """Mamba-3 with d_inner = expand * d_model in heads of headdim.

    A token has `rank` keys and queries, 1 being SISO, and `rope_fraction` of their d_state states turn in pairs. With
    `is_outproj_norm` each head is normalised in front of the gate. At the start dt is log-uniform in [dt_min, dt_max];
    -A is at least A_floor. chunk_size is in tokens times rank.
    """

    kind: Literal["mamba3"] = "mamba3"
    d_state: int = 128
    headdim: int = 64
    expand: int = 2
    ngroups: int = 1
    rank: int = 1
    rope_fraction: float = 0.5
    chunk_size: int = 64
    is_outproj_norm: bool = False
    norm_eps: float = 1e-5
    dt_min: float = 0.001
    dt_max: float = 0.1
    A_floor: float = 1e-4

    def __post_init__(self) -> None:
        require_positive(self, "d_state", "headdim", "expand", "ngroups", "rank", "chunk_size")
        if not 0 < self.rope_fraction <= 1 or self.num_phases < 1:
            raise UserError(
                f"mamba3: rope_fraction {self.rope_fraction} of d_state {self.d_state} must be at most all of it "
                "and at least one pair"
            )
        if not 0 < self.dt_min <= self.dt_max or self.A_floor <= 0:
            raise UserError("mamba3: dt_min, dt_max and A_floor must be above 0, dt_min at most dt_max")

    @property
    def num_phases(self) -> int:
        """Pairs of states that turn."""
        return int(self.d_state * self.rope_fraction) // 2

    def nheads(self, d_model: int) -> int:
        d_inner = self.expand * d_model
        if d_inner % self.headdim or (d_inner // self.headdim) % self.ngroups:
            raise UserError(
                f"mamba3: expand * d_model = {d_inner} must be a multiple of headdim {self.headdim}, "
                f"and the number of heads a multiple of ngroups {self.ngroups}"
            )
        return d_inner // self.headdim

    def in_proj_sizes(self, d_model: int) -> list[int]:
        """Rows of in_proj for z, x, B, C, dt, A, trap, angle."""
        d_inner, nheads = self.expand * d_model, self.nheads(d_model)
        keys = self.rank * self.ngroups * self.d_state
        return [d_inner, d_inner, keys, keys, nheads, nheads, nheads, self.num_phases]

    def cost(self, d_model: int) -> LayerCost:
        d_inner, nheads = self.expand * d_model, self.nheads(d_model)
        projections = d_model * sum(self.in_proj_sizes(d_model)) + d_inner * d_model
        keys = nheads * self.rank * self.d_state
        mimo = 3 * d_inner * self.rank if self.rank > 1 else 0
        norms = 2 * self.d_state + (d_inner if self.is_outproj_norm else 0)
        state = d_inner * self.d_state
        return LayerCost(
            parameters=projections + 2 * keys + 2 * nheads + mimo + norms,
            # The decay of an element of the state, and for each rank two inflows and a readout.
            flops_per_token=2 * projections + (1 + 6 * self.rank) * state,
            state_elements=state + keys + nheads * self.num_phases,
            tail_elements=d_inner,
        )


class Mamba3(Float32Parameters):
    """See the contract in mixer.py. State: `ssm` (batch, nheads, headdim, d_state) and `angle` (batch, nheads,
    num_phases), radians, in float32; of the last token `k` (batch, rank, nheads, d_state), turned, in float32, as a
    scan would have it, and `v` (batch, nheads, headdim) in the model's dtype, as it is projected."""

    Config = Mamba3Config
    residual_projection = "out_proj"
    step_projection = "in_proj"

    def __init__(self, config: Mamba3Config, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.d_inner = config.expand * d_model
        self.nheads = config.nheads(d_model)
        self._sizes = config.in_proj_sizes(d_model)
        self.in_proj = Projection(d_model, sum(self._sizes))
        self.dt_bias = nn.Parameter(initial_dt_bias(self.nheads, dt_min=config.dt_min, dt_max=config.dt_max))
        self.B_bias = nn.Parameter(torch.ones(self.nheads, config.rank, config.d_state))
        self.C_bias = nn.Parameter(torch.ones(self.nheads, config.rank, config.d_state))
        self.B_norm = RMSNorm(config.d_state, config.norm_eps)
        self.C_norm = RMSNorm(config.d_state, config.norm_eps)
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.float32_parameters = ("dt_bias", "B_bias", "C_bias", "D")
        if config.rank > 1:
            ranks = self.nheads, config.rank, config.headdim
            self.mimo_x = nn.Parameter(torch.full(ranks, 1 / config.rank))
            self.mimo_z = nn.Parameter(torch.ones(ranks))
            self.mimo_o = nn.Parameter(torch.full(ranks, 1 / config.rank))
            self.float32_parameters += ("mimo_x", "mimo_z", "mimo_o")
        self.norm = RMSNorm(self.d_inner, config.norm_eps) if config.is_outproj_norm else None
        self.out_proj = Projection(self.d_inner, d_model)

    def allocate(self, batch: int, capacity: int, device, dtype) -> LayerState:
        config, wide = self.config, torch.promote_types(dtype, torch.float32)
        heads = batch, self.nheads
        return {
            "ssm": torch.zeros(*heads, config.headdim, config.d_state, device=device, dtype=wide),
            "angle": torch.zeros(*heads, config.num_phases, device=device, dtype=wide),
            "k": torch.zeros(batch, config.rank, self.nheads, config.d_state, device=device, dtype=wide),
            "v": torch.zeros(*heads, config.headdim, device=device, dtype=dtype),
        }

    def forward(self, x: Tensor, state: LayerState | None, segments: Segments) -> tuple[Tensor, LayerState]:
        z, *projected = self.in_proj(x).split(self._sizes, dim=-1)
        inputs = {**self._scan_inputs(*projected), "seq_idx": segments.seq_idx}
        tokens = x.shape[1] * self.config.rank
        if state is not None and segments.overwrite and tokens <= UPDATE_TOKENS:
            y = vision_scan.mamba3_update(state, **inputs)
        else:
            chunk_size = self.config.chunk_size
            y, state = vision_scan.mamba3(**inputs, initial_state=state, chunk_size=chunk_size)
        return self.out_proj(self._gate(y, z).to(z.dtype)), state

    def step_sizes(self, projected: Tensor) -> Tensor:
        """dt as the scan takes it, (batch, seqlen, nheads) float32, from what `in_proj` gives."""
        return self._steps(projected.split(self._sizes, dim=-1)[4])

    def _steps(self, dt: Tensor) -> Tensor:
        return nn.functional.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)

    def _scan_inputs(self, v, B, C, dt, A, trap, angle) -> dict:
        """What `vision_scan.mamba3` takes, given the projections (batch, seqlen, rows)."""
        wide = self.dt_bias.dtype
        A, trap, angle = (t.to(wide) for t in (A, trap, angle))
        # Its tail is heavy: heads that hardly forget at all, 1 / (1 - A), need no extreme projections.
        rate = torch.where(A >= 0, 1 + A, 1 / (1 - A.clamp(max=0)))
        return {
            "x": v.unflatten(-1, (self.nheads, self.config.headdim)),
            "dt": self._steps(dt),
            "A": -rate.clamp(min=self.config.A_floor),
            "lam": torch.sigmoid(trap),
            "B": self._by_head(B.to(wide), self.B_norm, self.B_bias),
            "C": self._by_head(C.to(wide), self.C_norm, self.C_bias),
            "rate": math.pi * torch.tanh(angle),
            "D": self.D,
            "mimo_x": self.mimo_x if self.config.rank > 1 else None,
        }

    def _by_head(self, t: Tensor, norm: RMSNorm, bias: Tensor) -> Tensor:
        """(batch, seqlen, rank * ngroups * d_state) -> (batch, seqlen, rank, nheads, d_state)."""
        t = norm(t.unflatten(-1, (self.config.rank, self.config.ngroups, 1, self.config.d_state)))
        return (t + bias.transpose(0, 1).unflatten(1, (self.config.ngroups, -1))).flatten(3, 4)

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        """y (batch, seqlen, rank, nheads, headdim), z (batch, seqlen, d_inner) -> (batch, seqlen, d_inner)."""
        z = z.to(y.dtype).unflatten(-1, (1, self.nheads, self.config.headdim))
        if self.config.rank > 1:
            z = z * self.mimo_z.transpose(0, 1)
        if self.norm is None:
            y = y * nn.functional.silu(z)
        else:
            y = vision_scan.gated_rmsnorm(
                y.flatten(-2), self.norm.weight, z.flatten(-2), self.config.norm_eps, self.config.headdim, True
            ).view_as(y)
        if self.config.rank > 1:
            y = y * self.mimo_o.transpose(0, 1)
        return y.sum(2).flatten(-2)
