"""What is computed in which dtype: parameters that stay float32 whatever the model's dtype, norms that use
them, and products in a dtype that the machine is fast in."""

import functools

import torch
from torch import Tensor, nn


class Float32Parameters(nn.Module):
    """A module whose parameters named in `float32_parameters` are never stored in half precision.

    `model.to(torch.bfloat16)`, `.half()` and every engine that casts through `nn.Module` leave them in
    float32; `.double()` still makes them float64. Decays, steps and norms lose accuracy in 16 bits that
    no later computation brings back.
    """

    float32_parameters: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        own = [self._parameters[name] for name in self.float32_parameters]
        kept = {id(tensor) for parameter in own for tensor in (parameter, parameter.grad)}

        def cast(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            half = result.is_floating_point() and result.element_size() < 4
            if half and id(tensor) in kept:  # not by way of the half precision: that would round it
                return tensor.to(result.device, torch.promote_types(tensor.dtype, torch.float32))
            return result

        if recurse:
            for module in self.children():
                module._apply(fn)
        return super()._apply(cast, recurse=False)


class RMSNorm(Float32Parameters):
    """x / rms(x) * weight over the last axis, in float32; dtype of x in and out."""

    float32_parameters = ("weight",)

    def __init__(self, d: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.weight.dtype)
        return nn.functional.rms_norm(wide, self.weight.shape, self.weight, self.eps).to(x.dtype)


class LayerNorm(Float32Parameters):
    """Layer normalisation over the last axis, in float32; dtype of x in and out."""

    float32_parameters = ("weight", "bias")

    def __init__(self, d: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.weight.dtype)
        y = nn.functional.layer_norm(wide, self.weight.shape, self.weight, self.bias, self.eps)
        return y.to(x.dtype)


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
