"""The operators: schema, fake and autograd here, references in `reference/`, compiled kernels in csrc."""

from . import cpu, cuda
from .causal_conv1d import causal_conv1d, causal_conv1d_2d, causal_conv1d_update
from .gated_delta_rule import gated_delta_rule, gated_delta_rule_update
from .gated_rmsnorm import gated_rmsnorm
from .mamba3 import NO_DECAY, mamba3, mamba3_update
from .reference.segments import real_and_runs
from .reference.ssd import discretize, skip_and_gate
from .register import backend_report
from .selective_scan import selective_scan, selective_scan_2d, selective_scan_update
from .ssd import ssd, ssd_2d, ssd_update

cpu.take_over_all()  # once the others have registered their operators
cuda.take_over_all()

__all__ = [
    "NO_DECAY",
    "backend_report",
    "causal_conv1d",
    "causal_conv1d_2d",
    "causal_conv1d_update",
    "discretize",
    "gated_delta_rule",
    "gated_delta_rule_update",
    "gated_rmsnorm",
    "mamba3",
    "mamba3_update",
    "real_and_runs",
    "selective_scan",
    "selective_scan_2d",
    "selective_scan_update",
    "skip_and_gate",
    "ssd",
    "ssd_2d",
    "ssd_update",
]
