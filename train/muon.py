"""Muon, for matrices from features to features: a step is the nearly orthogonal matrix next to the momentum.
A kernel of a convolution is taken as the matrix from the inputs of all its places to its outputs.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; steps as large as
AdamW's, so that one learning rate serves both: Liu et al. 2025 (arXiv:2502.16982).

torch.optim.Muon does the same matrix after matrix in bfloat16, which is slow on a CPU without instructions
for it; this takes matrices of one shape together, in float32.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of the quintic polynomial, the steepest at zero
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    Args:
        params: matrices or kernels (outputs, inputs, ...), or groups of them.
        lr, momentum, weight_decay: as those of torch.optim.Muon with adjust_lr_fn="match_rms_adamw".
    """

    def __init__(
        self, params: Iterable, lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for parameters in shapes.values():
                self._step(parameters, group)

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One step of parameters of one shape."""
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        nesterov = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"])).flatten(2)
        steps = orthogonalize(nesterov).view(-1, *parameters[0].shape)
        # The root mean square of an update of AdamW is about 0.2.
        size = 0.2 * max(nesterov.shape[1:]) ** 0.5
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(steps.unbind()), alpha=-group["lr"] * size)


def orthogonalize(matrices: Tensor) -> Tensor:
    """(n, rows, cols) -> U S V^T for each matrix's singular vectors U, V, the singular values S between about
    0.7 and 1.2 instead of all 1, which serves as well; float32."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.shape[2] > 1.5 * x.shape[1]:
        x = _on_gram(x)
    else:
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


def _on_gram(x: Tensor) -> Tensor:
    """The same iterations for wide matrices with fewer products as wide as they are: every step multiplies by a
    polynomial of x x^T, and such polynomials commute, so they are brought together before they meet x."""
    a, b, c = COEFFICIENTS
    gram, product = x @ x.mT, None
    for left in reversed(range(ITERATIONS)):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if left:
            gram = factor @ (factor @ gram)
    return product @ x
