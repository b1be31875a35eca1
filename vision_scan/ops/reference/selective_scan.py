"""Mamba-1's selective scan (S6), as a step recurrence and in chunks.

Per channel d and state n:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,        y_t = C_t . h_t + D u_t,        out_t = y_t SiLU(z_t).

The chunked form runs all chunks side by side from a zero state, then passes the states from chunk to
chunk, then adds what the entering state contributes: about 2 sqrt(seqlen) sequential steps.

Source: Gu & Dao 2023, "Mamba" (arXiv:2312.00752), algorithm 2.
"""

import math

import torch
from torch import Tensor

from .segments import real_and_runs, run_packed
from .ssd import update_slots


def selective_scan_recurrent(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token after another; arguments as `vision_scan.selective_scan`."""
    prepared, real, run = _prepare(u, dt, A, B, C, dt_bias, dt_softplus, seq_idx)
    inflow, log_decay, C_full = prepared
    state = _start(initial_state, u, A, inflow.dtype)
    decay = log_decay.exp()
    if run is not None:
        kept = torch.cat([run[:, :1] == 0, run[:, 1:] == run[:, :-1]], dim=1)
        decay = decay * kept[:, :, None, None].to(decay.dtype)
    outputs = []
    for t in range(u.shape[2]):
        state = state * decay[:, t] + inflow[:, t]
        outputs.append((state * C_full[:, t]).sum(-1))
    return _finish(torch.stack(outputs, dim=1), u, D, z, real), state


def selective_scan_chunked(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, cu_seqlens
) -> tuple[Tensor, Tensor]:
    """The chunked form; arguments as `vision_scan.selective_scan`."""
    if cu_seqlens is not None:

        def kernel(rows, row_seq_idx):
            u, dt, B, C, z = (None if t is None else t.movedim(1, -1) for t in rows)
            y, states = selective_scan_chunked(
                u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, row_seq_idx, None
            )
            return y.movedim(-1, 1), states

        sequences = [None if t is None else t.movedim(-1, 1) for t in (u, dt, B, C, z)]
        y, states = run_packed(kernel, sequences, seq_idx, cu_seqlens)
        return y.movedim(1, -1).contiguous(), states

    prepared, real, run = _prepare(u, dt, A, B, C, dt_bias, dt_softplus, seq_idx)
    y, state = _scan_chunks(*prepared, _start(initial_state, u, A, prepared[0].dtype), run)
    return _finish(y, u, D, z, real), state.contiguous()


def _prepare(u, dt, A, B, C, dt_bias, dt_softplus, seq_idx):
    """(inflow, log decay, C), each (batch, seqlen, d, d_state), and padding and runs."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    dt = dt.to(dtype).transpose(1, 2)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = torch.nn.functional.softplus(dt)
    real = run = None
    inflow = dt * u.to(dtype).transpose(1, 2)
    if seq_idx is not None:
        real, run = real_and_runs(seq_idx)
        dt, inflow = (torch.where(real[..., None], t, 0.0) for t in (dt, inflow))
    B, C = (_spread(t.to(dtype), u.shape[1]) for t in (B, C))
    return (inflow[..., None] * B, dt[..., None] * A.to(dtype), C), real, run


def _spread(t: Tensor, d: int) -> Tensor:
    """(batch, [ngroups,] d_state, seqlen) -> (batch, seqlen, d or 1, d_state)."""
    if t.dim() == 3:
        return t.transpose(1, 2)[:, :, None]
    return t.movedim(3, 1).repeat_interleave(d // t.shape[1], dim=2)


def _start(initial_state: Tensor | None, u: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    if initial_state is not None:
        return initial_state.to(dtype)
    return u.new_zeros((u.shape[0], *A.shape), dtype=dtype)


def _finish(y, u, D, z, real) -> Tensor:
    """y (batch, seqlen, d) -> out (batch, d, seqlen) in the dtype of u."""
    y = y.transpose(1, 2)
    if D is not None:
        y = y + u.to(y.dtype) * D.to(y.dtype)[:, None]
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(y.dtype))
    if real is not None:
        y = torch.where(real[:, None], y, 0.0)
    return y.to(u.dtype).contiguous()


def _scan_chunks(inflow, log_decay, C, state, run) -> tuple[Tensor, Tensor]:
    """inflow, log_decay (batch, seqlen, d, d_state), C (batch, seqlen, d or 1, d_state)."""
    batch, seqlen = inflow.shape[:2]
    chunk_size = max(1, math.isqrt(seqlen))
    chunks = -(-seqlen // chunk_size)
    spare = chunks * chunk_size - seqlen

    def cut(t: Tensor) -> Tensor:
        t = torch.nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (0, spare)) if spare else t
        return t.reshape(batch, chunks, chunk_size, *t.shape[2:])

    inflow, log_decay, C = cut(inflow), cut(log_decay), cut(C)
    decay = log_decay.exp()
    through = log_decay.cumsum(dim=2).exp()
    if run is not None:
        runs = torch.cat([run, run[:, -1:].expand(-1, spare)], dim=1).view(batch, chunks, chunk_size)
        entry_run = torch.cat([runs.new_zeros(batch, 1), runs[:, :-1, -1]], dim=1)
        kept = torch.cat([entry_run[..., None], runs[..., :-1]], dim=2) == runs
        decay = decay * kept[..., None, None]
        through = through * (runs == entry_run[..., None])[..., None, None]
    local = torch.zeros_like(inflow[:, :, 0])
    locals_ = []
    for q in range(chunk_size):
        local = local * decay[:, :, q] + inflow[:, :, q]
        locals_.append(local)
    entries = []
    for chunk in range(chunks):
        entries.append(state)
        state = state * through[:, chunk, -1] + local[:, chunk]
    states = torch.stack(locals_, dim=2) + through * torch.stack(entries, dim=1)[:, :, None]
    return (states * C).sum(-1).flatten(1, 2)[:, :seqlen], state


def selective_scan_update(
    state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, state_indices
) -> Tensor:
    """A few tokens onto states that are overwritten; arguments as `vision_scan.selective_scan_update`."""

    def advance(states, rows):
        u_, dt_, B_, C_, z_, seq_idx_ = (None if t is None else t[rows] for t in (u, dt, B, C, z, seq_idx))
        return selective_scan_recurrent(
            u_, dt_, A, B_, C_, D, z_, dt_bias, dt_softplus, states, seq_idx_
        )

    return update_slots(advance, state, u, state_indices)
