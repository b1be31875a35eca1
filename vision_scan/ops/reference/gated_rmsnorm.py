"""RMS normalisation with a gate, over groups of channels.

    norm_before_gate False:  RMS(x SiLU(z)) weight        True:  RMS(x) weight SiLU(z)

Source: Dao & Gu 2024 (arXiv:2405.21060), section 7; without gate: Zhang & Sennrich 2019 (arXiv:1910.07467).
"""

import torch
from torch import Tensor


def gated_rmsnorm_direct(x, weight, z, eps, group_size, norm_before_gate) -> Tensor:
    """As the formula stands; arguments as `vision_scan.gated_rmsnorm`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    gate = None if z is None else torch.nn.functional.silu(z.to(dtype))
    y = x.to(dtype)
    if gate is not None and not norm_before_gate:
        y = y * gate
    y = torch.nn.functional.rms_norm(y.unflatten(-1, (-1, group_size)), (group_size,), eps=eps)
    y = y.flatten(-2) * weight.to(dtype)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


def gated_rmsnorm_by_group(x, weight, z, eps, group_size, norm_before_gate) -> Tensor:
    """One group after another, through the norm of the vector: the second truth."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    gate = 1.0 if z is None else z.to(dtype) * torch.sigmoid(z.to(dtype))
    y = x.to(dtype) if norm_before_gate else x.to(dtype) * gate
    groups = []
    for part in y.split(group_size, dim=-1):
        length = torch.sqrt((part * part).sum(-1, keepdim=True) / group_size + eps)
        groups.append(part / length)
    y = torch.cat(groups, dim=-1) * weight.to(dtype)
    return (y * gate if norm_before_gate else y).to(x.dtype)
