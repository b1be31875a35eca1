"""Images of any size as tiles: several behind an overview, or one in the image's own shape.

A tiling is a Config with the methods of `Tiling`; everything that reads, measures, trains on or counts images goes by
the layouts that it gives.
"""

from typing import Union

from .anyres import AnyResConfig, SpatialUnpad, TileLayout, fit
from .hired import HiREDConfig
from .layout import Layout, TileFrame, Tiling
from .sized import NativeConfig, SizedLayout
from .uhd import SliceSeparators, UHDConfig

TILINGS: dict[str, type[Tiling]] = {
    "anyres": AnyResConfig,
    "hired": HiREDConfig,
    "native": NativeConfig,
    "uhd": UHDConfig,
}

TilesConfig = Union[tuple(TILINGS.values())]  # noqa: UP007

__all__ = [
    "TILINGS",
    "AnyResConfig",
    "HiREDConfig",
    "Layout",
    "NativeConfig",
    "SizedLayout",
    "SliceSeparators",
    "SpatialUnpad",
    "TileFrame",
    "TileLayout",
    "TilesConfig",
    "Tiling",
    "UHDConfig",
    "fit",
]
