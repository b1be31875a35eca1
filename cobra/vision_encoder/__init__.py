"""Vision encoders: pixels in [0, 1] to a grid of features. Each normalises with the mean and standard
deviation that it was trained with, so callers never do.

An encoder is a module `Encoder(config, image)` with `forward(pixel_values (n, 3, height, width)) -> (n,
grid_height, grid_width, d_model)`, the attribute `d_model`, and a Config with `grid(height, width)`. One that serves
token reductions has `check_attention()` too, which raises a UserError if it cannot, and returns features and
`PatchAttention` if called with `return_attention=True`.
"""

from typing import Union

from torch import nn

from .patches import PatchAttention, patch_grid
from .s2 import TOWERS, S2Encoder, S2EncoderConfig
from .small import SmallEncoder, SmallEncoderConfig, position_grid
from .timm_towers import FusedEncoder, FusedEncoderConfig, TimmEncoder, TimmEncoderConfig, load_tower_weights

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
