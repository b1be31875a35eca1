"""RMS normalisation, optionally gated, over groups of channels."""

import torch
from torch import Tensor

from .checks import check_shape
from .reference import gated_rmsnorm as reference
from .register import register


def _fake(x, weight, z, eps, group_size, norm_before_gate):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_gated_rmsnorm = register(
    "gated_rmsnorm",
    "Tensor x, Tensor weight, Tensor? z, float eps, int group_size, bool norm_before_gate",
    1,
    reference.gated_rmsnorm_direct,
    _fake,
)


def gated_rmsnorm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """RMS(x SiLU(z)) weight, or RMS(x) weight SiLU(z) with `norm_before_gate`; computed in float32.

    Args:
        x: (..., d), any float dtype; z: the same shape, or None for a plain RMS norm.
        weight: (d,).
        group_size: channels that share one root mean square; None: all d.
    Returns:
        (..., d), dtype of x.
    Raises:
        ValueError: on shapes that do not fit.
    Source: Dao & Gu 2024 (arXiv:2405.21060), section 7.
    """
    d = x.shape[-1]
    group_size = group_size or d
    check_shape("weight", weight, (d,))
    check_shape("z", z, x.shape)
    if d % group_size:
        raise ValueError(f"d {d} must be a multiple of group_size {group_size}")
    return _gated_rmsnorm(x, weight, z, eps, group_size, norm_before_gate)
