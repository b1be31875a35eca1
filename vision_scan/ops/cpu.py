"""Hands operators to the kernels of csrc/cpu, where these were built and the machine can run them.

The kernels take float32 tensors in one layout, (batch, lists, cells, ...), contiguous or pieces of wider
ones; here other dtypes and layouts are brought into it and back. float64 is left to the reference.
`VISION_SCAN_REFERENCE=1` leaves everything to it.
"""

import os

import torch
from torch import Tensor

from .layout import plain, through_gate, wanted
from .register import MISSING_KERNELS, take_over

MOST_TAPS = 16  # kMostTaps in csrc/cpu/kernels.h


def take_over_all() -> None:
    """Registers the kernels, or says in `MISSING_KERNELS` why there are none."""
    missing = _why_missing()
    if missing:
        MISSING_KERNELS["cpu"] = missing
        return
    for name, forward, backward, serves in (
        ("selective_scan", _selective, _selective_backward, _serves),
        ("selective_scan_2d", _selective_2d, _selective_2d_backward, _serves),
        ("ssd", _ssd, _ssd_backward, _serves),
        ("ssd_2d", _ssd_2d, _ssd_2d_backward, _serves),
        ("causal_conv1d", _conv, _conv_backward, _serves_conv),
        ("causal_conv1d_2d", _conv_2d, _conv_2d_backward, _serves_conv),
        ("gated_rmsnorm", _norm, _norm_backward, _serves),
    ):
        take_over(name, "cpu", forward, serves)
        take_over(f"{name}_backward", "cpu", backward, lambda grads, *args, serves=serves: serves(*args))
    take_over("ssd_update", "cpu", _ssd_update, _serves_update)
    take_over("selective_scan_update", "cpu", _selective_update, _serves_update)
    take_over("causal_conv1d_update", "cpu", _conv_update, _serves_update)


def _why_missing() -> str:
    if os.environ.get("VISION_SCAN_REFERENCE") == "1":
        return "VISION_SCAN_REFERENCE=1 asks for the reference"
    if os.environ.get("VISION_SCAN_EMULATE"):
        return "VISION_SCAN_EMULATE runs the CUDA kernels in their place"
    try:
        import vision_scan._C  # noqa: F401 (registers the library vision_scan_cpu)
    except ImportError:
        return "the CPU kernels were not built; with a C++ compiler: pip install --no-build-isolation -e ."
    return "" if torch.ops.vision_scan_cpu.instruction_set() else "this CPU has no AVX2"


def _serves(x: Tensor, *others) -> bool:
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0


def _serves_conv(x: Tensor, weight: Tensor, *others) -> bool:
    return _serves(x) and weight.shape[-1] <= MOST_TAPS


def _serves_update(state: Tensor, x: Tensor, *others) -> bool:
    """The state is worked on where it lies."""
    return state.dtype == torch.float32 and state.is_contiguous() and _serves(x)


def _cells(t: Tensor, leading: int) -> Tensor:
    """Float32, as it lies if its first `leading` axes have one stride and the others are contiguous, like a
    piece of what a projection gives; else contiguous."""
    cells = t.float().flatten(0, leading - 1)
    return (cells if cells[0].is_contiguous() else cells.contiguous()).unflatten(0, t.shape[:leading])


def _index(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.long().contiguous()


def _ssd_arguments(
    x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens
) -> tuple:
    """Sequences as grids of one list."""
    tokens = [_cells(t, 2)[:, None] for t in (x, dt, B, C)]
    parameters = [None if t is None else plain(t)[None] for t in (A, D, dt_bias)]
    (x, dt, B, C), (A, D, dt_bias) = tokens, parameters
    return (
        x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max,
        plain(initial_state), _index(seq_idx), _index(cu_seqlens), None,
    )  # fmt: skip


def _ssd(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens, chunk_size
) -> tuple[Tensor, Tensor]:
    y, state = torch.ops.vision_scan_cpu.ssd(
        *_ssd_arguments(
            x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens
        )
    )
    y = y[:, 0]
    if z is not None:
        y = y * torch.nn.functional.silu(z.float())
    return y.to(x.dtype).contiguous(), state


def _ssd_backward(grads, *args) -> list[Tensor]:
    *inputs, needs = args
    (
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens, _,
    ) = inputs  # fmt: skip
    arguments = _ssd_arguments(
        x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens
    )
    dy, dz = grads[0].float(), None
    if z is not None:
        ungated, _ = torch.ops.vision_scan_cpu.ssd(*arguments)
        dy, dz = through_gate(dy, ungated[:, 0], z)
    dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial = torch.ops.vision_scan_cpu.ssd_backward(
        dy.contiguous()[:, None], plain(grads[1]), *arguments
    )
    found = {0: dx, 1: ddt, 2: dA, 3: dB, 4: dC, 5: dD, 6: dz, 7: ddt_bias, 11: dinitial}
    return wanted(inputs, found, needs)


def _ssd_2d_arguments(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, index) -> tuple:
    """Grids as rows of cells, each list with a grid of its own."""
    K = index.shape[0]
    x = x if x.dim() == 6 else x[:, None].expand(-1, K, *x.shape[1:])
    x, dt, B, C = (plain(t).flatten(2, 3) for t in (x, dt, B, C))
    A, D, dt_bias = (plain(t) for t in (A, D, dt_bias))
    return x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, None, None, None, _index(index)


def _ssd_2d(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, index, merge, chunk_size) -> Tensor:
    y, _ = torch.ops.vision_scan_cpu.ssd(
        *_ssd_2d_arguments(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, index)
    )
    y = y.unflatten(2, x.shape[-4:-2])
    if merge != "concat":
        y = y.mean(1) if merge == "mean" else y.sum(1)
    return y.to(x.dtype)


def _ssd_2d_backward(grads, *args) -> list[Tensor]:
    *inputs, needs = args
    x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, index, merge, _ = inputs
    dy, K = grads[0].float(), index.shape[0]
    if merge != "concat":
        dy = (dy / K if merge == "mean" else dy)[:, None].expand(-1, K, *dy.shape[1:])
    dx, ddt, dA, dB, dC, dD, ddt_bias, _ = torch.ops.vision_scan_cpu.ssd_backward(
        dy.contiguous().flatten(2, 3),
        None,
        *_ssd_2d_arguments(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, index),
    )
    dx = dx if x.dim() == 6 else dx.sum(1)
    return wanted(inputs, {0: dx, 1: ddt, 2: dA, 3: dB, 4: dC, 5: dD, 6: ddt_bias}, needs)


def _ssd_update(
    state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, seq_idx, state_indices
) -> Tensor:
    tensors = [plain(t) for t in (x, dt, A, B, C, D, z, dt_bias)]
    y = torch.ops.vision_scan_cpu.ssd_update(
        state, *tensors, dt_softplus, dt_min, dt_max, _index(seq_idx), _index(state_indices)
    )
    return y.to(x.dtype)


def _selective_update(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, state_indices) -> Tensor:
    B, C = (t[:, None] if t.dim() == 3 else t for t in (B, C))  # one group
    tensors = [plain(t) for t in (u, dt, A, B, C, D, z, dt_bias)]
    y = torch.ops.vision_scan_cpu.selective_update(
        state, *tensors, dt_softplus, _index(seq_idx), _index(state_indices)
    )
    return y.to(u.dtype)


def _conv_update(state, x, weight, bias, activation, seq_idx, state_indices) -> Tensor:
    y = torch.ops.vision_scan_cpu.conv_update(
        state, plain(x), plain(weight), plain(bias), activation == "silu", _index(seq_idx),
        _index(state_indices),
    )  # fmt: skip
    return y.to(x.dtype)


def _selective_arguments(
    u, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens
) -> tuple:
    """Sequences as grids of one list, channels last."""
    u, dt = (plain(t.transpose(1, 2))[:, None] for t in (u, dt))
    B, C = (t[:, None] if t.dim() == 3 else t for t in (B, C))  # one group
    B, C = (plain(t.movedim(3, 1))[:, None] for t in (B, C))
    A, D, dt_bias = (None if t is None else plain(t)[None] for t in (A, D, dt_bias))
    return (
        u, dt, A, B, C, D, dt_bias, dt_softplus, False,
        plain(initial_state), _index(seq_idx), _index(cu_seqlens), None,
    )  # fmt: skip


def _selective(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens
) -> tuple[Tensor, Tensor]:
    y, state = torch.ops.vision_scan_cpu.selective(
        *_selective_arguments(u, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens)
    )
    y = y[:, 0].transpose(1, 2)
    if z is not None:
        y = y * torch.nn.functional.silu(z.float())
    return y.to(u.dtype).contiguous(), state


def _selective_backward(grads, *args) -> list[Tensor]:
    *inputs, needs = args
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens = inputs
    arguments = _selective_arguments(
        u, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens
    )
    dy, dz = grads[0].float(), None
    if z is not None:
        ungated, _ = torch.ops.vision_scan_cpu.selective(*arguments)
        dy, dz = through_gate(dy, ungated[:, 0].transpose(1, 2), z)
    du, ddt, dA, dB, dC, dD, ddt_bias, dinitial = torch.ops.vision_scan_cpu.selective_backward(
        dy.transpose(1, 2).contiguous()[:, None], plain(grads[1]), *arguments
    )
    du, ddt = (t[:, 0].transpose(1, 2) for t in (du, ddt))
    dB, dC = (t[:, 0].movedim(1, 3) for t in (dB, dC))
    found = {0: du, 1: ddt, 2: dA, 3: dB, 4: dC, 5: dD, 6: dz, 7: ddt_bias, 9: dinitial}
    return wanted(inputs, found, needs)


def _selective_2d_arguments(u, dt, A, B, C, D, dt_bias, dt_softplus, index, merge) -> tuple:
    u, dt, B, C = (
        plain(t).flatten(first, first + 1) for t, first in ((u, u.dim() - 3), (dt, 2), (B, 2), (C, 2))
    )
    A, D, dt_bias = (plain(t) for t in (A, D, dt_bias))
    return u, dt, A, B, C, D, dt_bias, dt_softplus, merge != "concat", None, None, None, _index(index)


def _selective_2d(u, dt, A, B, C, D, dt_bias, dt_softplus, index, merge) -> Tensor:
    y, _ = torch.ops.vision_scan_cpu.selective(
        *_selective_2d_arguments(u, dt, A, B, C, D, dt_bias, dt_softplus, index, merge)
    )
    y = y / index.shape[0] if merge == "mean" else y
    return y.unflatten(-2, u.shape[-3:-1]).to(u.dtype)


def _selective_2d_backward(grads, *args) -> list[Tensor]:
    *inputs, needs = args
    index, merge = inputs[-2:]
    dy = plain(grads[0]).flatten(-3, -2)
    du, ddt, dA, dB, dC, dD, ddt_bias, _ = torch.ops.vision_scan_cpu.selective_backward(
        dy / index.shape[0] if merge == "mean" else dy, None, *_selective_2d_arguments(*inputs)
    )
    return wanted(inputs, {0: du, 1: ddt, 2: dA, 3: dB, 4: dC, 5: dD, 6: ddt_bias}, needs)


def _conv_arguments(x, weight, bias, activation, initial_state, seq_idx, cu_seqlens) -> tuple:
    """Channels last."""
    return (
        _cells(x.transpose(1, 2), 2),
        plain(weight.t())[None],
        None if bias is None else plain(bias)[None],
        activation == "silu",
        None if initial_state is None else plain(initial_state.transpose(1, 2)),
        _index(seq_idx),
        _index(cu_seqlens),
        None,
    )


def _conv(x, weight, bias, activation, initial_state, seq_idx, cu_seqlens) -> tuple[Tensor, Tensor]:
    y, state = torch.ops.vision_scan_cpu.conv(
        *_conv_arguments(x, weight, bias, activation, initial_state, seq_idx, cu_seqlens)
    )
    return y[:, 0].to(x.dtype).transpose(1, 2), state.to(x.dtype).transpose(1, 2).contiguous()


def _conv_backward(grads, *args) -> list[Tensor]:
    *inputs, needs = args
    dstate = None if grads[1] is None else plain(grads[1].transpose(1, 2))
    dx, dweight, dbias, dinitial = torch.ops.vision_scan_cpu.conv_backward(
        plain(grads[0].transpose(1, 2))[:, None], dstate, *_conv_arguments(*inputs)
    )
    found = {0: dx.transpose(1, 2), 1: dweight[0].t(), 2: dbias}
    if inputs[4] is not None:
        found[4] = dinitial.transpose(1, 2)
    return wanted(inputs, found, needs)


def _conv_2d_arguments(x, weight, bias, activation, index) -> tuple:
    K = index.shape[0]
    weight = weight.expand(K, -1, -1) if weight.dim() == 2 else weight
    bias = bias.expand(K, -1) if bias is not None and bias.dim() == 1 else bias
    return (
        plain(x).flatten(-3, -2),
        plain(weight.transpose(1, 2)),
        plain(bias),
        activation == "silu",
        None,
        None,
        None,
        _index(index),
    )


def _conv_2d(x, weight, bias, activation, index) -> Tensor:
    y, _ = torch.ops.vision_scan_cpu.conv(*_conv_2d_arguments(x, weight, bias, activation, index))
    return y.unflatten(2, x.shape[-3:-1]).to(x.dtype)


def _conv_2d_backward(grads, *args) -> list[Tensor]:
    *inputs, needs = args
    weight, bias = inputs[1:3]
    dx, dweight, dbias, _ = torch.ops.vision_scan_cpu.conv_backward(
        plain(grads[0]).flatten(2, 3), None, *_conv_2d_arguments(*inputs)
    )
    dweight = dweight.transpose(1, 2)
    found = {0: dx, 1: dweight.sum(0) if weight.dim() == 2 else dweight}
    if bias is not None:
        found[2] = dbias.sum(0) if bias.dim() == 1 else dbias
    return wanted(inputs, found, needs)


def _norm_arguments(x, weight, z, eps, group_size, norm_before_gate) -> tuple:
    x, z = (None if t is None else _cells(t.reshape(-1, t.shape[-1]), 1) for t in (x, z))
    return x, plain(weight), z, eps, group_size, norm_before_gate


def _norm(x, weight, z, eps, group_size, norm_before_gate) -> Tensor:
    y = torch.ops.vision_scan_cpu.norm(*_norm_arguments(x, weight, z, eps, group_size, norm_before_gate))
    return y.view(x.shape).to(x.dtype)


def _norm_backward(grads, *args) -> list[Tensor]:
    *inputs, needs = args
    dx, dweight, dz = torch.ops.vision_scan_cpu.norm_backward(
        plain(grads[0]).view(-1, inputs[0].shape[-1]), *_norm_arguments(*inputs)
    )
    return wanted(inputs, {0: dx, 1: dweight, 2: dz}, needs)
