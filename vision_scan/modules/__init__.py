"""Blocks that scan grids, channels last; each is (batch, height, width, d_model) -> the same shape and dtype."""

from .es2d import ES2D, ChannelGate, EVSSBlock
from .group import DIRECTIONS, GROUP, ConvMLP, GroupMambaBlock, GroupMambaLayer
from .plane import PlaneScan, plane_scan
from .released import Released, adapt_released
from .ss2d import MLP, SS2D, VMAMBA, ListProjection, SS2DConfig, VSSBlock

__all__ = [
    "DIRECTIONS",
    "ES2D",
    "GROUP",
    "MLP",
    "SS2D",
    "VMAMBA",
    "ChannelGate",
    "ConvMLP",
    "EVSSBlock",
    "GroupMambaBlock",
    "GroupMambaLayer",
    "ListProjection",
    "PlaneScan",
    "Released",
    "SS2DConfig",
    "VSSBlock",
    "adapt_released",
    "plane_scan",
]
