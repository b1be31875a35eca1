"""The feed-forward layer of transformers, gated as in Llama or not.

Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202); relu2: So et al. 2021, "Primer"
(arXiv:2109.08668); parameter names as in Llama.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from cobra.typed_config import require_positive
from vision_scan.errors import choose

from .decode import UnservableError, stored
from .mixer import LayerCost, LayerState, Segments
from .precision import Projection, RMSNorm


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """down(act(gate(x)) * up(x)) with d_ff channels inside, SwiGLU by default.

    Attributes:
        activation: a name of ACTIVATIONS.
        gated: otherwise down(act(up(x))), without a gate.
        bias: of all projections.
    """

    kind: Literal["mlp"] = "mlp"
    d_ff: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "d_ff")
        choose("mlp activation", self.activation, ACTIVATIONS)

    def cost(self, d_model: int) -> LayerCost:
        projections = (2 + self.gated) * d_model * self.d_ff
        biases = self.bias * ((1 + self.gated) * self.d_ff + d_model)
        return LayerCost(parameters=projections + biases, flops_per_token=2 * projections)


class MLP(nn.Module):
    """See the contract in mixer.py. It has no state."""

    Config = MLPConfig
    residual_projection = "down_proj"
    reads_shards = True
    step_states = ()

    def __init__(self, config: MLPConfig, d_model: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_proj = Projection(d_model, config.d_ff, config.bias) if config.gated else None
        self.up_proj = Projection(d_model, config.d_ff, config.bias)
        self.down_proj = Projection(config.d_ff, d_model, config.bias)
        for proj in filter(None, (self.gate_proj, self.up_proj)):
            nn.init.normal_(proj.weight, std=d_model**-0.5)  # of unit size, as an attention layer's

    def allocate(self, batch: int, capacity: int, device, dtype) -> LayerState:
        return {}

    def add_to(self, decoder, norm: RMSNorm) -> None:
        if self.gate_proj is None or self.activation != "silu":
            raise UnservableError
        projections = [stored(proj) for proj in (self.gate_proj, self.up_proj, self.down_proj)]
        decoder.add_mlp(norm.weight, norm.eps, *projections, self.gate_proj.out_features)

    def forward(self, x: Tensor, state: LayerState | None, segments: Segments) -> tuple[Tensor, LayerState]:
        act = ACTIVATIONS[self.activation]
        inside = act(self.up_proj(x)) if self.gate_proj is None else act(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inside), {}


def relu2(x: Tensor) -> Tensor:
    """The square of what is above 0."""
    return nn.functional.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu2": relu2,
    "silu": nn.functional.silu,
}
