"""Effective receptive fields: how much each cell of the input moves one cell of the output.

Source: Luo et al. 2016, "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks"
(arXiv:1701.04128), who send a gradient of 1 back from the central unit of the output and average over random inputs.
Theirs has one channel. With several, ones could cancel out, so what is sent back here is a random sign for each: the
mean of the squared gradients is then the squared Frobenius norm of the Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vision_scan.errors import UserError
from vision_scan.orders.scan_order import read_integer, read_size

THRESHOLD = 0.0455  # of the largest value, above which Luo et al. count a cell: two standard deviations of a Gaussian
NO_GRADIENT = "the function's result does not depend on its input with a gradient; leave out no_grad and detach"


def receptive_field(
    function: Callable[[Tensor], Tensor],
    height: int,
    width: int,
    channels: int,
    cell: tuple[int, int] | None = None,
    samples: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The effective receptive field of one cell of the output, over the cells of the input.

    The value at (i, j) is the root mean square, over inputs drawn from a standard normal distribution, of the Frobenius
    norm of d output[cell] / d input[i, j]; 0 where the cell does not depend on the input cell at all. No gradient
    reaches the parameters.

    Args:
        function: (1, height, width, channels) -> (1, out_height, out_width, out_channels), with a gradient: a module
            (in evaluation mode, if that makes a difference), or any callable.
        height, width, channels: of the input.
        cell: row and column in the output; None: its centre, (out_height // 2, out_width // 2).
        samples: inputs to average over.
        seed: of the inputs and signs.
        dtype, device: of the input.
    Returns:
        (height, width) float64, on the CPU.
    Raises:
        UserError: if a size or the cell is not allowed, or the function returns something else than a grid that
            depends on its input.
    """
    height, width = read_size(height, width)
    for what, value in (("channels", channels), ("samples", samples)):
        if value < 1:
            raise UserError(f"a receptive field takes 1 or more {what}, not {value}")
    noise = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        total = torch.zeros(height, width, dtype=torch.float64)
        for _ in range(samples):
            x = torch.randn(1, height, width, channels, generator=noise, dtype=torch.float64)
            x = x.to(device, dtype).requires_grad_()
            y = function(x)
            at = _place(y, cell)
            signs = torch.randint(2, (y.shape[3],), generator=noise) * 2 - 1
            (gradient,) = torch.autograd.grad(y[0, at[0], at[1]], x, signs.to(y), allow_unused=True)
            if gradient is None:
                raise UserError(NO_GRADIENT)
            total += gradient[0].double().square().sum(-1).cpu()
        return (total / samples).sqrt()


def _place(y: Tensor, cell: tuple[int, int] | None) -> tuple[int, int]:
    """The cell of a function's result, checked."""
    if not isinstance(y, Tensor) or y.dim() != 4 or len(y) != 1:
        given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise UserError(f"a receptive field is that of a function to (1, height, width, channels), not to {given}")
    if not y.requires_grad:
        raise UserError(NO_GRADIENT)
    rows, columns = y.shape[1:3]
    if cell is None:
        return rows // 2, columns // 2
    row, column = (read_integer("row and column of a cell", place, 0) for place in cell)
    if row >= rows or column >= columns:
        raise UserError(f"cell {row},{column} is outside of a grid of {rows}x{columns}; count rows and columns from 0")
    return row, column


def reached_share(field: Tensor) -> float:
    """The share of the cells on which the output depends at all: the theoretical receptive field."""
    return (field > 0).double().mean().item()


def effective_share(field: Tensor, threshold: float = THRESHOLD) -> float:
    """The share of the cells whose value is at least `threshold` of the largest."""
    return (field >= threshold * field.max()).double().mean().item() if field.any() else 0.0
