"""Several mixers side by side, which read the same normed tokens and whose outputs are added up.

Source: the hybrid heads of Falcon-H1 (Zuo et al. 2025, arXiv:2507.22448): Mamba-2 beside attention.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from vision_scan.errors import UserError

from .kinds import KINDS, KindConfig
from .mixer import LayerCost, LayerState, Segments


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The mixers, of any kinds but this one."""

    kind: Literal["parallel"] = "parallel"
    mixers: tuple[KindConfig, ...]

    def __post_init__(self) -> None:
        if len(self.mixers) < 2:
            raise UserError(f"parallel: {len(self.mixers)} mixers, there must be 2 or more")
        if len({getattr(mixer, "window", None) for mixer in self.mixers if mixer.kind == "attention"}) > 1:
            raise UserError("parallel: its attention layers must have one window, or none")

    def cost(self, d_model: int) -> LayerCost:
        return sum((mixer.cost(d_model) for mixer in self.mixers[1:]), self.mixers[0].cost(d_model))


class Parallel(nn.Module):
    """See the contract in mixer.py. State: those of the mixers, the number of the mixer and a point in front of each
    name, for instance `0.ssm`."""

    Config = ParallelConfig

    def __init__(self, config: ParallelConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.mixers = nn.ModuleList(KINDS[mixer.kind](mixer, d_model) for mixer in config.mixers)
        self.reads_shards = all(getattr(mixer, "reads_shards", False) for mixer in self.mixers)

    def allocate(self, batch: int, capacity: int, device, dtype) -> LayerState:
        return join([mixer.allocate(batch, capacity, device, dtype) for mixer in self.mixers])

    def forward(self, x: Tensor, state: LayerState | None, segments: Segments) -> tuple[Tensor, LayerState]:
        y, states = 0.0, []
        for number, mixer in enumerate(self.mixers):
            own = None if state is None else part_of(state, number)
            part, after = mixer(x, own, segments)
            y = y + part
            states.append(after)
        return y, join(states)


def join(states: list[LayerState]) -> LayerState:
    """One state of those of several mixers, the number of the mixer and a point in front of each name."""
    return {f"{number}.{name}": tensor for number, state in enumerate(states) for name, tensor in state.items()}


def part_of(state: LayerState, number: int) -> LayerState:
    """That of one of the mixers."""
    prefix = f"{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
