"""A frozen model beside the one that learns: a teacher, a reference."""

from pathlib import Path

import torch

import cobra
import cobra.checkpoint
from cobra.model import Cobra
from train.data.images import short
from vision_scan.errors import UserError

SAME = ("template", "image", "token_reduction", "reading_order", "video", "tokens_per_tile")  # in both models


class Companion:
    """Holds a model without being a module, so that neither optimizer, engine nor checkpoint sees its parameters.

    Args:
        path: the model's directory.
        learner: reads the same rows.
        setting: that names the directory, for messages.
        dtype: of its weights; None: float32.
    Raises:
        UserError: if there is no model, or it reads rows otherwise.
    """

    def __init__(
        self, path: str | Path, learner: Cobra, setting: str, dtype: torch.dtype | None, device: torch.device
    ) -> None:
        check_reads_alike(learner, path, setting)
        self.path = path
        self.model = cobra.load(path, device=device, dtype=dtype or torch.float32).requires_grad_(False)
        if self.model.tokenizer.to_json() != learner.tokenizer.to_json():
            raise UserError(
                f"{setting}={path} has another tokenizer than the model that learns; both must read the same tokens"
            )

    def describe(self) -> str:
        """For the plan of a run."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"{self.path}, {count:,} parameters in {dtype}, frozen"


def check_reads_alike(model: Cobra, path: str | Path, setting: str) -> None:
    """Whether a companion reads the rows that are made for the model.

    Raises:
        UserError: if not, or if there is no model.
    """
    if not Path(path).is_dir():
        raise UserError(f"{setting}={path}: no such model directory")
    stored = cobra.checkpoint.read_config(path)
    for name in SAME:
        theirs, ours = getattr(stored, name), getattr(model.config, name)
        if theirs != ours:
            raise UserError(
                f"{setting}={path} has {name} {short(theirs)}, the model that learns {short(ours)}: both must read the "
                "same rows; set model.preset, or what differs below model."
            )
