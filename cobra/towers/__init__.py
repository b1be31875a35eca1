"""Hierarchical state-space backbones as vision encoders.

A new one is a file here, and its class in HIERARCHICAL: vision_encoder/ and cost.py take it from there.
"""

from .efficientvmamba import EfficientVMamba
from .groupmamba import GroupMamba
from .tower import StagesConfig, Tower
from .vmamba import VMamba

HIERARCHICAL: dict[str, type[Tower]] = {
    "efficientvmamba": EfficientVMamba,
    "groupmamba": GroupMamba,
    "vmamba": VMamba,
}

# The released sizes by name, as settings of a vision encoder: vmamba-t, vmamba-s, ...
TOWERS: dict[str, StagesConfig] = {
    name: config for tower in HIERARCHICAL.values() for name, config in tower.RELEASED.items()
}
