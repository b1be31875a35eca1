"""`gated_rmsnorm` on the kernels of csrc/cuda/norm.h."""

import torch
from torch import Tensor

from ..layout import wanted
from .layout import DTYPES, cells, common_dtype, parameter

MOST_GROUP = 16384  # kMostGroup in csrc/cuda/norm.h


def _serves(x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, before: bool) -> bool:
    groups = x.numel() // group_size
    return x.dtype in DTYPES and group_size <= MOST_GROUP and 0 < groups < 2**31


def _serves_backward(grads, *args) -> bool:
    return _serves(*args[:-1])


def _arguments(x, weight, z, eps, group_size, norm_before_gate) -> tuple:
    dtype = x.dtype if z is None else common_dtype(x, z)
    x, z = (None if t is None else cells(t.to(dtype).reshape(-1, t.shape[-1]), 1) for t in (x, z))
    return x, parameter(weight, dtype), z, eps, group_size, norm_before_gate


def _norm(x, *others) -> Tensor:
    y = torch.ops.vision_scan_cuda.norm(*_arguments(x, *others))
    return y.view(x.shape).to(x.dtype)


def _norm_backward(grads, *args) -> list[Tensor]:
    *inputs, needs = args
    x, *others = _arguments(*inputs)
    dy = grads[0].to(x.dtype).reshape(x.shape).contiguous()
    dx, dweight, dz = torch.ops.vision_scan_cuda.norm_backward(dy, x, *others)
    return wanted(inputs, {0: dx, 1: dweight, 2: dz}, needs)


KERNELS = {
    "gated_rmsnorm": (_norm, _serves),
    "gated_rmsnorm_backward": (_norm_backward, _serves_backward),
}
