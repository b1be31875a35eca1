"""Mamba models that transformers wrote itself, on the kernels of this one."""

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import TypeVar

import torch
from torch import Tensor, nn

import vision_scan
from vision_scan.errors import UserError

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Makes a Mamba or Mamba-2 model of transformers use our scans and convolutions, in place.

    Its layers run as transformers wrote them, but for the functions that scan and convolve; logits, caches,
    gradients and generation stay what they are. Layers of models that call the same functions under the same
    names, such as Bamba's, are served too.

    Args:
        model: any module that holds such layers, on any device.
    Returns:
        the model.
    Raises:
        UserError: if there is no layer that calls one of these functions.
    """
    found = False
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        ours = {name: SCANS[name] for name in SCANS.keys() & set(forward.__code__.co_names)}
        if ours:
            found = True
            theirs = forward.__globals__
            function = FunctionType(
                forward.__code__,
                {**theirs, **{name: make(theirs[name]) for name, make in ours.items()}},
                forward.__name__,
                forward.__defaults__,
                forward.__closure__,
            )
            function.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(function, module)
    if not found:
        raise UserError(
            f"{type(model).__name__} has no layer that scans as transformers' Mamba and Mamba-2 do: "
            "give a model of theirs, of transformers 5.16 or newer"
        )
    return model


# Each takes transformers' function, to hand on what ours does not do, and returns one with its signature.


def _convolution(theirs: Callable) -> Callable:
    def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **kwargs) -> Tensor:
        if activation not in (None, "silu"):
            return theirs(hidden_states, weight, bias, activation, **kwargs)
        return vision_scan.causal_conv1d(hidden_states, weight, bias, activation)

    return causal_conv1d_fn


def _convolution_update(theirs: Callable) -> Callable:
    def causal_conv1d_update(hidden_states, conv_state, weight, bias=None, activation=None) -> Tensor:
        if activation not in (None, "silu"):
            return theirs(hidden_states, conv_state, weight, bias, activation)
        # Their window keeps an input more than is needed.
        window = conv_state[..., conv_state.shape[-1] + 1 - weight.shape[-1] :].contiguous()
        seen = torch.cat([conv_state, hidden_states.to(conv_state.dtype)], dim=-1)
        conv_state.copy_(seen[..., -conv_state.shape[-1] :])
        return vision_scan.causal_conv1d_update(window, hidden_states, weight, bias, activation)

    return causal_conv1d_update


def _ssd(theirs: Callable) -> Callable:
    def mamba2_chunk_scan(
        hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False,
        dt_limit=(0.0, float("inf")), return_final_states=False, **kwargs,
    ):  # fmt: skip
        return vision_scan.ssd(
            hidden_states.float(), dt, A, B, C, D, None, dt_bias, dt_softplus, dt_limit, initial_states,
            return_final_states, chunk_size=chunk_size,
        )  # fmt: skip

    return mamba2_chunk_scan


def _ssd_update(theirs: Callable) -> Callable:
    def mamba2_selective_state_update(
        state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs
    ) -> Tensor:
        # One token; what all channels of a head share stands in each of them.
        return vision_scan.ssd_update(
            state, hidden_states[:, None], dt[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None],
            None if D is None else D[:, 0], None if z is None else z[:, None],
            None if dt_bias is None else dt_bias[:, 0], dt_softplus,
        )[:, 0]  # fmt: skip

    return mamba2_selective_state_update


def _selective_scan(theirs: Callable) -> Callable:
    def mamba_selective_scan(
        hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
        return_last_state=False, **kwargs,
    ):  # fmt: skip
        return vision_scan.selective_scan(
            hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_final_state=return_last_state
        )

    return mamba_selective_scan


def _selective_update(theirs: Callable) -> Callable:
    def mamba_selective_state_update(
        state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs
    ) -> Tensor:
        return vision_scan.selective_scan_update(
            state, hidden_states[..., None], dt[..., None], A, B[..., None], C[..., None], D,
            None if z is None else z[..., None], dt_bias, dt_softplus,
        )[..., 0]  # fmt: skip

    return mamba_selective_state_update


SCANS: dict[str, Callable[[Callable], Callable]] = {
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_update,
    "mamba2_chunk_scan": _ssd,
    "mamba2_selective_state_update": _ssd_update,
    "mamba_selective_scan": _selective_scan,
    "mamba_selective_state_update": _selective_update,
}
