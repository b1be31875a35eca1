"""What is computed in which dtype: the norm of a language model, and products in a dtype that the machine is
fast in."""

import functools

import torch
from torch import Tensor, nn

from vision_scan.precision import Float32Parameters


class RMSNorm(Float32Parameters):
    """x / rms(x) * weight over the last axis, in float32 at least; dtype of x in and out. Without a weight, if not
    `elementwise_affine`."""

    float32_parameters = ("weight",)

    def __init__(self, d: int, eps: float = 1e-5, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d)) if elementwise_affine else None
        if not elementwise_affine:
            self.float32_parameters = ()

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32) if self.weight is None else self.weight.dtype)
        return nn.functional.rms_norm(wide, x.shape[-1:], self.weight, self.eps).to(x.dtype)


class Projection(nn.Linear):
    """y = x W^T, and a bias (zero at the start) where one is asked for; see `project`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times the transposed weight (out, in), plus a bias (out,); dtype of x, or of autocast where
    it is active."""
    wanted, dtype = _asked_dtype(x), product_dtype(x)
    if dtype == wanted:
        return nn.functional.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else bias.to(dtype)
        return nn.functional.linear(x.to(dtype), weight.to(dtype), bias).to(wanted)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x is multiplied: a CPU without instructions for half precision multiplies in
    float32, many times faster."""
    wanted = _asked_dtype(x)
    is_slow = wanted.itemsize < 4 and x.device.type == "cpu" and not has_native_bf16("cpu")
    return torch.float32 if is_slow else wanted


def _asked_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    if kind == "meta":  # has no autocast
        return x.dtype
    autocast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


@functools.cache
def has_native_bf16(device: str | torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    if kind == "cpu":
        # Private names of torch, so their absence means "no". AMX comes with AVX-512 bf16.
        return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return False
