"""Blocks with weights far from their start, and grids for them, in float64."""

import torch
from torch import Tensor, nn


def randomised(module: nn.Module) -> nn.Module:
    """In float64, with weights far from their start, where norms are 1 and biases 0; so are stored statistics."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.double().state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=noise), alpha=0.3)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_var.abs_().add_(0.1)
    return module


def pictures(batch: int, height: int, width: int, d_model: int) -> Tensor:
    noise = torch.Generator().manual_seed(1)
    return torch.randn(batch, height, width, d_model, generator=noise, dtype=torch.float64)


def gradients_are_those_of(formula, module: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By name, of x and of every parameter: those of module(x) and those of formula(module, x)."""
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    found = []
    for run in (module, lambda own: formula(module, own)):
        own = x.clone().requires_grad_()
        loss = (run(own) * weights).sum()
        found.append(torch.autograd.grad(loss, [own, *module.parameters()]))
    names = ["x", *(name for name, _ in module.named_parameters())]
    return dict(zip(names, zip(*found, strict=True), strict=True))
