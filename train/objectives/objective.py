"""What every objective is."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cobra.model import Cobra
from train.data.collate import Batch
from train.data.dataset import Dataset
from train.data.rows import BadRowError, Row
from train.settings import PARTS, Part, RunConfig
from vision_scan.errors import UserError

Stats = dict[str, Tensor]
"""name -> float32 (2,): a sum and what to divide it by, both to be added up over batches and
processes."""


class Objective(nn.Module):
    """A model and its loss: `forward(inputs) -> (sum of losses, stats)`, under autocast if a dtype
    is given."""

    needs: str
    """The key that a row cannot do without."""
    parts: tuple[Part, ...] = PARTS
    """The parts of the model that run."""
    most_zero_stage = 3
    """Of `zero.stage`: an objective that reads parameters outside of their modules' calls finds them whole up to 2."""
    frozen_readers: tuple[Cobra, ...] = ()
    """Models that read each batch too, of which nothing learns by it; the learning one without its adapters may be
    one."""

    def __init__(self, model: Cobra, rows: Dataset, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    @classmethod
    def build(
        cls, config: RunConfig, model: Cobra, rows: Dataset, autocast: torch.dtype | None, device: torch.device
    ) -> "Objective":
        """The objective of a run; one with settings of its own, or with a second model, takes them from there."""
        return cls(model, rows, autocast)

    def freeze_idle(self) -> None:
        """Freezes what does not learn under this objective, beside what `train.freeze` names."""

    def sample(self, row: Row) -> Any:
        """What `collate` needs of a row.

        Raises:
            BadRowError: if the row cannot be used after all.
        """
        try:
            return self._sample(row)
        except (UserError, OSError) as error:
            raise BadRowError(f"row {row.id}: {error}") from error

    def _sample(self, row: Row) -> Any:
        raise NotImplementedError

    def num_tokens(self, row: Row) -> int:
        """How many tokens (or patches) the model reads of a row."""
        raise NotImplementedError

    def measure(self, row: Row) -> tuple[int, int]:
        """How many tokens a whole row has, and how many of them are learned."""
        raise NotImplementedError

    def describe(self) -> Iterator[str]:
        """Lines of the plan on what belongs to it beside the model."""
        return iter(())

    def collate(self, samples: Sequence[Any]) -> Batch:
        raise NotImplementedError

    def compute(self, inputs: dict[str, Any]) -> tuple[Tensor, Stats]:
        raise NotImplementedError

    def forward(self, inputs: dict[str, Any]) -> tuple[Tensor, Stats]:
        device = self.model.device.type
        # Without a cache: at ZeRO stage 3 it would keep a copy of every weight that is brought together.
        with torch.autocast(device, self.autocast, self.autocast is not None, cache_enabled=False):
            return self.compute(inputs)

    def extra_state(self) -> dict[str, Tensor]:
        """Parameters that are not the model's and stay with the training run."""
        state = self.state_dict()
        return {name: tensor for name, tensor in state.items() if not name.startswith("model.")}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Undoes `extra_state`.

        Raises:
            UserError: if the names are not this objective's.
        """
        if state.keys() != self.extra_state().keys():
            raise UserError(
                f"the saved objective has {sorted(state)}, this one {sorted(self.extra_state())}"
            )
        self.load_state_dict(state, strict=False)
