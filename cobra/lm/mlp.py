"""The gated feed-forward layer of Llama-like transformers.

Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202); parameter names as in Llama.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from cobra.typed_config import require_positive

from .decode import stored
from .mixer import LayerCost, LayerState, Segments
from .precision import Projection, RMSNorm


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """SwiGLU: down(SiLU(gate(x)) * up(x)) with d_ff channels inside."""

    kind: Literal["mlp"] = "mlp"
    d_ff: int

    def __post_init__(self) -> None:
        require_positive(self, "d_ff")

    def cost(self, d_model: int) -> LayerCost:
        parameters = 3 * d_model * self.d_ff
        return LayerCost(parameters=parameters, flops_per_token=2 * parameters)


class MLP(nn.Module):
    """See the contract in mixer.py. It has no state."""

    Config = MLPConfig
    residual_projection = "down_proj"
    reads_shards = True
    step_states = ()

    def __init__(self, config: MLPConfig, d_model: int) -> None:
        super().__init__()
        self.gate_proj = Projection(d_model, config.d_ff)
        self.up_proj = Projection(d_model, config.d_ff)
        self.down_proj = Projection(config.d_ff, d_model)
        for proj in (self.gate_proj, self.up_proj):
            nn.init.normal_(proj.weight, std=d_model**-0.5)  # of unit size, as an attention layer's

    def allocate(self, batch: int, capacity: int, device, dtype) -> LayerState:
        return {}

    def add_to(self, decoder, norm: RMSNorm) -> None:
        projections = [stored(proj) for proj in (self.gate_proj, self.up_proj, self.down_proj)]
        decoder.add_mlp(norm.weight, norm.eps, *projections, self.gate_proj.out_features)

    def forward(self, x: Tensor, state: LayerState | None, segments: Segments) -> tuple[Tensor, LayerState]:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)), {}
