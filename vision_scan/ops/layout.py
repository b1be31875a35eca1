"""How compiled kernels of any device take tensors, and give gradients back."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor


@overload
def plain(t: Tensor) -> Tensor: ...
@overload
def plain(t: None) -> None: ...
def plain(t):
    """Contiguous float32."""
    return None if t is None else t.float().contiguous()


def wanted(inputs: Sequence, gradients: dict[int, Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """The gradients that are needed, each with the dtype and layout of its input."""
    return [like(inputs[i], gradients[i].reshape(inputs[i].shape)) for i, need in enumerate(needs) if need]


def like(value: Tensor, gradient: Tensor) -> Tensor:
    target = torch.empty_like(value)
    if target.stride() == gradient.stride() and target.dtype == gradient.dtype:
        return gradient
    return target.copy_(gradient)


def through_gate(dy: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and z, given that of y SiLU(z)."""
    z = z.float()
    gate = torch.sigmoid(z)
    return dy * z * gate, dy * y * gate * (1 + z * (1 - gate))
