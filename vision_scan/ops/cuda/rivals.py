"""Kernels of other packages, asked where ours are missing or do not serve: the functions that `mamba_ssm`,
`causal_conv1d` and `fla` publish, if these are installed. They are imported at the first call that they serve."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache

from torch import Tensor

from ..register import take_over_with_gradients
from . import gated_delta_rule
from .layout import DTYPES

CONVOLUTION = "causal_conv1d.causal_conv1d_fn"
SELECTIVE_SCAN = "mamba_ssm.ops.selective_scan_interface.selective_scan_fn"
SSD = "mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined"
CHUNK_SIZE = 256  # what mamba_ssm's own layers take


def take_over_all(device: str = "cuda") -> None:
    """Registers those that are installed, behind our own kernels."""
    for name, path, run, serves, serves_backward in (
        ("causal_conv1d", CONVOLUTION, _conv, _serves_conv, _backward_as(_serves_conv)),
        ("selective_scan", SELECTIVE_SCAN, _selective, _serves_selective, _serves_selective_backward),
        ("ssd", SSD, _ssd, _serves_ssd, _backward_as(_serves_ssd)),
        (
            "gated_delta_rule", gated_delta_rule.MODULE, gated_delta_rule.scan, gated_delta_rule.serves,
            _backward_as(gated_delta_rule.serves),
        ),
    ):
        package = path.split(".")[0]
        if package in sys.modules or importlib.util.find_spec(package):
            take_over_with_gradients(name, device, run, serves, serves_backward, package)


@cache
def _function(path: str) -> Callable:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _backward_as(serves: Callable[..., bool]) -> Callable[..., bool]:
    return lambda grads, *args: serves(*args[:-1])


def _same_dtype(*tensors: Tensor | None) -> bool:
    dtype = next(t.dtype for t in tensors if t is not None)
    return dtype in DTYPES and all(t is None or t.dtype == dtype for t in tensors)


def _serves_conv(x, weight, bias, activation, initial_state, seq_idx, cu_seqlens) -> bool:
    """With `seq_idx` it gives no final state."""
    fits = x.shape[1] % 8 == 0 and 2 <= weight.shape[1] <= 4 and x.dtype in DTYPES and x.numel() > 0
    return fits and seq_idx is None and cu_seqlens is None


def _conv(x, weight, bias, activation, initial_state, seq_idx, cu_seqlens) -> tuple[Tensor, Tensor]:
    """States are for channels last only, in steps of 16 bytes."""
    tokens = x.transpose(1, 2)
    if x.stride(1) != 1 or x.stride(0) % 8 or x.stride(2) % 8 or x.data_ptr() % 16:
        tokens = tokens.contiguous()
    state = (
        None
        if initial_state is None
        else initial_state.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    )
    y, state = _function(CONVOLUTION)(
        tokens.transpose(1, 2), weight, None if bias is None else bias.to(weight.dtype),
        initial_states=state, return_final_states=True, activation=activation or None,
    )  # fmt: skip
    return y.transpose(1, 2).contiguous().transpose(1, 2), state.contiguous()


def _serves_selective(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens) -> bool:
    fits = _same_dtype(u, dt, B, C, z) and A.shape[1] <= 256 and u.numel() > 0
    from_zero = initial_state is None and seq_idx is None and cu_seqlens is None
    return fits and from_zero


def _serves_selective_backward(grads, *args) -> bool:
    """It takes no gradient of the final state."""
    return grads[1] is None and _serves_selective(*args[:-1])


def _selective(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens
) -> tuple[Tensor, Tensor]:
    A, D, dt_bias = (None if t is None else t.float() for t in (A, D, dt_bias))
    y, state = _function(SELECTIVE_SCAN)(
        u, dt, A, B, C, D, z, dt_bias, delta_softplus=dt_softplus, return_last_state=True
    )
    return y.contiguous(), state.float().contiguous()


def _serves_ssd(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens, chunk_size
) -> bool:
    """Its `seq_idx` knows no padding, and drops an initial state."""
    fits = _same_dtype(x, B, C, z) and x.numel() > 0
    return fits and seq_idx is None and cu_seqlens is None


def _ssd(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens, chunk_size
) -> tuple[Tensor, Tensor]:
    A, D, dt_bias = (None if t is None else t.float() for t in (A, D, dt_bias))
    y, state = _function(SSD)(
        x, dt, A, B, C, CHUNK_SIZE, D=D, z=z, dt_bias=dt_bias, initial_states=initial_state,
        dt_softplus=dt_softplus, dt_limit=(dt_min, dt_max), return_final_states=True,
    )  # fmt: skip
    return y.contiguous(), state.float().contiguous()
