"""The short causal depthwise convolution in front of a scan, token by token and as shifted sums.

    y_t = act(bias + sum_j weight[:, width - 1 - j] x_{t-j}),        j = 0 ... width - 1,

where x before the first token is the state: the last width - 1 inputs, oldest first. Only real tokens of
the same segment count: padding is stepped over, as if it was not in the sequence.
"""

import torch
from torch import Tensor

from .segments import real_and_runs, run_packed
from .ssd import update_slots


def causal_conv1d_recurrent(x, weight, bias, activation, initial_state, seq_idx) -> tuple[Tensor, Tensor]:
    """One token after another; arguments as `vision_scan.causal_conv1d`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    width = weight.shape[1]
    state = _start(initial_state, x, width).to(dtype)
    real = kept = torch.ones_like(x[:, 0], dtype=torch.bool)
    if seq_idx is not None:
        real, run = real_and_runs(seq_idx)
        kept = torch.cat([run[:, :1] == 0, run[:, 1:] == run[:, :-1]], dim=1)
    outputs = []
    for t in range(x.shape[2]):
        past = state * kept[:, t, None, None]
        window = torch.cat([past, x[:, :, t : t + 1].to(dtype)], dim=2)
        y = _activate((window * weight.to(dtype)).sum(-1), bias, activation)
        outputs.append(torch.where(real[:, t, None], y, 0.0))
        state = torch.where(real[:, t, None, None], window[:, :, 1:], state)
    return torch.stack(outputs, dim=2).to(x.dtype), state.to(x.dtype)


def causal_conv1d_shifted(
    x, weight, bias, activation, initial_state, seq_idx, cu_seqlens
) -> tuple[Tensor, Tensor]:
    """Sums of shifted copies; arguments as `vision_scan.causal_conv1d`."""
    if cu_seqlens is not None:

        def kernel(rows, row_seq_idx):
            y, states = causal_conv1d_shifted(
                rows[0].transpose(1, 2), weight, bias, activation, initial_state, row_seq_idx, None
            )
            return y.transpose(1, 2), states

        y, states = run_packed(kernel, [x.transpose(1, 2)], seq_idx, cu_seqlens)
        return y.transpose(1, 2), states

    if seq_idx is None:
        wide = torch.promote_types(x.dtype, torch.float32)
        line = torch.cat([_start(initial_state, x, weight.shape[1]), x], dim=2)
        y = torch.nn.functional.conv1d(line.to(wide), weight.to(wide)[:, None], groups=x.shape[1])
        y = _activate(y.transpose(1, 2), bias, activation)
        return _channels_first(y, line[:, :, x.shape[2] :].transpose(1, 2), x.dtype)

    # Channels last inside: the layout that the projection before it writes.
    tokens = x.transpose(1, 2)
    history = _start(initial_state, x, weight.shape[1]).transpose(1, 2)
    real, run = real_and_runs(seq_idx)
    to_front = torch.argsort(~real, dim=1, stable=True)
    ahead = torch.arange(x.shape[2], device=x.device) < real.sum(1, keepdim=True)
    # Padding ends up behind the real tokens; there it must not count as part of any window.
    packed_run = torch.where(ahead, run.gather(1, to_front), -1)
    index = to_front[..., None].expand_as(tokens)
    y, window = _shifted_sums(tokens.gather(1, index), history, weight, packed_run)
    y = torch.zeros_like(y).scatter(1, index, _activate(y, bias, activation))
    y = torch.where(real[..., None], y, 0.0)
    return _channels_first(y, window, x.dtype)


def _channels_first(y, window, dtype) -> tuple[Tensor, Tensor]:
    """The output stays a view of (batch, seqlen, d) in memory; the window is a tensor of its own."""
    return y.to(dtype).contiguous().transpose(1, 2), window.transpose(1, 2).contiguous()


def _shifted_sums(tokens, history, weight, run) -> tuple[Tensor, Tensor]:
    """tokens (batch, seqlen, d), history (batch, width - 1, d); run (batch, seqlen) int, -1 behind the
    last real token. Returns the sums in float32 or wider and the window after the last real token."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    seqlen, tail = tokens.shape[1], history.shape[1]
    line = torch.cat([history, tokens], dim=1)
    taps = weight.to(dtype)
    y = tokens.to(dtype) * taps[:, tail]
    line_run = torch.nn.functional.pad(run, (tail, 0), value=0)
    for back in range(1, tail + 1):
        there = slice(tail - back, tail - back + seqlen)
        same = (line_run[:, there] == run)[..., None]
        y = y + torch.where(same, line[:, there].to(dtype), 0.0) * taps[:, tail - back]
    if tail == 0:
        return y, history
    num_real = (run >= 0).sum(1, keepdim=True)
    last = num_real + torch.arange(tail, device=run.device)
    final_run = line_run.gather(1, num_real + tail - 1)
    window = line.gather(1, last[..., None].expand(-1, -1, line.shape[2]))
    return y, torch.where((line_run.gather(1, last) == final_run)[..., None], window, 0.0)


def _activate(y: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """y (..., d)."""
    if bias is not None:
        y = y + bias.to(y.dtype)
    return torch.nn.functional.silu(y) if activation == "silu" else y


def _start(initial_state: Tensor | None, x: Tensor, width: int) -> Tensor:
    """(batch, d, width - 1) in the dtype of x."""
    if initial_state is not None:
        return initial_state.to(x.dtype)
    return x.new_zeros((x.shape[0], x.shape[1], width - 1))


def causal_conv1d_update(state, x, weight, bias, activation, seq_idx, state_indices) -> Tensor:
    """A few tokens onto windows that are overwritten; arguments as `vision_scan.causal_conv1d_update`."""

    def advance(states, rows):
        return causal_conv1d_recurrent(
            x[rows], weight, bias, activation, states, None if seq_idx is None else seq_idx[rows]
        )

    return update_slots(advance, state, x, state_indices)
