"""Vision encoders: pixels in [0, 1] to a grid of features. Each normalises with the mean and standard
deviation that it was trained with, so callers never do.

An encoder is a module `Encoder(config, image)` with `forward(pixel_values (n, 3, height, width)) -> (n,
grid_height, grid_width, d_model)`, the attribute `d_model`, and a Config with `grid(height, width)` and `stride`, how
many pixels a cell has each way: tiles may have any multiple of it as height and width. A Config whose encoder cannot
take them raises a UserError instead. `check_attention(what, blocks)` raises a UserError that begins with `what` if it
cannot tell the attention of those blocks, counted from 0, or backwards from -1, the one whose features are given; one
that can returns features and a `PatchAttention` of each if called with `attention_of=blocks`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Union

from torch import nn

from cobra.towers import Tower
from vision_scan.errors import UserError

from .patches import PatchAttention, patch_grid
from .s2 import TOWERS, S2Encoder, S2EncoderConfig
from .small import SmallEncoder, SmallEncoderConfig, position_grid
from .timm_towers import FusedEncoder, FusedEncoderConfig, TimmEncoder, TimmEncoderConfig

VISION_ENCODERS: dict[str, type[nn.Module]] = {**TOWERS, "s2": S2Encoder}

VisionEncoderConfig = Union[tuple(encoder.Config for encoder in VISION_ENCODERS.values())]  # noqa: UP007

__all__ = [
    "VISION_ENCODERS",
    "FusedEncoder",
    "FusedEncoderConfig",
    "PatchAttention",
    "S2Encoder",
    "S2EncoderConfig",
    "SmallEncoder",
    "SmallEncoderConfig",
    "TimmEncoder",
    "TimmEncoderConfig",
    "VisionEncoderConfig",
    "load_tower_weights",
    "patch_grid",
    "position_grid",
]


def load_tower_weights(encoder: nn.Module, paths: Sequence[str | Path]) -> None:
    """Fills the towers of a vision encoder with pretrained weights of local files.

    Position embeddings of another image size are resampled as timm does it. What the published model has
    behind the features that the encoder takes is left out: later blocks, final norm, pooling, head. All else
    has to be there, and nothing but it.

    Args:
        encoder: a TimmEncoder, FusedEncoder, one of cobra/towers, or an S2Encoder around one, of any image size,
            dtype and device.
        paths: a file for each tower, in order: the state dict of the timm model, or of the classifier that the
            authors released, as .safetensors or as a pickle of plain tensors (.bin, .pth, .pt).
    Raises:
        UserError: naming the file, if it is missing or damaged, or the tensors that are missing, unexpected
            or of another shape; or if files and towers differ in number.
    """
    towers = [module for module in encoder.modules() if isinstance(module, TimmEncoder | Tower)]
    if len(towers) != len(paths):
        names = ", ".join(tower.name for tower in towers) or "none"
        raise UserError(
            f"{len(paths)} tower files for {len(towers)} pretrained towers ({names}): give one for each, in order"
        )
    for tower, path in zip(towers, paths, strict=True):
        tower.load_weights(path)
