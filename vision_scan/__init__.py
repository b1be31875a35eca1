"""Scans over sequences and images: orders, operators, modules. Knows nothing of language."""

from .errors import UserError
from .modules import SS2D, SS2DConfig, VSSBlock
from .ops import (
    backend_report,
    causal_conv1d,
    causal_conv1d_2d,
    causal_conv1d_update,
    gated_delta_rule,
    gated_delta_rule_update,
    gated_rmsnorm,
    mamba3,
    mamba3_update,
    real_and_runs,
    selective_scan,
    selective_scan_2d,
    selective_scan_update,
    ssd,
    ssd_2d,
    ssd_update,
)
from .ordered_mixer import OrderedMixer
from .orders import SCAN_ORDERS, ScanOrder, order
from .orders.stacks import VOLUME_ORDERS, order_tiles, order_video, order_volume
from .scan import merge_2d, scan_2d

__all__ = [
    "SCAN_ORDERS",
    "SS2D",
    "VOLUME_ORDERS",
    "OrderedMixer",
    "SS2DConfig",
    "ScanOrder",
    "UserError",
    "VSSBlock",
    "backend_report",
    "causal_conv1d",
    "causal_conv1d_2d",
    "causal_conv1d_update",
    "gated_delta_rule",
    "gated_delta_rule_update",
    "gated_rmsnorm",
    "mamba3",
    "mamba3_update",
    "merge_2d",
    "order",
    "order_tiles",
    "order_video",
    "order_volume",
    "real_and_runs",
    "scan_2d",
    "selective_scan",
    "selective_scan_2d",
    "selective_scan_update",
    "ssd",
    "ssd_2d",
    "ssd_update",
]
