"""Parameters that stay float32 whatever the model's dtype, and the norm of modules on grids."""

import torch
from torch import Tensor, nn


class Float32Parameters(nn.Module):
    """A module whose parameters and buffers named in `float32_parameters` are never stored in half precision.

    `model.to(torch.bfloat16)`, `.half()` and every engine that casts through `nn.Module` leave them in
    float32; `.double()` still makes them float64. Decays, steps and norms lose accuracy in 16 bits that
    no later computation brings back.
    """

    float32_parameters: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        own = [getattr(self, name) for name in self.float32_parameters]
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


class LayerNorm(Float32Parameters):
    """Layer normalisation over the last axis, in float32; dtype of x in and out."""

    float32_parameters = ("weight", "bias")

    def __init__(self, d: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None
        if not bias:
            self.float32_parameters = ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.weight.dtype)
        y = nn.functional.layer_norm(wide, self.weight.shape, self.weight, self.bias, self.eps)
        return y.to(x.dtype)


class BatchNorm2d(Float32Parameters, nn.BatchNorm2d):
    """Batch normalisation of (batch, channels, height, width), in float32; dtype of x in and out."""

    float32_parameters = ("weight", "bias", "running_mean", "running_var")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
