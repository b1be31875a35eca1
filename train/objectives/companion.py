"""A frozen model beside the one that learns: a teacher, a reference."""

from pathlib import Path

import torch

import cobra
import cobra.checkpoint
from cobra.model import Cobra
from vision_scan.errors import UserError


class Companion:
    """Holds a model without being a module, so that neither optimizer, engine nor checkpoint sees its parameters.

    Args:
        path: the model's directory.
        learner: reads the same tokens.
        setting: that names the directory, for messages.
        dtype: of its weights; None: float32.
    Raises:
        UserError: if there is no model, or if it has another tokenizer.
    """

    def __init__(
        self, path: str | Path, learner: Cobra, setting: str, dtype: torch.dtype | None, device: torch.device
    ) -> None:
        if not Path(path).is_dir():
            raise UserError(f"{setting}={path}: no such directory; give a model directory")
        self.model = cobra.load(path, device=device, dtype=dtype or torch.float32).requires_grad_(False)
        if self.model.tokenizer.to_json() != learner.tokenizer.to_json():
            raise UserError(
                f"{setting}={path} has another tokenizer than the model that learns; both must read the same tokens"
            )
