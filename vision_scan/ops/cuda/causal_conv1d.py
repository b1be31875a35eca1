"""`causal_conv1d` and `causal_conv1d_2d` on the kernels of csrc/cuda/conv.h."""

import torch
from torch import Tensor

from ..layout import wanted
from .layout import DTYPES, bounds_of, cells, lists_of, marks_of, parameter

MOST_TAPS = 16  # kMostTaps in csrc/cuda/conv.h


def _serves(x: Tensor, weight: Tensor, *others) -> bool:
    return x.dtype in DTYPES and x.numel() > 0 and 0 < weight.shape[-1] <= MOST_TAPS


def _serves_backward(grads, *args) -> bool:
    return _serves(*args)


def _arguments(x, weight, bias, activation, initial_state, seq_idx, cu_seqlens) -> tuple:
    """Channels last, as a grid of one list."""
    dtype = x.dtype
    return (
        cells(x.transpose(1, 2), 2),
        parameter(weight, dtype)[None],
        None if bias is None else parameter(bias, dtype)[None],
        activation == "silu",
        None if initial_state is None else initial_state.to(dtype).contiguous(),
        None,
        marks_of(seq_idx, cu_seqlens),
        bounds_of(cu_seqlens),
        True,
    )


def _conv(*args) -> tuple[Tensor, Tensor]:
    y, state = torch.ops.vision_scan_cuda.conv(*_arguments(*args))
    return y[:, 0].transpose(1, 2), state


def _conv_backward(grads, *args) -> list[Tensor]:
    *inputs, needs = args
    x, *others = _arguments(*inputs)
    dy = grads[0].to(x.dtype).transpose(1, 2).contiguous()[:, None]
    dstate = None if grads[1] is None else grads[1].to(x.dtype).contiguous()
    dx, dweight, dbias, dinitial = torch.ops.vision_scan_cuda.conv_backward(dy, dstate, x, *others)
    return wanted(inputs, {0: dx.transpose(1, 2), 1: dweight, 2: dbias, 4: dinitial}, needs)


def _arguments_2d(x, weight, bias, activation, index) -> tuple:
    dtype, num_cells = x.dtype, x.shape[-3] * x.shape[-2]
    lists, whole = lists_of(index)
    weight, bias = parameter(weight, dtype), parameter(bias, dtype)
    return (
        cells(x, x.dim() - 1).flatten(-3, -2),
        weight[None] if weight.dim() == 2 else weight,
        bias[None] if bias is not None and bias.dim() == 1 else bias,
        activation == "silu",
        None,
        lists,
        None,
        None,
        whole and lists.shape[1] == num_cells,
    )


def _conv_2d(x, *others) -> Tensor:
    y, _ = torch.ops.vision_scan_cuda.conv(*_arguments_2d(x, *others))
    return y.unflatten(2, x.shape[-3:-1])


def _conv_2d_backward(grads, *args) -> list[Tensor]:
    *inputs, needs = args
    x, *others = _arguments_2d(*inputs)
    dy = grads[0].to(x.dtype).contiguous().flatten(2, 3)
    dx, dweight, dbias, _ = torch.ops.vision_scan_cuda.conv_backward(dy, None, x, *others)
    return wanted(inputs, {0: dx, 1: dweight, 2: dbias}, needs)


KERNELS = {
    "causal_conv1d": (_conv, _serves),
    "causal_conv1d_backward": (_conv_backward, _serves_backward),
    "causal_conv1d_2d": (_conv_2d, _serves),
    "causal_conv1d_2d_backward": (_conv_2d_backward, _serves_backward),
}
