"""What is minimised, and the settings of objectives that have some."""

from dataclasses import dataclass
from typing import Literal

from .require import require

ObjectiveName = Literal[
    "conversation", "naming", "regions", "distill_mixer", "distill_hidden", "distill_logits", "preference"
]


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """A student with recurrent layers, and the transformer that it learns from (students.py)."""

    teacher: str | None = None
    """The model directory of the teacher, for the objectives `distill_*`; without `init.path` the student is made of
    it."""
    student: Literal["mamba2", "gated_deltanet"] = "mamba2"
    """The layers in place of attention, where the student is made of the teacher."""
    keep: tuple[int, ...] = ()
    """Attention layers, counted from 0, that stay where the student is made of the teacher; none: all are replaced."""
    label_share: float = 0.0
    """Of the probabilities that distill_logits teaches, the share that the row's own answer has; the teacher has the
    rest."""
    hidden_weight: float = 0.0
    """What distill_logits adds to the divergence for each answer's token: so many times the relative squared distance
    of the normed states that the head reads, over all tokens."""

    def __post_init__(self) -> None:
        require(len(set(self.keep)) == len(self.keep), f"distill.keep: got {self.keep}, allowed: each layer once")
        require(
            self.hidden_weight >= 0, f"distill.hidden_weight: got {self.hidden_weight}, allowed: 0 or more"
        )
        require(
            0 <= self.label_share < 1, f"distill.label_share: got {self.label_share}, allowed: 0 to below 1"
        )


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """How an answer is to be preferred to another (objectives/preference.py)."""

    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """sigmoid: DPO's; ipo: a squared distance, of log-probabilities per token; hinge: SLiC's."""
    beta: float = 0.1
    """How dear it is to move away from the reference."""
    label_smoothing: float = 0.0
    """loss=sigmoid: the share of rows whose answers are taken to be the wrong way round (conservative DPO)."""
    sft: float = 0.0
    """Weight of the chosen answer's own loss per token, which is added (RPO)."""
    reference: str | None = None
    """The directory of the model that is held against; None: that of init.path, as the run begins with it."""

    def __post_init__(self) -> None:
        require(self.beta > 0, f"preference.beta: got {self.beta}, allowed: more than 0")
        require(self.sft >= 0, f"preference.sft: got {self.sft}, allowed: 0 or more")
        require(
            0 <= self.label_smoothing < 0.5,
            f"preference.label_smoothing: got {self.label_smoothing}, allowed: 0 to below 0.5",
        )
        require(
            self.loss == "sigmoid" or self.label_smoothing == 0,
            f"preference.label_smoothing: got {self.label_smoothing}, allowed with preference.loss={self.loss}: 0",
        )
