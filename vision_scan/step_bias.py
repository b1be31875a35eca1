"""Where step sizes begin, of every layer that takes softplus(dt + dt_bias) for its step."""

import math

import torch
from torch import Tensor


def initial_dt_bias(*shape: int, dt_min: float, dt_max: float) -> Tensor:
    """A tensor of `shape`, float32: biases whose softplus is log-uniform in [dt_min, dt_max], but at least 1e-4."""
    dt = torch.empty(shape).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
